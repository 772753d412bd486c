"""Run the device tests and every benchmark of a GPU, each in a separate process with a time limit.

benchmarks/gpu.sh, which starts this, says how.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import measuring
import torch

from cocomix.common import environment
from cocomix.common.console import table

TESTS = "tests"
"""Name of the device tests for `--only`."""
TOTAL_SECONDS = 470
"""Time limit of all rows and tests together."""
PREPARATION_SECONDS = 240
"""Time limit of the tests, and of loading, compiling and warming up all jobs, which run at once."""
BYTES_PER_JOB = 16e9
"""Device memory that a step may need, by which the jobs that warm up share the device."""
BENCHMARKS = Path(__file__).parent
RESULTS = BENCHMARKS / "results" / "gpu.json"
COLUMNS = {"ms": "ms", "tokens/s": "tokens_per_second", "MFU %": "mfu_percent", "peak MB": "peak_mb"}
"""Columns of the benchmarks' figures, and their names here."""
MODELS = ("plain", "interleave", "add")
PRELOADED = ["train_step", "generate", "transformers.models.gpt2.modeling_gpt2", "torch._inductor.compile_fx"]
"""Modules that every process needs."""
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Job:
    """A benchmark command and the rows that its figures fill.

    Attributes:
        shape: shape of the models.
        command: script and options.
        rows: for each row, the values that identify it among the command's figures; none for the only one.
        seconds: time limit of measuring, after the preparation.
    """

    shape: str
    command: tuple[str, ...]
    rows: dict[str, Row]
    seconds: int = 40


@dataclass
class Outcome:
    """What a job measured, or in one line why it did not; `took` is the seconds of measuring."""

    figures: Row
    error: str | None
    took: float


class Running(NamedTuple):
    """A started job: its process, the events that it is ready and that it is its turn, and its files."""

    process: Any
    ready: Any
    turn: Any
    log: Path
    figures: Path


def training_job(shape: str, method: str, compiled: bool) -> Job:
    """A training step of one method in bf16, with a profile."""
    options = ("--methods", method, "--precision", "bf16", "--profile", *(["--compile"] if compiled else []))
    name = method if compiled else f"{method}, eager"
    return Job(shape, ("train_step.py", *options), {name: {}})


def generation_job(shape: str, batch: int) -> Job:
    """Generation by all models, with a dynamic cache and with a static cache and compiled steps."""
    caches = {"": "dynamic", ", compiled": "static + compiled"}
    rows: dict[str, Row] = {
        f"generate {model}, batch {batch}{suffix}": {"model": model, "cache": cache}
        for suffix, cache in caches.items()
        for model in MODELS
    }
    options = ("--batch", str(batch), "--new-tokens", "64", "--static", "--no-memory")
    return Job(shape, ("generate.py", *options), rows, seconds=60)


def jobs() -> list[Job]:
    """Return all jobs, those first that matter most: the last ones are dropped where time runs out."""
    small, large = "69m-gpu", "124m-gpu"
    students = ("plain", "ntp", "cocomix", "cocomix-add", "cocomix-none", "pause", "kd", "online")
    return [
        *(training_job(small, method, True) for method in students),
        *(training_job(small, method, True) for method in ("labels", "labels-activation")),
        *(training_job(small, method, False) for method in ("plain", "cocomix", "labels", "labels-activation")),
        Job(small, ("sae_training.py",), {"SAE training": {}}),
        generation_job(small, 1),
        *(training_job(large, method, True) for method in students),
        *(generation_job(shape, batch) for shape, batch in ((small, 16), (large, 1), (large, 16))),
    ]


def run_in_process(script: str, options: list[str], log: Path, tiny: bool, ready: Any, turn: Any) -> None:
    """Run a benchmark up to its timing, report that it is ready, and measure when it is its turn.

    The log ends with the error if it fails.
    """

    def wait_for_turn() -> None:
        torch.cuda.empty_cache()
        ready.set()
        turn.wait()

    if tiny:
        torch.set_num_threads(1)
        measuring.MATMUL_SIZE = dict.fromkeys(measuring.MATMUL_SIZE, 64)
    measuring.BEFORE_TIMING.append(wait_for_turn)
    with log.open("w", buffering=1) as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        sys.argv = [script, *options]
        try:
            runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
        except Exception as error:
            output.write(f"\n{type(error).__name__}: {' '.join(str(error).split())[:300]}\n")
            raise SystemExit(1) from None


