"""A stage is finished or absent, and nothing is computed twice, wherever it is interrupted."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cocomix.common import files
from cocomix.common.errors import InputError
from cocomix.common.integrity import SUMS_FILE
from cocomix.pipeline.stage import CLAIM_FILE, RECORD_FILE, Stage, StageResult


class Killed(BaseException):
    """In place of SIGKILL: nothing after it is done."""


Run = Callable[..., None]


@pytest.fixture
def computed() -> list[str]:
    """Names of the stages that were computed, in order."""
    return []


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    return Stage("sae", "sae", tmp_path / "sae", {"d_sae": 8})


@pytest.fixture(params=[False, True], ids=["on rank 0", "on all ranks"])
def run(computed: list[str], request: pytest.FixtureRequest) -> Run:
    def make(unfinished: Path) -> StageResult:
        computed.append("sae")
        files.write_text(unfinished / "weights", "all")
        for name in ("checkpoint-6", "checkpoint-12.partial"):
            (unfinished / name).mkdir(exist_ok=True)
            (unfinished / name / "state").touch()
        return StageResult("the fingerprint", {"figure": 1})

    def run(stage: Stage, make: Callable[[Path], StageResult] = make, resumes: bool = True) -> None:
        stage.run(make, resumes=resumes, on_all_ranks=request.param)

    return run


def assert_finished(stage: Stage) -> None:
    assert sorted(path.name for path in stage.folder.iterdir()) == [SUMS_FILE, RECORD_FILE, "weights"]
    assert stage.record().fingerprint == "the fingerprint" and stage.record().summary == {"figure": 1}
    assert not files.partial(stage.folder).exists()
    assert stage.problems() == []


def test_a_finished_folder_holds_the_result_and_no_checkpoints(stage, run, computed):
    run(stage)
    assert_finished(stage)
    run(stage)
    assert computed == ["sae"]


@pytest.mark.parametrize(
    ("killed_in", "times_made"),
    [("write_json", 2), ("rmtree", 1), ("finish", 1), ("unlink", 1)],
    ids=["before the record", "among the checkpoints", "before it has its name", "before the claim is gone"],
)
def test_killed_at_the_end_it_is_finished_by_the_next_run(stage, run, computed, monkeypatch, killed_in, times_made):
    def kill(*args, **kwargs):
        raise Killed

    with monkeypatch.context() as patched:
        if killed_in == "write_json":  # the claim is written so too, and before
            write = files.write_json
            patched.setattr(files, "write_json", lambda path, c: kill() if path.name == RECORD_FILE else write(path, c))
        elif killed_in == "rmtree":
            patched.setattr(shutil, "rmtree", kill)
        elif killed_in == "finish":
            patched.setattr(files, "finish", kill)
        else:
            patched.setattr(Path, "unlink", kill)
        with pytest.raises(Killed):
            run(stage)
    run(stage)
    if killed_in == "unlink":  # finished as far as anyone can tell: an unused file is left
        (stage.folder / CLAIM_FILE).unlink()
    assert_finished(stage)
    assert len(computed) == times_made


def test_what_was_begun_with_other_settings_is_thrown_away(stage, run, tmp_path, computed):
    unfinished = files.partial(stage.folder)
    unfinished.mkdir()
    files.write_json(unfinished / CLAIM_FILE, {"settings": {"d_sae": 16}, "inputs": {}})
    (unfinished / "left-over").touch()
    run(stage)
    assert_finished(stage)


def test_a_folder_made_with_other_settings_is_named_and_kept(stage, run):
    run(stage)
    other = dataclasses.replace(stage, settings={"d_sae": 16})
    assert other.problems() == [
        f"{stage.folder} was written by a different recipe: d_sae is 8 there, 16 here; choose another output folder, "
        "or delete this one to compute it again"
    ]


def test_settings_of_memory_and_speed_leave_a_finished_folder_finished(stage, run, computed):
    stage = dataclasses.replace(stage, settings={"training": {"blocks_per_batch": 16, "learning_rate": 0.1}})
    run(stage)
    other = dataclasses.replace(stage, settings={"training": {"blocks_per_batch": 4, "learning_rate": 0.1}})
    assert other.problems() == []
    assert other.idle_changes() == ["training.blocks_per_batch is 16 there, 4 here"]
    run(other)
    assert computed == ["sae"] and other.record().settings == stage.settings
    (problem,) = dataclasses.replace(other, settings={"training": {"learning_rate": 0.2}}).problems()
    assert "training.learning_rate is 0.1 there, 0.2 here" in problem and "blocks_per_batch" not in problem


def test_what_another_program_left_is_named_and_kept(stage, computed):
    unfinished = files.partial(stage.folder)
    unfinished.mkdir()
    (unfinished / "thesis.tex").touch()
    assert stage.problems() == [f"{unfinished} exists and was not created by cocomix; choose another output folder"]
    (unfinished / "thesis.tex").rename(stage.folder.parent / "thesis.tex")
    assert stage.problems() == []  # nothing is in it
    unfinished.rmdir()
    unfinished.symlink_to(stage.folder.parent)
    assert stage.problems() == [f"{unfinished} is not a folder; move it away, or choose another output folder"]
    unfinished.unlink()
    stage.folder.symlink_to("nowhere")
    assert stage.problems() == [f"{stage.folder} exists and was not created by cocomix; choose another output folder"]


def test_a_damaged_claim_is_named_and_its_folder_kept(stage, run, computed):
    unfinished = files.partial(stage.folder)
    unfinished.mkdir()
    (unfinished / CLAIM_FILE).write_text("{")
    for refused in (stage.problems, lambda: run(stage)):
        with pytest.raises(InputError, match=rf"{CLAIM_FILE} is damaged: .*; delete .*sae\.partial to compute sae"):
            refused()
    assert not computed and (unfinished / CLAIM_FILE).read_text() == "{"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[1]", '{"settings": {}}', '{"settings": 1, "inputs": {}, "fingerprint": "f", "summary": {}}'],
)
def test_a_damaged_record_is_named(stage, content):
    stage.folder.mkdir()
    (stage.folder / RECORD_FILE).write_text(content)
    with pytest.raises(InputError, match=rf"sae/{RECORD_FILE} .*; delete .*sae to compute sae again"):
        stage.problems()


def test_what_cannot_be_continued_begins_from_an_empty_folder(stage, run, computed):
    files.partial(stage.folder).mkdir()
    files.write_json(files.partial(stage.folder) / CLAIM_FILE, {"settings": {"d_sae": 8}, "inputs": {}})
    (files.partial(stage.folder) / "left-over").touch()
    run(stage, resumes=False)
    assert_finished(stage)


def test_a_full_disk_is_said_in_a_line_and_the_next_run_continues(stage, run, computed):
    def full(folder: Path) -> StageResult:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    with pytest.raises(OSError, match="sae cannot be computed: No space left on device") as caught:
        run(stage, full)
    assert files.is_disk_full(caught.value) and caught.value.filename == str(stage.folder)
    run(stage)
    assert_finished(stage)
