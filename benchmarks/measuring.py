"""Shared by the benchmarks: alternating repeats, peak memory of a new process, tables and JSON output."""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from cocomix.common import environment
from cocomix.common.console import table

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL_SIZE = {"cpu": 2_048, "cuda": 8_192}
BEFORE_TIMING: list[Callable[[], None]] = []
"""Called between warm-up and timing; `gpu.py` waits here until no other job uses the device."""


def device() -> torch.device:
    """Return the GPU if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    """Measure the wall time of one call."""
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def alternating(actions: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Measure the seconds of each action, called in turn so that a temporary slowdown affects all of them."""
    for action in actions.values():
        for _ in range(warm_up):
            action()
    for wait in BEFORE_TIMING:
        wait()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(action))
        print(f"\r{round_ + 1}/{repeats} rounds", end="", file=sys.stderr, flush=True)
    print("\r" + 20 * " " + "\r", end="", file=sys.stderr, flush=True)
    return times


def median_ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within each round."""
    return statistics.median(one / other for one, other in zip(times, to, strict=True))


def matmul_flops_per_second(precision: str) -> float:
    """Measure the throughput of one large matrix product in this precision."""
    size = MATMUL_SIZE[device().type]
    a, b = (torch.randn(size, size, device=device()).to(PRECISIONS[precision]) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / statistics.median(seconds(lambda: torch.mm(a, b)) for _ in range(5))


def peak_bytes() -> int:
    """Return the peak memory of this process so far: resident on a CPU, allocated on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage includes the peak of the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_bytes_of(script: str, arguments: Sequence[str]) -> int:
    """Run `script` with options that print the peak memory of a single case, and return it."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def flatness(samples: Sequence[float]) -> dict[str, float]:
    """Compare the last quarter of samples over time with the second, after the start: means, growth, and the most."""
    quarter = max(1, len(samples) // 4)
    early, late = statistics.mean(samples[quarter : 2 * quarter]), statistics.mean(samples[-quarter:])
    return {"second_quarter": early, "last_quarter": late, "growth": late / early - 1, "most": max(samples)}


def shown(value: object) -> str:
    """Format a figure of a table, or a dash for None."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Build a parser with the options of all benchmarks."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the environment to this file")
    options.add_argument("--no-memory", action="store_true", help="do not measure peak memory in separate processes")
    options.add_argument("--repeats", type=int, default=7, help="rounds to take the median over")
    return options


def finish(
    arguments: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[object]], **more: object
) -> None:
    """Print the table, and write the figures to `--json` with command, commit, versions, hardware and date."""
    print(table(list(columns), [[shown(value) for value in row] for row in rows]))
    for name, value in more.items():
        print(f"{name.replace('_', ' ')}: {json.dumps(value)}")
    if arguments.json is None:
        return
    command = " ".join(["python", *sys.argv])
    figures = [dict(zip(columns, row, strict=True)) for row in rows]
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        **environment.describe(),
        "threads": torch.get_num_threads(),
        "rows": figures,
        **more,
    }
    arguments.json.write_text(json.dumps(content, indent=2) + "\n")
