"""What a student learns from: the blocks, what it minimises, and what the teacher computes for it meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.labelling import LabelsConfig, label_in_equal_batches
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import residual_stream
from cocomix.data.documents import load_documents
from cocomix.data.packing import PackedCorpus
from cocomix.data.streaming import BlockStream, open_stream
from cocomix.distillation.predictions import load_predictions
from cocomix.evaluation.flops import (
    BACKWARD,
    ConceptFlops,
    forward_flops_per_token,
    labelling_flops_per_token,
)
from cocomix.methods import StudentConfig
from cocomix.objectives import ConceptMixing, Distillation, HiddenStateMixing, MultiToken, NextToken, Objective
from cocomix.objectives.cocomix import Labeller
from cocomix.objectives.distillation import TeacherLogits
from cocomix.objectives.hidden_states import HiddenStates
from cocomix.training.run import Preparation

if TYPE_CHECKING:
    from cocomix.pipeline import Pipeline


def student_blocks(pipeline: Pipeline, student: StudentConfig, corpus: PackedCorpus) -> PackedCorpus:
    """The corpus with the columns that a student learns from, as far as they are stored."""
    train, validation = corpus.train, corpus.validation
    labelled = pipeline.labels(pipeline.recipe.labels_of(student)) if student.learns_concepts() else None
    if labelled is not None:
        train, validation = train if labelled.train is None else labelled.train, labelled.validation
    distillation = student.distillation_config()
    if distillation is not None and distillation.top_k is not None:
        predicted = load_predictions(pipeline.predictions_stage_of(distillation).folder)
        if labelled is None or labelled.train is None:
            train = predicted
        else:  # both hold the tokens of the corpus, block by block: their stages checked whose they are
            new = [name for name in predicted.column_names if name not in train.column_names]
            train = concatenate_datasets([train, predicted.select_columns(new)], axis=1)
    return PackedCorpus(train, validation, corpus.info)


def training_blocks(pipeline: Pipeline, blocks: PackedCorpus, seed: int) -> Dataset | BlockStream:
    """What a model is trained on: the stored blocks, or the documents that they are a sample of."""
    recipe = pipeline.recipe
    if recipe.corpus.streaming is None:
        return blocks.train
    excluded: list[str] = []
    if recipe.corpus.validation_source is not None:
        documents = load_documents(pipeline.corpus_stage.folder, "validation")
        assert documents is not None, "token files were refused before"
        excluded = documents.texts(0, len(documents))
    return open_stream(recipe.corpus, pipeline.tokenizer(), excluded, block_size=recipe.block_size, seed=seed)


def student_objective(pipeline: Pipeline, student: StudentConfig, vocab_size: int) -> Objective:
    """What a student minimises."""
    teacher = cache(pipeline.teacher)  # one, also in a plan, whose pipeline makes a new one at each call
    distillation = distillation_of(student, teacher, vocab_size)
    if student.learns_concepts():
        labels = pipeline.recipe.labels_of(student)
        return ConceptMixing(_labeller(pipeline, labels, teacher()) if labels.online else None, distillation)
    if distillation is not None:
        return distillation
    if student.method == "mtp":
        return MultiToken()
    if student.mixes_hidden_states():
        return HiddenStateMixing(_teacher_hidden_states(teacher(), pipeline.recipe.sae.teacher_layer))
    return NextToken()


def distillation_of(
    student: StudentConfig, teacher: Callable[[], PreTrainedModel], vocab_size: int
) -> Distillation | None:
    """How a student learns the teacher's predictions, if it does; the teacher is fetched if it is asked in training."""
    config = student.distillation_config()
    if config is None:
        return None
    logits = None if config.top_k is not None else _teacher_logits(teacher(), vocab_size)
    return Distillation(config.weight, config.temperature, logits)


def teacher_flops(pipeline: Pipeline, student: StudentConfig) -> ConceptFlops:
    """What teacher and SAE compute per token of a student's training; 0 where all that they say was stored."""
    block_size, layer = pipeline.recipe.block_size, pipeline.recipe.sae.teacher_layer
    distillation, teacher, sae = student.distillation_config(), 0, 0
    if student.learns_concepts() and pipeline.recipe.labels.online:
        labels = pipeline.recipe.labels_of(student)
        teacher, sae = labelling_flops(pipeline, pipeline.teacher_shapes, pipeline.sae(), labels)
    if student.mixes_hidden_states():
        teacher += forward_flops_per_token(pipeline.teacher_shapes, block_size, up_to_layer=layer)
    if distillation is not None and distillation.top_k is None:
        teacher += forward_flops_per_token(pipeline.teacher_shapes, block_size)
    return ConceptFlops(teacher, sae)


