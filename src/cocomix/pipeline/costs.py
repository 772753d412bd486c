"""FLOPs of what a student depends on: teacher, SAE, labels, stored predictions."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedModel

from cocomix.concepts.labeling import LabelsConfig
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_training import SAEConfig
from cocomix.models.flops import (
    BACKWARD,
    ConceptFlops,
    forward_flops_per_token,
    labeling_flops_per_token,
    linear_flops,
)
from cocomix.objectives import WeightSchedule
from cocomix.pipeline.methods import StudentConfig
from cocomix.training.run import Preparation

if TYPE_CHECKING:
    from cocomix.pipeline.artifacts import Pipeline


def sae_training_flops(config: SAEConfig, teacher: PreTrainedModel, d_sae: int, block_size: int) -> ConceptFlops:
    """Return the FLOPs of training the SAE: teacher up to the tap; encoder and decoder, forward and backward."""
    tap = forward_flops_per_token(teacher, block_size, up_to_layer=config.teacher_layer)
    encoder_and_decoder = 2 * 2 * d_sae * teacher.config.get_text_config().hidden_size
    return ConceptFlops(config.training_tokens * tap, config.training_tokens * (1 + BACKWARD) * encoder_and_decoder)


def labeling_flops(
    pipeline: Pipeline, teacher: PreTrainedModel, sae: SparseAutoencoder, config: LabelsConfig
) -> ConceptFlops:
    """Return the FLOPs of labeling one token; the teacher may be on the meta device."""
    layer, block_size = pipeline.recipe.sae.teacher_layer, pipeline.recipe.block_size
    return labeling_flops_per_token(teacher, layer, sae.d_sae, sae.max_active, block_size, config.selection)


def teacher_flops(pipeline: Pipeline, student: StudentConfig) -> ConceptFlops:
    """Return the mean FLOPs per token of teacher and SAE inside a student's training; 0 where their outputs are stored.

    Steps in which the weight of the loss is 0 count as 0, because the teacher does not run.
    """
    block_size, layer = pipeline.recipe.block_size, pipeline.recipe.sae.teacher_layer
    distillation, teacher, sae = student.distillation_config(), 0, 0
    mixer = student.mixer_config()
    predicted = 1.0 if mixer is None else _on_share(mixer.concept_loss_schedule)
    if student.learns_concepts() and pipeline.recipe.labels.online:
        labels = pipeline.recipe.labels_of(student)
        found = labeling_flops(pipeline, pipeline.teacher_shapes, pipeline.sae(), labels)
        teacher, sae = (round(predicted * flops) for flops in found)
    if student.mixes_hidden_states():
        tap = forward_flops_per_token(pipeline.teacher_shapes, block_size, up_to_layer=layer)
        teacher += round(predicted * tap)
    computes_losses = student.gate is not None and pipeline.recipe.runs_teacher(student)
    on: list[WeightSchedule | None] = []
    if distillation is not None and (distillation.top_k is None or computes_losses):
        on.append(distillation.weight_schedule)
    if computes_losses and mixer is not None and student.learns_concepts():
        on.append(mixer.concept_loss_schedule)
    if on:
        whole = pipeline.teacher_shapes
        per_token = forward_flops_per_token(whole, block_size)
        if computes_losses:  # the token head runs once more
            per_token += linear_flops(whole.get_output_embeddings(), whole.config)
        teacher += round(_on_share(*on) * per_token)
    return ConceptFlops(teacher, sae)


def _on_share(*schedules: WeightSchedule | None) -> float:
    """Return the share of the steps in which at least one of the weights is above 0."""
    share = reached = 0.0
    for start, end in sorted((0.0, 1.0) if each is None else (each.start, each.end) for each in schedules):
        share += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return share


def preparation(pipeline: Pipeline, student: StudentConfig) -> dict[str, Preparation]:
    """Return the cost of each artifact that a student learns from, by kind.

    The cost of artifacts that were not computed here is unknown: external labels, a given teacher or SAE.
    """
    found: dict[str, Preparation] = {}
    recipe, distillation = pipeline.recipe, student.distillation_config()
    if student.learns_concepts():
        # Controls are computed from other labels, which cost what the teacher computes.
        labels = pipeline.labels_stage_of(recipe.labels_of(student).base()).record()
        flops = labels.summary.get("flops_per_token")
        if flops is not None:  # per token of the teacher, whose tokenizer may yield more tokens or fewer
            read = pipeline.teacher_corpus().info
            blocks = read.validation_blocks + (0 if recipe.labels.online else read.train_blocks)
            flops = float(flops * blocks * read.block_size)
        found["labels"] = Preparation(labels.fingerprint, flops)
        if recipe.labels.source is None:
            sae = pipeline.sae_stage.record()
            found["sae"] = Preparation(sae.fingerprint, sae.summary["training_flops"])
    if distillation is not None and distillation.top_k is not None:
        record = pipeline.predictions_stage_of(distillation).record()
        found["predictions"] = Preparation(record.fingerprint, _flops_of_one_pass(pipeline))
    if recipe.reads_losses(student):
        found["losses"] = Preparation(pipeline.losses_stage.record().fingerprint, _flops_of_one_pass(pipeline))
    if "sae" in found or student.asks_teacher():
        teacher = pipeline.teacher_stage.record()
        trained = "tokens" in teacher.summary
        cost = float(teacher.summary["tokens"] * teacher.summary["training_flops_per_token"]) if trained else None
        found["teacher"] = Preparation(teacher.fingerprint, cost)
    return found


def _flops_of_one_pass(pipeline: Pipeline) -> float:
    """Return the FLOPs with which the teacher reads the training blocks once."""
    block_size = pipeline.recipe.block_size
    tokens = pipeline.corpus().info.train_blocks * block_size
    return float(tokens * forward_flops_per_token(pipeline.teacher_shapes, block_size))
