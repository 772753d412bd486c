"""SIGKILL at random moments, and signals to two processes: the recipe ends as the undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked
from every_stage import result, small_recipe
from tiny_run import write_text

pytestmark = pytest.mark.reliability
KILLS = 50
"""For each number of processes."""
SURVIVOR_SECONDS = 60
STAGES = ("corpus", "teacher", "sae", "labels", "predictions-top-5-temperature-1.0", "catalog", "ntp", "cocomix", "kd")


def start(processes: int, recipe: Path, output: Path) -> list[BaseProcess]:
    """Start the catalog and everything else of the recipe."""
    each = [[name, str(recipe), "--output", str(output)] for name in ("concepts", "run")]
    log = output.parent / "log"
    if processes == 1:
        return [forked.start(forked.commands, each, log=log)]
    return forked.start_several(processes, forked.commands, each, log=log)


def found(output: Path, pattern: str) -> list[Path]:
    """The files of this pattern; none while a folder is being renamed."""
    try:
        return list(output.rglob(pattern))
    except FileNotFoundError:
        return []


def place(output: Path) -> str:
    """The stage that is being computed."""
    for stage in STAGES:
        if found(output, f"{stage}.partial"):
            return stage
    return "report" if (output / "students" / "kd").exists() else "before or between stages"


def kill(processes: list[BaseProcess], victim: int) -> float:
    """Kill one process; return the seconds until the others have ended.

    One that still waits for the first connection does not notice; a launcher terminates it, as torchrun would.
    """
    processes[victim].kill()
    start = time.monotonic()
    for ended in (lambda each: None, BaseProcess.terminate, BaseProcess.kill):
        for process in processes:
            ended(process)
            process.join(SURVIVOR_SECONDS / 4)
    assert not any(process.is_alive() for process in processes)
    return time.monotonic() - start


def undisturbed(processes: int, folder: Path) -> tuple[Path, dict[str, Any], float]:
    """Run the recipe to its end; return its file, its result, and the seconds it took. The output is deleted."""
    output, recipe = folder / "out", folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(write_text(folder / "text", documents=120), output)))
    began = time.monotonic()
    assert forked.exit_codes(*start(processes, recipe, output)) == [0] * processes, (folder / "log").read_text()
    seconds, expected = time.monotonic() - began, result(output)
    shutil.rmtree(output)
    return recipe, expected, seconds


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    recipe, expected, duration = undisturbed(processes, tmp_path)
    choose, killed, runs, longest = random.Random(processes), Counter[str](), 0, 0.0
    began = time.monotonic()
    while killed.total() < KILLS or output.exists():
        started = start(processes, recipe, output)
        moment = time.monotonic() + duration / 2 * choose.random() ** 2
        while any(process.is_alive() for process in started) and (killed.total() == KILLS or time.monotonic() < moment):
            time.sleep(0.01)
        if all(process.is_alive() for process in started):
            killed[place(output)] += 1
            longest = max(longest, kill(started, choose.randrange(processes)))
            continue
        assert forked.exit_codes(*started) == [0] * processes, (tmp_path / "log").read_text()
        assert result(output) == expected
        assert "Traceback" not in (tmp_path / "log").read_text()
        runs, duration, began = runs + 1, time.monotonic() - began, time.monotonic()  # machines slow down and recover
        shutil.rmtree(output)
        with capsys.disabled():
            print(f"{processes} processes, {runs} runs, {killed.total()} kills: {dict(killed)}; {longest:.1f} s to end")


def test_signals_end_two_processes(tmp_path: Path) -> None:
    """A scheduler sends them to both. One may notice first that the other has ended; both end soon, and resume."""
    output = tmp_path / "out"
    recipe, expected, _ = undisturbed(2, tmp_path)
    for number, stage in ((signal.SIGINT, "teacher"), (signal.SIGTERM, "cocomix"), (signal.SIGHUP, "ntp")):
        started = start(2, recipe, output)
        while not found(output, f"{stage}.partial/checkpoint-*/complete"):
            assert all(process.is_alive() for process in started), (tmp_path / "log").read_text()
            time.sleep(0.01)
        for process in started:
            os.kill(process.pid or 0, number)
        for process in started:
            process.join(SURVIVOR_SECONDS)
        codes = [process.exitcode for process in started]
        assert 128 + number in codes and set(codes) <= {128 + number, 2, 1}, codes
    told = (tmp_path / "log").read_text()
    assert "to resume, run: " in told and "Traceback" not in told
    assert forked.exit_codes(*start(2, recipe, output)) == [0, 0], told
    assert result(output) == expected
