"""Build the models of a recipe's students."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from cocomix.common.errors import InputError
from cocomix.models.building import (
    BackboneConfig,
    activated_parameters,
    backbone_config,
    build_plain,
    match_parameters,
    pretrained_config,
)
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.configuration import CoCoMixConfig
from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM
from cocomix.pipeline.methods import METHODS, StudentConfig
from cocomix.pipeline.recipe import Recipe


class StudentContext(NamedTuple):
    """What a student's sizes depend on, in addition to the recipe."""

    vocab_size: int
    eos_token_id: int
    num_concepts: int
    """C, number of concepts; 0 if no student learns concepts."""
    teacher_hidden_size: int
    """d, width of the teacher's residual stream."""


def student_config(recipe: Recipe, name: str, context: StudentContext) -> PretrainedConfig:
    """Return the configuration of the student `name`, widened if it is matched to another student.

    Raises:
        InputError: sizes or settings are impossible.
    """
    student = recipe.students[name]

    def checked(backbone: PretrainedConfig) -> PretrainedConfig:
        try:
            return _model_config(student, backbone, context, pretrained=sizes.source is not None)
        except ValueError as error:
            raise InputError(f"students.{name}: {error}") from None

    def config_of(sizes: BackboneConfig) -> PretrainedConfig:
        backbone = backbone_config(
            sizes, vocab_size=context.vocab_size, block_size=recipe.block_size, eos_token_id=context.eos_token_id
        )
        return checked(backbone)

    sizes = student.backbone or recipe.backbone
    if sizes.source is not None:
        return checked(pretrained_config(sizes.source, recipe.block_size))
    if student.match is not None:
        target = _activated(student_config(recipe, student.match, context))
        sizes = match_parameters(sizes, target, lambda wider: _activated(config_of(wider)))
    return config_of(sizes)


def start_from(config: PretrainedConfig, pretrained: PreTrainedModel, name: str) -> PreTrainedModel:
    """Return the student `name` with the weights of `pretrained` and, before training, the same predictions.

    Raises:
        InputError: the pretrained model cannot be split, or the student's predictions would differ.
    """
    if not isinstance(config, CoCoMixConfig):
        return pretrained
    try:
        return CoCoMixForCausalLM.retrofit(pretrained, config)
    except ValueError as error:
        raise InputError(f"students.{name}: {error}") from None


def _model_config(
    student: StudentConfig, backbone: PretrainedConfig, context: StudentContext, pretrained: bool
) -> PretrainedConfig:
    """Return the configuration of the student's model; ValueError if its settings are impossible."""
    config: PretrainedConfig = backbone
    mixer = student.mixer_config()
    if (future_tokens := student.future_tokens()) is not None:
        config = MultiTokenConfig(backbone, num_future_tokens=future_tokens)
    elif mixer is not None:
        content = METHODS[student.method].content or mixer.content
        mixer = mixer.for_pretrained() if pretrained else mixer
        config = CoCoMixConfig(
            backbone_config=backbone,
            insert_layer=mixer.insert_layer,
            content=content,
            num_concepts=context.num_concepts,
            num_active_concepts=mixer.num_active_concepts,
            mixing=mixer.mixing,
            concept_slot=mixer.concept_slot,
            slot_positions=mixer.slot_positions,
            slot_attention="pair" if pretrained and mixer.mixing == "interleave" else "causal",
            concept_loss_weight=mixer.concept_loss_weight,
            teacher_hidden_size=context.teacher_hidden_size if content == "hidden_states" else None,
            regression_loss=mixer.regression_loss,
        )
    with torch.device("meta"):
        build_student(config)
    return config


def _activated(config: PretrainedConfig) -> int:
    """Return the number of weights that one token uses."""
    with torch.device("meta"):
        return activated_parameters(build_student(config))


def build_student(config: PretrainedConfig) -> PreTrainedModel:
    """Return a newly initialized student; torch's generator is the seed."""
    if isinstance(config, CoCoMixConfig):
        return CoCoMixForCausalLM(config)
    return MultiTokenForCausalLM(config) if isinstance(config, MultiTokenConfig) else build_plain(config)
