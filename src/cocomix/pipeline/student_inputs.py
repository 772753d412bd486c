"""Open what a student learns from: blocks with labels and predictions, the teacher's signals, the costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.concepts.attribution import ConceptExtractor
from cocomix.concepts.labeling import LabelsConfig, label_in_equal_batches
from cocomix.concepts.predictions import Predictions
from cocomix.concepts.teacher import residual_stream
from cocomix.concepts.teacher_losses import TeacherLosses
from cocomix.data.documents import load_documents
from cocomix.data.packing import PackedCorpus
from cocomix.data.streaming import BlockStream, open_stream
from cocomix.objectives.cocomix import Labeler
from cocomix.objectives.distillation import PredictTokens, predictor
from cocomix.objectives.hidden_states import HiddenStates
from cocomix.pipeline.costs import preparation, teacher_flops
from cocomix.pipeline.make_models import StudentInputs, TrainingData
from cocomix.pipeline.methods import StudentConfig

if TYPE_CHECKING:
    from cocomix.pipeline.artifacts import Pipeline


def student_inputs(pipeline: Pipeline, student: StudentConfig, seed: int) -> StudentInputs:
    """Open everything that a student learns from, and check that it is what the stages recorded."""
    corpus = pipeline.corpus()
    blocks = student_blocks(pipeline, student, corpus)
    data = training_data(pipeline, blocks, seed)
    labels = None
    if student.learns_concepts():
        # Online labels of training text are not stored; counting the validation labels gives a stronger baseline.
        labels = blocks.train if "concept_ids" in blocks.train.column_names else blocks.validation
    labels_config = pipeline.recipe.labels_of(student)
    return StudentInputs(
        data,
        student.objective(
            OnlineTeacher(pipeline, labels_config, corpus.info.vocab_size, pipeline.recipe.reads_losses(student))
        ),
        labels,
        teacher_flops(pipeline, student).total,
        preparation(pipeline, student),
    )


def student_blocks(pipeline: Pipeline, student: StudentConfig, corpus: PackedCorpus) -> PackedCorpus:
    """Return the corpus with the stored columns that a student learns from."""
    train, validation = corpus.train, corpus.validation
    labeled = pipeline.labels(pipeline.recipe.labels_of(student)) if student.learns_concepts() else None
    if labeled is not None:
        train, validation = train if labeled.train is None else labeled.train, labeled.validation
    distillation = student.distillation_config()
    if distillation is not None and distillation.top_k is not None:
        train = _with_columns(train, Predictions.load(pipeline.predictions_stage_of(distillation).folder))
    if pipeline.recipe.reads_losses(student):
        train = _with_columns(train, TeacherLosses.load(pipeline.losses_stage.folder))
    return PackedCorpus(train, validation, corpus.info)


def _with_columns(blocks: Dataset, more: Dataset) -> Dataset:
    """Add the columns of `more` to blocks; both stages checked that they read this corpus, so they are aligned."""
    new = [name for name in more.column_names if name not in blocks.column_names]
    return concatenate_datasets([blocks, more.select_columns(new)], axis=1)


def training_data(pipeline: Pipeline, blocks: PackedCorpus, seed: int) -> TrainingData:
    """Return blocks, documents and tokenizer for a training; a streamed corpus is read from its source instead."""
    recipe, folder, tokenizer = pipeline.recipe, pipeline.corpus_stage.folder, pipeline.tokenizer()
    documents = load_documents(folder, "validation")
    train: Dataset | BlockStream = blocks.train
    if recipe.corpus.streaming is not None:
        excluded: list[str] = []
        if recipe.corpus.validation_source is not None:
            assert documents is not None, "preflight refuses token files here"
            excluded = documents.texts(0, len(documents))
        train = open_stream(recipe.corpus, tokenizer, excluded, block_size=recipe.block_size, seed=seed)
    return TrainingData(train, blocks.validation, blocks.info, documents, tokenizer)


class OnlineTeacher:
    """What the teacher computes inside the training steps of one student (`TeacherSignals`).

    Args:
        pipeline: opens the teacher and the SAE when they are first used.
        labels: how the student's labels are computed.
        vocab_size: V; the probabilities of further tokens, which no text contains, are cut off.
        losses_are_stored: whether the student reads the teacher's losses instead of computing them.
    """

    def __init__(
        self, pipeline: Pipeline, labels: LabelsConfig, vocab_size: int, losses_are_stored: bool = False
    ) -> None:
        self._pipeline, self._labels, self._vocab_size = pipeline, labels, vocab_size
        self._losses_are_stored = losses_are_stored
        self._teacher: Callable[[], PreTrainedModel] = cache(pipeline.teacher)

    def labeler(self) -> Labeler | None:
        """Return the labeling of a batch, bit-identical to stored labels; None if the labels are stored."""
        if not self._labels.online:
            return None
        extractor = concept_extractor(self._pipeline, self._labels, self._teacher())
        size = self._pipeline.with_batch(self._labels).batch()
        return lambda input_ids: label_in_equal_batches(extractor, input_ids, None, size).ids

    def labels_have_weights(self) -> bool:
        """Return whether the stored labels have weights."""
        return self._labels.targets == "activation"

    def losses_are_stored(self) -> bool:
        """Return whether the teacher's losses are stored."""
        return self._losses_are_stored

    def token_distributions(self) -> PredictTokens:
        """Return the teacher's forward pass."""
        return predictor(self._teacher(), self._vocab_size)

    def hidden_states(self) -> HiddenStates:
        """Return the teacher's forward pass up to the tapped block."""
        teacher, layer = self._teacher(), self._pipeline.recipe.sae.teacher_layer

        def hidden_states(input_ids: Tensor) -> Tensor:
            with torch.autocast(input_ids.device.type, enabled=False):
                return residual_stream(teacher, input_ids, layer)

        return hidden_states


def concept_extractor(pipeline: Pipeline, config: LabelsConfig, teacher: PreTrainedModel) -> ConceptExtractor:
    """Return the recipe's teacher and SAE with the selection of `config`."""
    layer = pipeline.recipe.sae.teacher_layer
    sae, compiled = pipeline.sae(), pipeline.compiles_teacher
    return ConceptExtractor(teacher, sae, layer, config.labels_per_token, config.selection, compiled)


def float32_extractor(pipeline: Pipeline, config: LabelsConfig) -> ConceptExtractor:
    """Return the extractor of `config` in float32."""
    layer, sae = pipeline.recipe.sae.teacher_layer, pipeline.float32_sae()
    return ConceptExtractor(pipeline.float32_teacher(), sae, layer, config.labels_per_token, config.selection)
