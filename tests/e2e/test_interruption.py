"""SIGKILL in the middle of any stage costs time and nothing else."""

from __future__ import annotations

import json
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

import forked
from tiny_run import Runner

MIDDLE_OF = {
    "corpus": "corpus.partial*",
    "teacher": "teacher.partial/checkpoint-*",
    "sae": "sae.partial/checkpoint-*[0-9]",
    "labels": "labels.partial/shards/train-00000-of-?????.json",
    "ntp": "students/ntp.partial/checkpoint-*",
    "cocomix": "students/cocomix.partial/checkpoint-*",
}
"""What has appeared in the output folder when a stage has begun and not ended."""


def start(runner: Runner, output: Path) -> BaseProcess:
    arguments = ["run", str(runner.recipe), "--output", str(output)]
    return forked.start(forked.command, arguments, log=output.parent / "log")


def kill_when(process: BaseProcess, output: Path, pattern: str) -> None:
    deadline = time.monotonic() + 120
    while not list(output.glob(pattern)):
        assert process.is_alive(), f"ended before {pattern} appeared: {(output.parent / 'log').read_text()}"
        assert time.monotonic() < deadline, f"{pattern} did not appear"
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_killed_in_every_stage_ends_with_the_same_metrics(finished: Runner, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    for stage, pattern in MIDDLE_OF.items():
        kill_when(start(finished, output), output, pattern)
        assert not (output / "report").exists()
        if stage == "sae":  # after one of its 32 steps, each of which ends with a checkpoint, and before the last
            assert not (output / "sae.partial" / "checkpoint-32").exists()
        if stage == "labels":
            shard = next((output / "labels.partial" / "train").glob("data-00000-of-?????.arrow"))
            first_shard_made = shard.stat().st_mtime_ns
    assert forked.exit_codes(start(finished, output)) == [0], (tmp_path / "log").read_text()

    undisturbed = json.loads((finished.folder / "out" / "report" / "results.json").read_text())
    results = json.loads((output / "report" / "results.json").read_text())
    assert "already finished" in (tmp_path / "log").read_text()
    for name, student in undisturbed["students"].items():
        for key in ("metrics", "curve", "tokens", "stored_parameters", "training_flops"):
            assert results["students"][name][key] == student[key], f"{name}: {key}"
    (shard,) = (output / "labels" / "train").glob("data-00000-of-?????.arrow")
    assert shard.stat().st_mtime_ns == first_shard_made  # finished before the kill, so not made again
    for stage in ("corpus", "sae", "labels"):
        assert results[stage] == undisturbed[stage]
    assert results["teacher"]["metrics"] == undisturbed["teacher"]["metrics"]
    for part in ("comparisons", "showcase"):
        assert results[part] == undisturbed[part]
    assert not list(output.rglob("*.partial"))


def test_a_cut_off_checkpoint_is_not_resumed_from(recipe, tmp_path: Path) -> None:
    runner = recipe(students={"ntp": {"method": "ntp"}})
    output = tmp_path / "out"
    kill_when(start(runner, output), output, "students/ntp.partial/checkpoint-8/complete")
    (checkpoint,) = (output / "students" / "ntp.partial").glob("checkpoint-8")
    (checkpoint / "complete").unlink()
    (checkpoint / "model.safetensors").write_bytes(b"cut off")
    assert runner("run") == 0
    assert (output / "students" / "ntp" / "run.json").is_file()


def test_killed_after_the_last_step_trains_no_further(finished: Runner, recipe, tmp_path: Path) -> None:
    """The last checkpoint is complete, its results are not recorded yet."""
    done = {"max_tokens": 7680, "tokens_per_evaluation": 2560}
    runner = recipe(students={"ntp": {"method": "ntp"}}, training=done)
    assert runner("run") == 0
    undisturbed = json.loads((tmp_path / "out" / "report" / "results.json").read_text())["students"]["ntp"]
    output = tmp_path / "again"
    kill_when(start(runner, output), output, "students/ntp.partial/checkpoint-15/complete")
    assert runner("run", "--output", str(output)) == 0
    again = json.loads((output / "report" / "results.json").read_text())["students"]["ntp"]
    assert again["curve"] == undisturbed["curve"]
    assert [point["tokens"] for point in again["curve"]] == [2560, 5120, 7680]


@pytest.fixture(autouse=True)
def one_thread_like_the_processes() -> None:
    """Sums depend on the number of threads in their last bit; `finished` runs with one as well."""
    import torch

    assert torch.get_num_threads() == 1
