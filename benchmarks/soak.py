"""Train for a long time with evaluations and checkpoints: are memory and open file descriptors flat?

    python benchmarks/soak.py recipes/quickstart.yaml runs/soak --seconds 3600

The training has no end. After the given time it is terminated, which must leave a checkpoint. Recipe keys as options
shorten what comes before it, such as --sae.training_tokens 8192.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from measuring import flatness

from cocomix.common import environment, files

STUDENT = "cocomix"
ENDLESS = 10**12
"""Tokens that no soak reaches."""
STARTUP_SECONDS = 1800
"""Time for the stages before the student and its first checkpoint."""


def newest(partial: Path) -> int:
    """Return the step of the newest complete checkpoint; 0 if there is none."""
    steps = [int(path.parent.name.rpartition("-")[2]) for path in partial.glob("checkpoint-*/complete")]
    return max(steps, default=0)


def measure(recipe: Path, output: Path, seconds: float, changes: list[str]) -> dict[str, Any]:
    """Train, and return steps, checkpoints, memory in MB, file descriptors and the exit code of the termination."""
    partial = output / "students" / f"{STUDENT}.partial"
    options = ["--only", STUDENT, "--output", str(output), "--training.max_tokens", str(ENDLESS), *changes]
    started, first = time.monotonic(), newest(partial)
    with subprocess.Popen([sys.executable, "-m", "cocomix", "train", str(recipe), *options]) as training:
        try:
            while newest(partial) == first:
                if training.poll() is not None or time.monotonic() - started > STARTUP_SECONDS:
                    raise SystemExit("the training wrote no checkpoint")
                time.sleep(1)
            first = newest(partial)
            memory, descriptors, steps = _watched(psutil.Process(training.pid), partial, seconds)
            training.send_signal(signal.SIGTERM)
            asked = time.monotonic()
            code = training.wait(60)
            ended = time.monotonic() - asked
        finally:
            training.kill()
    return {
        "seconds": seconds,
        "steps": newest(partial) - first,
        "checkpoints": len(steps),
        "memory_mb": flatness(memory),
        "descriptors": flatness(descriptors),
        "exit_code": code,
        "seconds_to_end": ended,
    }


def _watched(training: psutil.Process, partial: Path, seconds: float) -> tuple[list[float], list[float], set[int]]:
    """Return the memory in MB and the descriptors of every second, and the steps of the checkpoints seen."""
    memory, descriptors, steps = [], [], set()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        memory.append(training.memory_info().rss / 1e6)
        descriptors.append(float(training.num_fds()))
        steps.add(newest(partial))
        time.sleep(1)
    return memory, descriptors, steps


def main() -> None:
    """Measure, print the figures, and write them with --json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("recipe", type=Path, help=f"recipe with a student {STUDENT}")
    parser.add_argument("output", type=Path, help="output folder; what it holds of the recipe is used")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--json", type=Path, help="write the figures there")
    options, changes = parser.parse_known_args()
    figures = {"command": " ".join(["python", *sys.argv]), **environment.describe()}
    figures |= measure(options.recipe, options.output, options.seconds, changes)
    print(json.dumps(figures, indent=2))
    if options.json:
        files.write_json(options.json, figures)


if __name__ == "__main__":
    main()
