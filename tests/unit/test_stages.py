"""A stage is finished or absent, and nothing that was made is made twice, wherever it is interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cocomix import files
from cocomix.stages import CLAIM_FILE, RECORD_FILE, Made, Stage


class Killed(BaseException):
    """In place of SIGKILL: nothing after it is done."""


@pytest.fixture
def made() -> list[str]:
    """What was made, in order."""
    return []


@pytest.fixture(params=[False, True], ids=["by one process", "together"])
def stage(tmp_path: Path, made: list[str], request: pytest.FixtureRequest) -> Stage:
    folder = tmp_path / "sae"

    def make() -> Made:
        made.append("sae")
        unfinished = files.partial(folder)
        files.write_text(unfinished / "weights", "all")
        for name in ("checkpoint-6", "checkpoint-12.partial"):
            (unfinished / name).mkdir(exist_ok=True)
            (unfinished / name / "state").touch()
        return Made("the fingerprint", {"figure": 1})

    return Stage("sae", folder, {"d_sae": 8}, (), make, together=request.param)


def assert_finished(stage: Stage) -> None:
    assert sorted(path.name for path in stage.folder.iterdir()) == [RECORD_FILE, "weights"]
    assert stage.record().fingerprint == "the fingerprint" and stage.record().summary == {"figure": 1}
    assert not files.partial(stage.folder).exists()
    assert stage.problems() == []


def test_a_finished_folder_holds_the_result_and_no_checkpoints(stage, made):
    stage.run()
    assert_finished(stage)
    stage.run()
    assert made == ["sae"]


@pytest.mark.parametrize(
    ("killed_in", "times_made"),
    [("write_json", 2), ("rmtree", 1), ("finish", 1), ("unlink", 1)],
    ids=["before the record", "among the checkpoints", "before it has its name", "before the claim is gone"],
)
def test_killed_at_the_end_it_is_finished_by_the_next_run(stage, made, monkeypatch, killed_in, times_made):
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
            stage.run()
    stage.run()
    if killed_in == "unlink":  # finished as far as anyone can tell: an unused file is left
        (stage.folder / CLAIM_FILE).unlink()
    assert_finished(stage)
    assert len(made) == times_made


def test_what_was_begun_with_other_settings_is_thrown_away(stage, tmp_path, made):
    unfinished = files.partial(stage.folder)
    unfinished.mkdir()
    files.write_json(unfinished / CLAIM_FILE, {"settings": {"d_sae": 16}, "inputs": {}})
    (unfinished / "left-over").touch()
    stage.run()
    assert_finished(stage)


def test_a_folder_made_with_other_settings_is_named_and_kept(stage):
    stage.run()
    other = Stage("sae", stage.folder, {"d_sae": 16}, (), stage.make)
    assert other.problems() == [
        f"{stage.folder} was made by a different recipe: d_sae is 8 there, 16 here; choose another output folder, "
        "or delete this one to make it anew"
    ]