def exit_unless_cuda_can_start() -> None:
    """Exit with 1 in a process forked from one that has started CUDA, which cannot start it again."""
    sys.exit(int(torch.cuda._is_in_bad_fork()))


class Runner:
    """Runs jobs in processes that have loaded the libraries already: all warm up at once, then one at a time measures.

    Args:
        folder: where logs and figures are written.
        tiny: run every shape as `tiny`.
    """

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny = folder, tiny
        self.start = time.monotonic()
        self.deadline = self.start + TOTAL_SECONDS
        self.running: dict[Job, Running] = {}
        self.processes: Any = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(PRELOADED)
        probe = self.processes.Process(target=exit_unless_cuda_can_start)
        probe.start()
        probe.join()
        if probe.exitcode:  # a library has started CUDA in the server
            self.processes = multiprocessing.get_context("spawn")

    def left(self) -> float:
        """Return the seconds until the time limit of all jobs."""
        return self.deadline - time.monotonic()

    def warm_up(self, job: Job, repeats: int) -> None:
        """Start a job, and wait until it is ready to measure, has failed, or the time of the preparation is over."""
        script, *options = job.command
        if self.tiny and script == "generate.py":
            options += ["--prompt", "8", "--new-tokens", "2"]
        name = re.sub(r"\W+", "-", " ".join((job.shape, *job.command)))
        log, figures = (self.folder / f"{name}.{kind}" for kind in ("log", "json"))
        shape = "tiny" if self.tiny else job.shape
        options += ["--shape", shape, "--repeats", str(repeats), "--json", str(figures)]
        ready, turn = self.processes.Event(), self.processes.Event()
        arguments = (script, options, log, self.tiny, ready, turn)
        process = self.processes.Process(target=run_in_process, args=arguments)
        process.start()
        self.running[job] = Running(process, ready, turn, log, figures)
        while time.monotonic() < self.start + PREPARATION_SECONDS and process.is_alive() and not ready.wait(0.5):
            pass

    def measure(self, job: Job) -> Outcome:
        """Let a job measure, within its time limit and the total limit."""
        if job not in self.running:
            return Outcome({}, f"not started: the {PREPARATION_SECONDS} s of the preparation were over", 0.0)
        process, _, turn, log, figures = self.running[job]
        start = time.monotonic()
        limit = max(0.0, min(job.seconds, self.left()))
        turn.set()
        process.join(limit)
        took = time.monotonic() - start
        if process.is_alive():
            process.kill()
            process.join()
            return Outcome({}, f"stopped after its {limit:.0f} s", took)
        if process.exitcode:
            lines = log.read_text().split("\n") if log.exists() else []
            last = next((line for line in reversed(lines) if line.strip()), "no output")
            return Outcome({}, f"exit code {process.exitcode}: {last.strip()[:300]}", took)
        return Outcome(json.loads(figures.read_text()), None, took)


def rows_of(job: Job, outcome: Outcome) -> list[Row]:
    """Return the rows that a job fills; without figures, with the error."""
    found = []
    for name, keys in job.rows.items():
        row: Row = {"row": name, "shape": job.shape, "seconds": round(outcome.took, 1)}
        matching = [each for each in outcome.figures.get("rows", []) if keys.items() <= each.items()]
        if len(matching) == 1:
            row |= {COLUMNS.get(key, key): value for key, value in matching[0].items() if value is not None}
        else:
            row["error"] = outcome.error or f"{len(matching)} of the command's figures are this row's; expected 1"
        found.append(row)
    extras = {key: outcome.figures[key] for key in ("shares", "profiles") if outcome.figures.get(key)}
    return [found[0] | extras, *found[1:]]


