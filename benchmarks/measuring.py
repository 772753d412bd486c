"""Medians of alternating repeats, peak memory of a fresh process, tables, and JSON beside them."""

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

from cocomix import environment

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MATMUL_SIZE = {"cpu": 2_048, "cuda": 8_192}


def device() -> torch.device:
    """The GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    """Wall time of one call."""
    synchronise()
    start = time.perf_counter()
    action()
    synchronise()
    return time.perf_counter() - start


def alternating(actions: Mapping[str, Callable[[], object]], repeats: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Seconds of each action, called in turns: what slows the machine down for a while hits them all."""
    for action in actions.values():
        for _ in range(warm_up):
            action()
    times: dict[str, list[float]] = {name: [] for name in actions}
    for round_ in range(repeats):
        for name, action in actions.items():
            times[name].append(seconds(action))
        print(f"\r{round_ + 1}/{repeats} rounds", end="", file=sys.stderr, flush=True)
    print("\r" + 20 * " " + "\r", end="", file=sys.stderr, flush=True)
    return times


def median_ratio(times: Sequence[float], to: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(one / other for one, other in zip(times, to, strict=True))


def matmul_flops_per_second(precision: str) -> float:
    """What the machine reaches in one large matrix product of this type."""
    size = MATMUL_SIZE[device().type]
    a, b = (torch.randn(size, size, device=device()).to(PRECISIONS[precision]) for _ in range(2))
    torch.mm(a, b)
    return 2 * size**3 / statistics.median(seconds(lambda: torch.mm(a, b)) for _ in range(5))


def peak_bytes() -> int:
    """Peak memory of this process until now: resident on a CPU, allocated on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there begins with the peak of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_bytes_of(script: str, arguments: Sequence[str]) -> int:
    """What `script` prints when told to run one thing alone and report its peak."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as a Markdown table, columns aligned."""
    cells = [[_shown(value) for value in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| "
        + " | ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join((w + 1) * "-" + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of all benchmarks."""
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures, and where they were taken, here")
    made.add_argument("--no-memory", action="store_true", help="do not measure peaks, each in a process of its own")
    made.add_argument("--repeats", type=int, default=7, help="rounds of which the median is taken")
    return made


def finish(
    arguments: argparse.Namespace, columns: Sequence[str], rows: Sequence[Sequence[object]], **more: object
) -> None:
    """Print the table, and write the figures with command, commit, versions, hardware and date."""
    print(table(columns, rows))
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
