"""Records hold every setting; older ones, which left defaults out, are read with the defaults of their time."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cocomix.concepts.labeling import LabelsConfig
from cocomix.models.building import BackboneConfig
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.methods import MixerConfig, StudentConfig, StudentLabels
from cocomix.pipeline.recipe import Recipe
from cocomix.reporting.report import settings_table
from cocomix.training.older_records import complete_recipe, complete_settings

GPT2 = {
    "tie_word_embeddings": True,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "summary_first_dropout": 0.0,
}
LLAMA = {"tie_word_embeddings": True, "attention_dropout": 0.0, "num_key_value_heads": 4, "intermediate_size": 344}
MIXER = {
    "insert_layer": 3,
    "content": "concepts",
    "num_active_concepts": 32,
    "mixing": "interleave",
    "concept_slot": "residual",
    "slot_positions": "interleaved",
    "concept_loss_weight": 1.0,
    "concept_loss_schedule": None,
    "regression_loss": "l2",
}


LEFT_OUT = MixerConfig(concept_slot="residual", concept_loss_weight=1.0)
"""The mixer that older recipes left out: the defaults of their time."""


def recipe() -> Recipe:
    students = {
        "ntp": StudentConfig("ntp", match="cocomix"),
        "kd": StudentConfig("kd"),
        "mtp": StudentConfig("mtp"),
        "pause": StudentConfig("pause", mixer=LEFT_OUT),
        "cocomix": StudentConfig("cocomix", mixer=LEFT_OUT),
        "llama": StudentConfig("ntp", BackboneConfig("llama"), learning_rate=0.01),
        "own": StudentConfig("cocomix", mixer=MixerConfig(mixing="add"), labels=StudentLabels(labels_per_token=2)),
    }
    return Recipe("tiny", "out", labels=LabelsConfig(selection="activation"), students=students)


def without_optimizer(training: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key != "optimizer"}


def without_mixers(record: dict[str, Any]) -> dict[str, Any]:
    """The record of a recipe or student as the recipe left it out."""
    if record.get("mixer") == dataclasses.asdict(LEFT_OUT):
        return {**record, "mixer": None}
    return {k: without_mixers(v) if isinstance(v, dict) else v for k, v in record.items()}


LATER = {"concept_loss_schedule", "weight_schedule", "offset", "window", "control", "targets", "untrained"}


def without_later(record: dict[str, Any]) -> dict[str, Any]:
    """A record without the settings that were added after records came to hold every setting."""
    return {k: without_later(v) if isinstance(v, dict) else v for k, v in record.items() if k not in LATER}


def left_out_settings() -> dict[str, Any]:
    """The recipe as older versions wrote it."""
    settings = without_mixers(dataclasses.asdict(recipe()))
    del settings["sae"]["auxiliary_loss_weight"]
    settings["sae"]["learning_rate"] = 1e-3
    settings["training"] = without_optimizer(settings["training"])
    settings["teacher"]["training"] = without_optimizer(settings["teacher"]["training"])
    settings["labels"]["blocks_per_batch"] = 16
    return settings


def older(settings: dict[str, Any], recipe: Recipe, name: str) -> dict[str, Any]:
    """Settings of a student's stage as the version before wrote them."""
    student = recipe.students[name]
    matched = recipe.students.get(student.match or "")
    return {
        **settings,
        "training": without_optimizer(settings["training"]),
        "student": without_mixers(dataclasses.asdict(student)),
        "match": matched and without_mixers(dataclasses.asdict(dataclasses.replace(matched, learning_rate=None))),
        "backbone": dataclasses.asdict(recipe.backbone),
    }


def test_a_record_holds_what_the_recipe_leaves_out() -> None:
    students = recipe().to_dict()["students"]
    assert students["cocomix"]["mixer"] == students["pause"]["mixer"] == MIXER
    assert students["cocomix"]["labels"] == {
        "selection": "activation",
        "labels_per_token": 4,
        "offset": 0,
        "window": 0,
        "control": "none",
        "targets": "uniform",
    }
    assert students["kd"]["distillation"] == {
        "weight": 0.1,
        "temperature": 1.0,
        "top_k": None,
        "weight_schedule": None,
    }
    assert students["mtp"]["num_future_tokens"] == 2
    assert students["cocomix"]["learning_rate"] == 1e-3
    assert students["cocomix"]["backbone"]["options"] == GPT2
    assert students["llama"]["backbone"]["options"] == LLAMA
    assert students["ntp"]["mixer"] is students["ntp"]["labels"] is students["ntp"]["distillation"] is None


