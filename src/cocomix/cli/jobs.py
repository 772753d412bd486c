"""Train several students at a time on one device, each in a process: `--jobs N` of `cocomix run` and `cocomix train`.

Each process is `cocomix train RECIPE --only STUDENT` after the stages that the students share, so it resumes and locks
its stage as that command does.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import yaml

from cocomix.cli.options import USER_ERROR
from cocomix.common import distributed
from cocomix.common.console import status
from cocomix.common.errors import InputError
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.run import run_shared

SECONDS_BETWEEN_BARS = "20"
"""How often a progress bar of a training is shown again."""


class Trainings:
    """Processes that train one student each.

    Args:
        jobs: how many run at a time.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self._lock = Lock()

    def run(self, commands: Mapping[str, list[str]]) -> dict[str, int]:
        """Run commands by their labels; return the exit code of each. An interruption stops all of them."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = {label: pool.submit(self._run, label, command) for label, command in commands.items()}
            try:
                return {label: future.result() for label, future in futures.items()}
            except BaseException:
                self._stop()
                raise

    def _run(self, label: str, command: list[str]) -> int:
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = {"OMP_NUM_THREADS": str(threads), "TQDM_MININTERVAL": SECONDS_BETWEEN_BARS, **os.environ}
        with self._lock:
            if self._stopped:
                return -signal.SIGINT
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="backslashreplace",
                env=environment,
                start_new_session=True,  # Ctrl-C reaches it once, from `_stop`
            )
            self._running.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                status(f"[{label}] {line.strip()}")
        code = process.wait()
        with self._lock:
            self._running.discard(process)
        return code

    def _stop(self) -> None:
        """Interrupt the running processes, and start no other."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.send_signal(signal.SIGINT)


def train_students(recipe: Recipe, jobs: int, only: str | None = None) -> int:
    """Run a recipe's shared stages, then train its students, `jobs` at a time.

    Args:
        recipe: to run; each of its replicates.
        jobs: number of trainings at a time.
        only: train this student only; see `Pipeline.students`.

    Returns:
        0, or 1 if a training failed by a fault of the program; the others are finished.

    Raises:
        InputError: trainings ended with a message; the others are finished.
    """
    if distributed.world_size() > 1:
        raise InputError("--jobs trains in processes of its own; start the command without torchrun")
    recipe.require_known_methods()
    pipelines = [Pipeline(replicate) for replicate in recipe.replicated()]
    for pipeline in pipelines:
        pipeline.students(only)  # before anything runs
    with tempfile.TemporaryDirectory(prefix="cocomix-jobs-") as temporary:
        commands: dict[str, list[str]] = {}
        for number, pipeline in enumerate(pipelines):
            run_shared(pipeline.recipe)
            path = Path(temporary) / f"{number}.yaml"
            path.write_text(yaml.safe_dump(dataclasses.asdict(pipeline.recipe)), encoding="utf-8")
            prefix = "" if recipe.replicates is None else f"{pipeline.folder.name} "
            for stage in pipeline.students(only):
                if not stage.is_done():
                    train = ["train", str(path), "--only", stage.folder.name]
                    commands[f"{prefix}{stage.folder.name}"] = [sys.executable, "-m", "cocomix", *train]
        codes = Trainings(jobs).run(commands)
    failed = {label: code for label, code in codes.items() if code}
    lines = [f"{label} was not trained (exit code {code}); its message is above" for label, code in failed.items()]
    if {*failed.values()} == {USER_ERROR}:
        raise InputError("\n".join(lines))
    for line in lines:
        status(f"cocomix: {line}")
    return 1 if failed else 0
