"""From a recipe's students to models and objectives."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig, PreTrainedModel

from cocomix.errors import InputError
from cocomix.models.building import (
    backbone_config,
    build_plain,
    count_parameters,
    match_parameters,
)
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.configuration import CoCoMixConfig
from cocomix.objectives import ConceptMixing, NextToken, Objective
from cocomix.recipe import MixerConfig, Recipe, StudentConfig

OBJECTIVES: dict[str, Objective] = {"ntp": NextToken(), "cocomix": ConceptMixing()}


def student_config(
    recipe: Recipe, name: str, *, vocab_size: int, eos_token_id: int, num_concepts: int
) -> PretrainedConfig:
    """Configuration of the student `name`, widened to its match if it has one.

    Raises:
        InputError: sizes or mixer settings that cannot be.
    """
    student = recipe.students[name]
    context = {"vocab_size": vocab_size, "block_size": recipe.block_size, "eos_token_id": eos_token_id}
    sizes = student.backbone or recipe.backbone
    if student.match is not None:
        matched = student_config(
            recipe, student.match, vocab_size=vocab_size, eos_token_id=eos_token_id, num_concepts=num_concepts
        )
        sizes = match_parameters(sizes, _activated(matched), **context)
    backbone = backbone_config(sizes, **context)
    if student.method != "cocomix":
        return backbone
    return _mixed(backbone, student, name, num_concepts)


def _mixed(backbone: PretrainedConfig, student: StudentConfig, name: str, num_concepts: int) -> CoCoMixConfig:
    mixer = student.mixer or MixerConfig()
    try:
        config = CoCoMixConfig(
            backbone_config=backbone,
            insert_layer=mixer.insert_layer,
            num_concepts=num_concepts,
            num_active_concepts=mixer.num_active_concepts,
            mixing=mixer.mixing,
            concept_slot=mixer.concept_slot,
            slot_positions=mixer.slot_positions,
            concept_loss_weight=mixer.concept_loss_weight,
        )
        with torch.device("meta"):
            CoCoMixForCausalLM(config)
    except ValueError as error:
        raise InputError(f"students.{name}: {error}") from None
    return config


def _activated(config: PretrainedConfig) -> int:
    if not isinstance(config, CoCoMixConfig):
        return count_parameters(config)
    with torch.device("meta"):
        return CoCoMixForCausalLM(config).num_activated_parameters()


def build_student(config: PretrainedConfig) -> PreTrainedModel:
    """A freshly initialised student (seeded by torch's generator)."""
    return CoCoMixForCausalLM(config) if isinstance(config, CoCoMixConfig) else build_plain(config)