@pytest.mark.parametrize("name", recipe().students)
def test_a_stage_recognizes_the_same_settings_in_an_older_record(name: str) -> None:
    stage = Pipeline(recipe()).student_stages[name, 0]
    assert complete_settings(stage.settings, stage.settings) == stage.settings
    without_student_training = {**stage.settings, "student": {**stage.settings["student"]}}
    del without_student_training["student"]["training"]
    assert complete_settings(without_later(without_student_training), stage.settings) == stage.settings
    assert complete_settings(older(stage.settings, recipe(), name), stage.settings) == stage.settings


@pytest.mark.parametrize(("wanted", "same"), [(500, True), (250, False)], ids=["default", "given"])
def test_a_training_evaluated_by_the_earlier_default_stays_finished(wanted: int, same: bool) -> None:
    training = {"max_tokens": 5000, "tokens_per_evaluation": wanted}
    settings = Pipeline(recipe()).student_stages["ntp", 0].settings
    settings = {**settings, "training": {**settings["training"], **training}}
    earlier = {**settings, "training": {**settings["training"], "tokens_per_evaluation": 200_000}}
    assert (complete_settings(earlier, settings) == settings) == same


def test_the_teacher_and_the_sae_of_an_older_record() -> None:
    pipeline = Pipeline(recipe())
    left_out = left_out_settings()
    for stage in (pipeline.teacher_stage, pipeline.sae_stage):
        recorded = {key: left_out[key] for key in stage.settings}
        assert complete_settings(recorded, stage.settings) == stage.settings
    for stage in (pipeline.teacher_stage, pipeline.labels_stage):
        assert complete_settings(without_later(stage.settings), stage.settings) == stage.settings


def test_an_older_sae_fits_the_defaults_of_today_and_no_other_learning_rate() -> None:
    tiny = recipe()
    tiny.sae.d_sae = 512
    recorded = {"sae": left_out_settings()["sae"] | {"d_sae": 512}, "seed": 0}
    wanted = Pipeline(tiny).sae_stage.settings
    assert wanted["sae"]["learning_rate"] == pytest.approx(2e-3)
    assert complete_settings(recorded, wanted) == wanted
    recorded["sae"]["learning_rate"] = 5e-3
    assert complete_settings(recorded, wanted)["sae"]["learning_rate"] == 5e-3
    tiny.sae.learning_rate = 1e-3  # a current record is compared as it is
    assert complete_settings(Pipeline(tiny).sae_stage.settings, wanted) != wanted


def test_the_recipe_of_an_older_run_is_read_as_what_it_was() -> None:
    left_out = left_out_settings()
    completed = complete_recipe(left_out)
    assert (completed["sae"].pop("learning_rate"), completed["sae"].pop("auxiliary_loss_weight")) == (1e-3, 1.0)
    today = recipe().to_dict()
    assert complete_recipe(without_later(today)) == complete_recipe(today) == today
    del today["sae"]["learning_rate"], today["sae"]["auxiliary_loss_weight"]
    assert completed == today
    del left_out["students"]["llama"]  # whose learning rate is its own: then all of them are shown
    assert settings_table(left_out) == settings_table(complete_recipe(left_out))


def test_a_default_that_changes_neither_passes_for_the_old_one_nor_changes_a_report(tmp_path: Path) -> None:
    before = dataclasses.replace(recipe(), output=str(tmp_path))
    del before.students["llama"]
    stage = Pipeline(before).student_stages["cocomix", 0]
    inputs = {needed.name: "" for needed in stage.needs}
    stage.folder.mkdir(parents=True)
    record = {"inputs": inputs, "fingerprint": "", "summary": {}}
    shown = settings_table(before.to_dict())
    today = dataclasses.replace(before, students={**before.students, "cocomix": StudentConfig("cocomix")})
    now = Pipeline(today).student_stages["cocomix", 0]
    for settings in (stage.settings, older(stage.settings, before, "cocomix")):
        (stage.folder / "stage.json").write_text(json.dumps({**record, "settings": settings}))
        assert stage.problems() == []
        (problem,) = now.problems()
        assert "student.mixer.concept_loss_weight is 1.0 there, 0.1 here" in problem
    assert settings_table(without_mixers(dataclasses.asdict(before))) == shown


@pytest.mark.parametrize(
    "damaged", [{}, {"student": {}}, {"student": None, "training": 1}, {"teacher": 3}, {"sae": {}}]
)
def test_damaged_settings_are_another_recipe_and_a_damaged_recipe_no_run(damaged: dict[str, Any]) -> None:
    stage = Pipeline(recipe()).student_stages["cocomix", 0]
    assert complete_settings(damaged, stage.settings) == damaged
    with pytest.raises(ValueError, match="its recipe is damaged"):
        complete_recipe(damaged)