def add_ratios(rows: list[Row]) -> None:
    """Add each row's tokens/s as a multiple of the plain model's: same shape; for generation, same batch and cache."""
    speeds = {(row["shape"], row["row"]): row.get("tokens_per_second") for row in rows}
    for row in rows:
        name = str(row["row"])
        reference = re.sub(r"^generate \w+", "generate plain", name) if name.startswith("generate") else "plain"
        plain, speed = speeds.get((row["shape"], reference)), row.get("tokens_per_second")
        if isinstance(plain, (int, float)) and isinstance(speed, (int, float)):
            row["times_plain"] = speed / plain


def run_tests(tiny: bool, seconds: float) -> Row:
    """Run the tests of `make test-gpu`; in miniature, one of them."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "tests/gpu"]
    command += ["-k", "every_operation and gpt2 and bfloat16"] if tiny else []
    shown = " ".join(["python", *command[1:]])
    try:
        done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"command": shown, "passed": False, "summary": f"stopped after {seconds:.0f} s", "failures": []}
    lines = done.stdout.splitlines()
    failures = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    summary = lines[-1] if lines else done.stderr.strip()[-300:]
    return {"command": shown, "passed": done.returncode == 0, "summary": summary, "failures": failures}


def prepare(runner: Runner, chosen: list[Job], repeats: int, with_tests: bool) -> Row | None:
    """Run the tests, and meanwhile warm up all jobs, as many at once as the device or the processor allows."""
    at_once = os.cpu_count() or 1
    if torch.cuda.is_available():
        at_once = min(at_once, int(torch.cuda.get_device_properties(0).total_memory / BYTES_PER_JOB))
    with ThreadPoolExecutor(max(1, at_once)) as pool:
        tests = pool.submit(run_tests, runner.tiny, PREPARATION_SECONDS) if with_tests else None
        list(pool.map(lambda job: runner.warm_up(job, repeats), chosen))
        return tests.result() if tests else None


def show(rows: list[Row], tests: Row | None) -> None:
    """Print the table, the errors of failed rows, and the result of the tests."""
    names = [*COLUMNS.values(), "times_plain"]
    cells = []
    for row in rows:
        figures = ["failed", *["–"] * 4] if "error" in row else [measuring.shown(row.get(name)) for name in names]
        cells.append([str(row["row"]), str(row["shape"]), *figures])
    print(table(["row", "shape", "ms", "tokens/s", "MFU %", "peak MB", "× plain tokens/s"], cells))
    for row in rows:
        if "error" in row:
            print(f"failed: {row['row']} ({row['shape']}): {row['error']}")
    if tests is not None:
        print("\n".join([f"{tests['command']}: {tests['summary']}", *tests["failures"]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--miniature", action="store_true", help="tiny models, uncompiled: the same rows in 2 minutes")
    parser.add_argument("--only", metavar="PATTERN", default="", help=f"only `{TESTS}` or jobs with such a `shape row`")
    parser.add_argument("--commit", default=environment.commit(), help="commit, where there is no checkout of git")
    parser.add_argument("--json", type=Path, metavar="FILE", help="by default benchmarks/results/gpu.json")
    arguments = parser.parse_args()
    chosen = [job for job in jobs() if any(re.search(arguments.only, f"{job.shape} {name}") for name in job.rows)]
    rows: list[Row] = []
    target = arguments.json or (None if arguments.miniature else RESULTS)
    command = " ".join(["benchmarks/gpu.sh", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{folder}/inductor")
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # checks for a GPU without starting CUDA
        if arguments.miniature:
            os.environ["TORCH_COMPILE_DISABLE"] = "1"
        runner = Runner(Path(folder), arguments.miniature)
        repeats = 1 if arguments.miniature else 7
        tests = prepare(runner, chosen, repeats, with_tests=bool(re.search(arguments.only, TESTS)))
        about = {"command": command, **environment.describe(), "commit": arguments.commit, "tests": tests}
        for job in chosen:
            rows += rows_of(job, runner.measure(job))
            print(f"{len(rows)} rows, {runner.left():.0f} s left", file=sys.stderr, flush=True)
            add_ratios(rows)
            if target is not None:  # after each job: a time limit outside this script keeps what is measured
                write(target, about | {"rows": rows})
    show(rows, tests)
    sys.exit(any("error" in row for row in rows) or (tests is not None and not tests["passed"]))


def write(target: Path, content: Row) -> None:
    """Write the figures."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
