"""Complete older records, which omit settings that had the default value, with the defaults of their time.

Current records hold every setting, so these functions return them unchanged. The values below are the defaults of the
last version that omitted settings; they do not change when a default changes.
"""

from __future__ import annotations

from typing import Any

from cocomix.common import portable
from cocomix.models.building import BackboneConfig, default_options
from cocomix.training.config import default_tokens_per_evaluation

MIXER = {
    "insert_layer": 3,
    "content": "concepts",
    "num_active_concepts": 32,
    "mixing": "interleave",
    "concept_slot": "residual",
    "slot_positions": "interleaved",
    "concept_loss_weight": 1.0,
    "regression_loss": "l2",
}
DISTILLATION = {"weight": 0.1, "temperature": 1.0, "top_k": None}
ADDED_TO_MIXER = {"concept_loss_schedule": None}
ADDED_TO_DISTILLATION = {"weight_schedule": None}
ADDED_TO_CORPUS = {"sources": None}
ADDED_TO_TRAINING = {"optimizer": "adamw"}
ADDED_TO_LABELS = {"offset": 0, "window": 0, "control": "none", "targets": "uniform"}
"""Settings that did not exist when older records were written."""
TOKENS_PER_EVALUATION = 200_000
"""Before the default was a tenth of the training tokens."""
STUDENT_LABELS = ("selection", "labels_per_token", *ADDED_TO_LABELS)
NUM_FUTURE_TOKENS = 2
MAX_ACTIVE = 256
SAE_LEARNING_RATE = 1e-3
AUXILIARY_LOSS_WEIGHT = {"topk": 1.0, "batchtopk": 1.0, "jumprelu": 1 / 32}
"""By architecture; SAELens, with which SAEs were trained, has another unit, and jumprelu no such loss."""


def complete_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a run with every setting; ValueError if it is not a recipe."""
    try:
        found = portable.recipe_record(recipe)
        completed = {"students": complete_students(found), "sae": _sae(found["sae"])}
        training = {**ADDED_TO_TRAINING, **found["training"]}
        labels = {**ADDED_TO_LABELS, **found["labels"]}
        completed |= {"teacher": _teacher(found["teacher"]), "training": training, "labels": labels}
        return {**found, **completed}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its recipe is damaged ({type(error).__name__}: {error})") from None


def complete_students(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the students of a run's or report's recipe with every setting."""
    return {
        name: _student(student, recipe["backbone"], recipe["training"]["learning_rate"], recipe["labels"])
        for name, student in recipe["students"].items()
    }


def complete_settings(recorded: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a stage's record with every setting of a current record; damaged ones unchanged.

    If a student used the labels of its recipe, they are taken from `wanted`: the student's inputs identify them.
    """
    try:
        return _complete_settings(recorded, wanted)
    except (AttributeError, KeyError, TypeError):
        return recorded


def _complete_settings(recorded: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    found = portable.recipe_record(recorded)
    if "corpus" in found:
        found["corpus"] = {**ADDED_TO_CORPUS, **found["corpus"]}
    if "teacher" in found:
        found["teacher"] = _teacher(found["teacher"])
        found["teacher"]["training"] = _evaluated(found["teacher"]["training"], wanted["teacher"]["training"])
    if "labels" in found:
        found["labels"] = {**ADDED_TO_LABELS, **found["labels"]}
    if "sae" in found:
        found["sae"] = _finished_sae(found["sae"], wanted["sae"])
    if "student" in found:
        backbone = found.pop("backbone", None)
        labels = wanted["student"]["labels"]
        found["student"] = _student(found["student"], backbone, found["training"]["learning_rate"], labels)
        found["training"] = _evaluated({**ADDED_TO_TRAINING, **found["training"]}, wanted["training"])
        if found["match"] is not None:
            found["match"] = _student(found["match"], backbone, None, (wanted["match"] or {}).get("labels"))
    return found


def _student(
    student: dict[str, Any], backbone: Any, learning_rate: float | None, labels: dict[str, Any] | None
) -> dict[str, Any]:
    method, found = student["method"], dict(student)
    if method in ("cocomix", "pause"):
        found["mixer"] = found.get("mixer") or dict(MIXER)
    if method == "cocomix" and found["mixer"]["content"] == "concepts" and labels is not None:
        own = {key: value for key, value in (found.get("labels") or {}).items() if value is not None}
        completed = {**ADDED_TO_LABELS, **labels, **own}
        found["labels"] = {key: completed[key] for key in STUDENT_LABELS}
    if method == "kd":
        found["distillation"] = found.get("distillation") or dict(DISTILLATION)
    for key, added in (("mixer", ADDED_TO_MIXER), ("distillation", ADDED_TO_DISTILLATION)):
        if found.get(key) is not None:
            found[key] = {**added, **found[key]}
    if method == "mtp":
        found["num_future_tokens"] = found.get("num_future_tokens") or NUM_FUTURE_TOKENS
    found["training"] = found.get("training")
    found["branch_from"], found["gate"] = found.get("branch_from"), found.get("gate")
    found["learning_rate"] = found.get("learning_rate") or learning_rate
    found["backbone"] = _backbone(found["backbone"] or backbone, widened=found["match"] is not None)
    return found


def _teacher(teacher: dict[str, Any]) -> dict[str, Any]:
    found = {**teacher, "training": {**ADDED_TO_TRAINING, **teacher["training"]}}
    found["untrained"] = teacher.get("untrained", False)
    if teacher["source"]:
        return found
    return {**found, "backbone": _backbone(teacher["backbone"]), "precision": teacher["precision"] or "fp32"}


def _evaluated(training: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Complete the record of a training. One that was evaluated by the default of its time fits today's default."""
    default = default_tokens_per_evaluation(wanted["max_tokens"])
    if (training["tokens_per_evaluation"], wanted["tokens_per_evaluation"]) == (TOKENS_PER_EVALUATION, default):
        return {**training, "tokens_per_evaluation": default}
    return training


def _backbone(backbone: dict[str, Any], widened: bool = False) -> dict[str, Any]:
    if backbone.get("source"):
        return backbone
    return {**backbone, "options": {**default_options(BackboneConfig(**backbone), widened), **backbone["options"]}}


def _sae(sae: dict[str, Any]) -> dict[str, Any]:
    found = {**sae, "max_active": sae["max_active"] or MAX_ACTIVE}
    if "auxiliary_loss_weight" not in sae:
        found["auxiliary_loss_weight"] = AUXILIARY_LOSS_WEIGHT[sae["architecture"]]
    return found


def _finished_sae(sae: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Complete the record of an SAE. One that was trained with the defaults of its time fits today's defaults."""
    found = _sae(sae)
    if "auxiliary_loss_weight" not in sae:
        found["auxiliary_loss_weight"] = wanted["auxiliary_loss_weight"]
        if sae["learning_rate"] == SAE_LEARNING_RATE:
            found["learning_rate"] = wanted["learning_rate"]
    return found
