"""Run the stages of a recipe several at a time on one device, each in a process: `--jobs N`.

The processes are forked from one that has loaded the libraries, which takes seconds, so a stage starts at once. A stage
runs as soon as the stages that it needs are finished; of those that can run, the first in the recipe's order.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from threading import Condition
from typing import TextIO

import torch

from cocomix.cli.options import USER_ERROR, load_libraries
from cocomix.cli.outcome import exit_code_of
from cocomix.common import distributed, interruption
from cocomix.common.console import Verbosity, set_verbosity, verbosity, warn
from cocomix.common.errors import InputError
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.run import prepared, run_only, wanted_stages
from cocomix.pipeline.stage import Stage

SKIPPED = -1
"""In place of the exit code of a task that was not started."""


@dataclass(frozen=True)
class Task:
    """What one process does.

    Attributes:
        label: unique name, before each line that the process prints.
        action: what to do; it is pickled.
        needs: labels of the tasks that must have succeeded before.
    """

    label: str
    action: Callable[[], None]
    needs: frozenset[str] = frozenset()


class Processes:
    """Processes that perform tasks.

    Args:
        jobs: how many run at a time.
    """

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # checks for a GPU without starting CUDA
        self._context: ForkServerContext | SpawnContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C would print a traceback of the server
        ensure_running()  # it loads the libraries meanwhile
        signal.signal(signal.SIGINT, before)
        self._changed = Condition()
        self._waiting: list[Task] = []
        self._running: dict[str, multiprocessing.process.BaseProcess] = {}
        self._codes: dict[str, int] = {}
        self._stopped = False

    def run(self, tasks: Sequence[Task]) -> dict[str, int]:
        """Perform tasks; return their exit codes, `SKIPPED` for those whose needs have failed.

        An interruption ends all processes with a termination signal.
        """
        self._waiting = list(tasks)
        probe = self._context.Process(target=_exit_if_cuda_was_started)
        probe.start()
        probe.join()
        if probe.exitcode:  # a library started CUDA when it was loaded, so forked processes cannot
            self._context = multiprocessing.get_context("spawn")
        with ThreadPoolExecutor(self.jobs) as pool:
            workers = [pool.submit(self._work) for _ in range(self.jobs)]
            try:
                for worker in as_completed(workers):  # the first that fails ends the others
                    worker.result()
            except BaseException:
                self._stop()
                raise
        return {task.label: self._codes.get(task.label, SKIPPED) for task in tasks}

    def _work(self) -> None:
        while (started := self._start_next()) is not None:
            task, process, output = started
            with os.fdopen(output, errors="backslashreplace") as lines:
                for line in lines:
                    if line.strip():
                        warn(f"[{task.label}] {line.rstrip()}")
            wait([process.sentinel])
            with self._changed:
                process.join()  # not outside: starting another process reads the exit codes of all that have ended
                del self._running[task.label]
                self._codes[task.label] = process.exitcode or 0
                self._changed.notify_all()

    def _start_next(self) -> tuple[Task, multiprocessing.process.BaseProcess, int] | None:
        """Start the first task that can start, waiting for it; return it with its process and output, or None."""
        with self._changed:
            while not self._stopped:
                succeeded = {label for label, code in self._codes.items() if code == 0}
                ready = next((task for task in self._waiting if task.needs <= succeeded), None)
                if ready is not None:
                    self._waiting.remove(ready)
                    return self._start(ready)
                if not self._running:
                    return None
                self._changed.wait()
        return None

    def _start(self, task: Task) -> tuple[Task, multiprocessing.process.BaseProcess, int]:
        threads = max(1, torch.get_num_threads() // self.jobs)
        reader, writer = multiprocessing.Pipe(duplex=False)
        process = self._context.Process(target=_perform, args=(task.action, Path.cwd(), threads, verbosity(), writer))
        process.start()
        self._running[task.label] = process
        writer.close()
        output = os.dup(reader.fileno())
        reader.close()
        return task, process, output

    def _stop(self) -> None:
        """Terminate the running processes, and start no other."""
        with self._changed:
            self._stopped = True
            for process in self._running.values():
                process.terminate()
            self._changed.notify_all()


def _exit_if_cuda_was_started() -> None:
    sys.exit(int(torch.cuda._is_in_bad_fork()))


def _perform(action: Callable[[], None], folder: Path, threads: int, level: Verbosity, output: Connection) -> None:
    """Perform an action in a process that works in `folder` and prints into `output`; exit with the exit code."""
    os.chdir(folder)
    os.setsid()  # Ctrl-C reaches the process once, by `_stop`
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    sys.stdout, sys.stderr = map(_line_writer, (1, 2))
    interruption.raise_on_signals()
    set_verbosity(level)
    load_libraries()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    sys.exit(exit_code_of(action))


def _line_writer(descriptor: int) -> TextIO:
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def run_in_jobs(recipe: Recipe, jobs: int, only: tuple[str, ...] = ()) -> int:
    """Run the stages of a recipe up to its students, `jobs` at a time.

    Args:
        recipe: to run; each of its replicates.
        jobs: number of stages at a time.
        only: train these students only; see `Pipeline.students`.

    Returns:
        0, or 1 if a stage failed by a fault of the program; those that do not need it are finished.

    Raises:
        InputError: a stage ended with a message; those that do not need it are finished.
    """
    if distributed.world_size() > 1:
        raise InputError("--jobs starts processes; start the command without torchrun")
    recipe.require_known_methods()
    processes = Processes(jobs)
    tasks: list[Task] = []
    first: Pipeline | None = None
    for replicate in recipe.replicated():
        with prepared(replicate, "students", only, first) as pipeline:
            first = first or pipeline
            prefix = "" if recipe.replicates is None else f"{pipeline.folder.name} "
            tasks += stage_tasks(pipeline, only, prefix)
    if not tasks:
        return 0
    codes = processes.run(tasks)
    failed = {label: code for label, code in codes.items() if code}
    lines = [
        f"{label} was not started, because it needs what failed"
        if code == SKIPPED
        else f"{label} failed (exit code {code}); its message is above"
        for label, code in failed.items()
    ]
    if {*failed.values()} - {SKIPPED} == {USER_ERROR}:
        raise InputError("\n".join(lines))
    for line in lines:
        warn(f"cocomix: {line}")
    return 1 if failed else 0


def stage_tasks(pipeline: Pipeline, only: tuple[str, ...] = (), prefix: str = "") -> list[Task]:
    """Return a task for each unfinished stage of a recipe, in order; labels begin with `prefix`."""
    missing = [stage for stage in wanted_stages(pipeline, "students", only) if not stage.is_done()]
    replicate = pipeline.replicate

    def needs(stage: Stage) -> Iterator[str]:
        yield from (f"{prefix}{needed.name}" for needed in stage.needs if needed in missing)
        shared = pipeline.shared(stage)
        if replicate is not None and shared is not None and not shared.is_done():
            yield f"{replicate.folder.name} {shared.name}"

    return [
        Task(
            f"{prefix}{stage.name}",
            partial(run_only, pipeline.recipe, stage.name, None if replicate is None else replicate.recipe),
            frozenset(needs(stage)),
        )
        for stage in missing
    ]