def sae_training_flops(pipeline: Pipeline, teacher: PreTrainedModel, d_sae: int) -> ConceptFlops:
    """Of training the SAE: the teacher up to the tap, and encoder and decoder forward and backward, for each token."""
    config = pipeline.recipe.sae
    tap = forward_flops_per_token(teacher, pipeline.recipe.block_size, up_to_layer=config.teacher_layer)
    both = 2 * 2 * d_sae * teacher.config.get_text_config().hidden_size
    return ConceptFlops(config.training_tokens * tap, config.training_tokens * (1 + BACKWARD) * both)


def preparation(pipeline: Pipeline, student: StudentConfig) -> dict[str, Preparation]:
    """What was made before for this student to learn from; labels made elsewhere count as nobody's work here."""
    found: dict[str, Preparation] = {}
    recipe, distillation = pipeline.recipe, student.distillation_config()
    if student.learns_concepts():
        stage = pipeline.labels_stage_of(recipe.labels_of(student))
        labels = stage.record()
        flops = labels.summary.get("flops_per_token")
        if flops is not None:  # of the teacher's tokens, which its own tokenizer may make more or fewer
            read = pipeline.teacher_corpus().info
            blocks = read.validation_blocks + (0 if recipe.labels.online else read.train_blocks)
            flops = float(flops * blocks * read.block_size)
        found["labels"] = Preparation(labels.fingerprint, flops)
        if recipe.labels.source is None:
            sae = pipeline.sae_stage.record()
            found["sae"] = Preparation(sae.fingerprint, sae.summary["training_flops"])
    if distillation is not None and distillation.top_k is not None:
        tokens = pipeline.corpus().info.train_blocks * recipe.block_size
        flops = tokens * forward_flops_per_token(pipeline.teacher_shapes, recipe.block_size)
        record = pipeline.predictions_stage_of(distillation).record()
        found["predictions"] = Preparation(record.fingerprint, float(flops))
    if "sae" in found or student.asks_teacher():
        teacher = pipeline.teacher_stage.record()
        trained = "tokens" in teacher.summary
        cost = float(teacher.summary["tokens"] * teacher.summary["training_flops_per_token"]) if trained else None
        found["teacher"] = Preparation(teacher.fingerprint, cost)
    return found


def labelling_flops(
    pipeline: Pipeline, teacher: PreTrainedModel, sae: SparseAutoencoder, config: LabelsConfig
) -> ConceptFlops:
    """What labelling computes per token."""
    layer, block_size = pipeline.recipe.sae.teacher_layer, pipeline.recipe.block_size
    return labelling_flops_per_token(teacher, layer, sae.d_sae, sae.max_active, block_size, config.selection)


def _labeller(pipeline: Pipeline, config: LabelsConfig, teacher: PreTrainedModel) -> Labeller:
    """Labels of a training batch, computed now: those that would have been stored, to the last bit."""
    extractor = concept_extractor(pipeline, config, teacher)
    return lambda input_ids: label_in_equal_batches(extractor, input_ids, None, config.blocks_per_batch).ids


def _teacher_logits(teacher: PreTrainedModel, vocab_size: int) -> TeacherLogits:
    """What the teacher says of a training batch, computed now; of tokens that no text has, nothing."""

    def logits(input_ids: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            return teacher(input_ids=input_ids, use_cache=False).logits[..., :vocab_size]

    return logits


def _teacher_hidden_states(teacher: PreTrainedModel, layer: int) -> HiddenStates:
    """The teacher's residual stream at the tap, computed now."""

    def hidden_states(input_ids: Tensor) -> Tensor:
        with torch.autocast(input_ids.device.type, enabled=False):
            return residual_stream(teacher, input_ids, layer)

    return hidden_states


def concept_extractor(pipeline: Pipeline, config: LabelsConfig, teacher: PreTrainedModel) -> ConceptExtractor:
    """The recipe's teacher and SAE, labelling as `config` says."""
    layer = pipeline.recipe.sae.teacher_layer
    return ConceptExtractor(teacher, pipeline.sae(), layer, config.labels_per_token, config.selection)
