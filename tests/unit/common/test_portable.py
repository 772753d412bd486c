"""Records name no folder of this machine beyond what is needed to run a recipe again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cocomix.common import portable
from cocomix.models.building import BackboneConfig
from cocomix.pipeline.methods import StudentConfig
from cocomix.pipeline.recipe import Recipe
from cocomix.pipeline.recipe_file import recipe_of_run


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, and a working folder elsewhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_a_short_path_is_relative_to_the_working_folder_or_only_a_name(places: Path) -> None:
    assert portable.short(places / "work" / "data" / "a.txt") == "data/a.txt"
    assert portable.short(places / "home" / "a.txt") == portable.short("~/a.txt") == "a.txt"
    assert portable.short(f"hf:{places}/home/set:train") == "hf:set:train"
    for other in ("../a.txt", "openai-community/gpt2", "python-stdlib", "saelens:release/id", "--until"):
        assert portable.short_argument(other) == portable.short(other) == other
    assert portable.short_argument(f"--output={places}/home/x") == "--output=x"


def test_above_the_home_folder_a_path_is_only_a_name(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(places)
    assert portable.short(places / "home" / "runs" / "x") == "x"


def test_a_path_in_the_home_folder_is_recorded_with_a_tilde(places: Path) -> None:
    assert portable.with_tilde(f"{places}/home/text") == "~/text"
    assert portable.with_tilde(f"hf:{places}/home/set") == "hf:~/set"
    for other in (f"{places}/homes/text", "text", "~/text", "/"):
        assert portable.with_tilde(other) == other


def test_paths_with_the_same_name_are_told_apart_from_their_common_folder(places: Path) -> None:
    elsewhere = [places / name / "students" / "kd" for name in ("one", "two")]
    assert portable.short_apart(elsewhere) == ["one/students/kd", "two/students/kd"]
    assert portable.short_apart([Path("one/kd"), Path("two/kd")]) == ["one/kd", "two/kd"]
    assert portable.short_apart([elsewhere[0], places / "three" / "runs" / "kd"]) == ["students/kd", "runs/kd"]


def test_a_recipe_keeps_what_is_needed_to_run_it_again(places: Path) -> None:
    recipe = {
        "output": f"{places}/runs/x",
        "corpus": {"source": f"{places}/home/text", "validation_source": "held-out"},
    }
    assert portable.recipe_record(recipe) == {
        "output": "x",
        "corpus": {"source": "~/text", "validation_source": "held-out"},
    }


def test_the_recipe_of_a_run_finds_again_what_it_reads(places: Path) -> None:
    home = places / "home"
    backbone = BackboneConfig(source=f"{home}/model")
    recipe = Recipe("x", "out", backbone=backbone, students={"own": StudentConfig("ntp", backbone=backbone)})
    recipe.corpus.source, recipe.teacher.source = f"{home}/text", "openai-community/gpt2"
    recorded = recipe.to_dict()
    assert recorded["students"]["own"]["backbone"] == recorded["backbone"] == {"source": "~/model"}
    assert str(places) not in json.dumps(recorded)
    found = recipe_of_run(recorded, Path("out"))
    assert (found.corpus.source, found.teacher.source) == (recipe.corpus.source, recipe.teacher.source)
    assert found.backbone == found.students["own"].backbone == backbone
