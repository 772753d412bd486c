"""SIGKILL at random moments of a recipe, by one and by two processes: it ends as the undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import yaml

import forked
from tiny_run import tiny_recipe, training, write_text

pytestmark = pytest.mark.reliability
KILLS = 50
"""For each number of processes."""
SURVIVOR_SECONDS = 60
MEASURED = ("timing", "second", "environment", "output")
"""Parts of the names of figures that differ between any two runs."""
DRAWN = ("state.json", "SHA256SUMS", "curves.png", "report.html", "report.md")
"""Files with random names of `datasets`, and files whose contents follow from others."""
STAGES = ("corpus", "teacher", "sae", "labels", "predictions-top-5-temperature-1.0", "catalog", "ntp", "cocomix", "kd")


def small_recipe(text: Path, output: Path) -> dict[str, Any]:
    """Every kind of stage, as short as possible."""
    recipe = tiny_recipe(text, output)
    short = {**training(4096), "tokens_per_evaluation": 1024}
    recipe["teacher"]["training"] = recipe["training"] = short
    recipe["sae"]["training_tokens"] = 4096
    recipe["students"]["kd"] = {"method": "kd", "distillation": {"top_k": 5}}
    recipe["catalog"] = {"contexts": 3}
    return recipe


def start(processes: int, recipe: Path, output: Path) -> list[BaseProcess]:
    """Start the catalog and everything else of the recipe."""
    each = [[name, str(recipe), "--output", str(output)] for name in ("concepts", "run")]
    log = output.parent / "log"
    if processes == 1:
        return [forked.start(forked.commands, each, log=log)]
    return forked.start_several(processes, forked.commands, each, log=log)


def result(output: Path) -> dict[str, Any]:
    """Everything that must be equal: the bytes of files, and the figures in JSON files."""
    found: dict[str, Any] = {}
    for path in sorted(
        path for path in output.rglob("*") if path.is_file() and path.name not in DRAWN and path.suffix != ".lock"
    ):
        name = path.relative_to(output).as_posix()
        found[name] = figures(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()
    return found


def figures(value: Any) -> Any:
    """The figures of a record that do not measure time or name the machine."""
    if isinstance(value, dict):
        return {key: figures(inner) for key, inner in value.items() if not any(word in key for word in MEASURED)}
    return [figures(inner) for inner in value] if isinstance(value, list) else value


def place(output: Path) -> str:
    """The stage that is being computed."""
    for stage in STAGES:
        if list(output.rglob(f"{stage}.partial")):
            return stage
    return "report" if (output / "students" / "kd").exists() else "before or between stages"


def kill(processes: list[BaseProcess], victim: int) -> float:
    """Kill one process; return the seconds until the others have ended."""
    processes[victim].kill()
    start = time.monotonic()
    for process in processes:
        process.join(SURVIVOR_SECONDS)
        assert not process.is_alive(), f"still runs {SURVIVOR_SECONDS} seconds after another was killed"
    return time.monotonic() - start


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(processes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe(write_text(tmp_path / "text", documents=120), output)))
    began = time.monotonic()
    assert forked.exit_codes(*start(processes, recipe, output)) == [0] * processes, (tmp_path / "log").read_text()
    duration, expected = time.monotonic() - began, result(output)
    shutil.rmtree(output)

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
