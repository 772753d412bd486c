"""The maker of each kind of stage: what it takes from the pipeline, and the function that computes the artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset

from cocomix.common import distributed, fingerprint
from cocomix.common.errors import InputError
from cocomix.concepts.alignment import OtherTokens
from cocomix.concepts.label_checks import check_contents
from cocomix.concepts.label_controls import control_labels
from cocomix.concepts.label_store import labels_fingerprint, labels_whole
from cocomix.concepts.labeling import LabelsConfig
from cocomix.concepts.predictions import Predictions
from cocomix.concepts.reading import SameTokens, TeacherReader
from cocomix.concepts.teacher_losses import TeacherLosses
from cocomix.concepts.window import WindowExtractor, inverse_frequencies
from cocomix.data.documents import load_documents
from cocomix.pipeline import make_artifacts, make_models, student_inputs
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.methods import DistillationConfig
from cocomix.pipeline.model_card import write_card
from cocomix.pipeline.stage import StageResult
from cocomix.pipeline.students import student_config
from cocomix.training.checkpoints import branch_point


class Maker(NamedTuple):
    """How stages of one kind are computed."""

    make: Callable[..., StageResult]
    """Takes the pipeline, the folder to write into, and the stage's arguments."""
    resumes: bool = True
    """See `Stage.run`."""
    on_all_ranks: bool = False
    """See `Stage.run`."""
    is_intact: Callable[[Path], bool] | None = None
    """Verifies the checksums of a finished folder, in which `make` keeps every intact shard."""


def _corpus(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe = pipeline.recipe
    if (shared := pipeline.shared(pipeline.corpus_stage)) is not None:
        return make_artifacts.share_corpus(shared, folder)
    trainings = recipe.trainings()
    if recipe.trains_teacher():
        trainings["teacher.training"] = recipe.teacher.training
    return make_artifacts.make_corpus(recipe.corpus, recipe.tokenizer, recipe.block_size, trainings, folder)


def _teacher_corpus(pipeline: Pipeline, folder: Path) -> StageResult:
    source = pipeline.recipe.teacher.source
    assert source is not None
    if (shared := pipeline.shared(pipeline.teacher_corpus_stage)) is not None:
        return make_artifacts.share_corpus(shared, folder)
    documents = pipeline.corpus_stage.folder / "documents"
    return make_artifacts.make_teacher_corpus(source, documents, pipeline.recipe.block_size, folder)


def _teacher(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe, corpus = pipeline.recipe, pipeline.teacher_corpus()
    settings = make_models.RunSettings(
        "teacher", "ntp", recipe.teacher.training, recipe.seed, recipe.parallel, recipe.to_dict()
    )
    data = student_inputs.training_data(pipeline, corpus, recipe.seed)
    final = pipeline.teacher_stage.folder
    figures = make_models.make_teacher(recipe.teacher.backbone, data, settings, final, recipe.teacher.untrained)
    # Read back from the file, which is complete however the ranks shared the training.
    return StageResult(pipeline.teacher_fingerprint(), figures)


def _given_teacher(pipeline: Pipeline, folder: Path) -> StageResult:
    config, teacher = pipeline.recipe.teacher, pipeline.teacher()
    assert config.source is not None
    summary = make_models.examine_pretrained(
        teacher, "teacher", config.source, pipeline.teacher_corpus().validation, config.training.blocks_per_batch
    )
    return StageResult(pipeline.teacher_fingerprint(), {**summary, "dtype": str(teacher.dtype)})


def _backbone(pipeline: Pipeline, folder: Path, source: str) -> StageResult:
    model, training = pipeline.backbone(source).to(pipeline.device), pipeline.recipe.training
    summary = make_models.examine_pretrained(
        model, "backbone", source, pipeline.corpus().validation, training.blocks_per_batch
    )
    found = fingerprint.hash_tensors(model.state_dict().items())
    return StageResult(found, {**summary, "stored_parameters": model.num_parameters()})


def _sae(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe = pipeline.recipe
    return make_artifacts.make_sae(
        pipeline.teacher(),
        pipeline.teacher_corpus(),
        recipe.sae,
        seed=recipe.seed,
        blocks_per_batch=pipeline.with_batch(recipe.labels).batch(),
        folder=folder,
    )


def _labels(pipeline: Pipeline, folder: Path, config: LabelsConfig) -> StageResult:
    corpus, inputs = pipeline.corpus(), pipeline.labels_stage_of(config).input_fingerprints()
    sides = {"train": corpus.train, "validation": corpus.validation}
    readers = {name: _reader(pipeline, name, blocks) for name, blocks in sides.items()}
    extractor = student_inputs.concept_extractor(pipeline, config, pipeline.teacher())
    reference = None
    if extractor.teacher.dtype != torch.float32 and not config.window:
        reference = partial(student_inputs.float32_extractor, pipeline, config)
    config = pipeline.with_batch(config)
    if config.window:
        extractor = WindowExtractor(
            extractor.teacher,
            extractor.sae,
            extractor.teacher_layer,
            config.labels_per_token,
            window=config.window,
            inverse_frequency=inverse_frequencies(extractor, readers["train"], config.batch()),
            eos_token_id=pipeline.tokenizer().eos_token_id,
        )
    return make_artifacts.make_labels(corpus, extractor, readers, config, inputs, folder, reference)


def _reader(pipeline: Pipeline, side: str, blocks: Dataset) -> TeacherReader:
    documents = load_documents(pipeline.corpus_stage.folder, side)
    if pipeline.recipe.labels.alignment == "tokens":
        return SameTokens(blocks, pipeline.tokenizer(), documents)
    assert documents is not None, "preflight refuses token files here"
    context = getattr(pipeline.teacher_model_config, "max_position_embeddings", None)
    return OtherTokens(
        blocks, pipeline.recipe.block_size, documents, pipeline.tokenizer(), pipeline.teacher_tokenizer(), context
    )


def _external_labels(pipeline: Pipeline, folder: Path, config: LabelsConfig) -> StageResult:
    labeled = pipeline.labels(config)
    assert config.source is not None
    check_contents(labeled, pipeline.corpus(), Path(config.source))
    return StageResult(labels_fingerprint(labeled.info), dataclasses.asdict(labeled.info))


def _control_labels(pipeline: Pipeline, folder: Path, config: LabelsConfig) -> StageResult:
    base, corpus = pipeline.labels(config.base()), pipeline.corpus()
    eos_token_id = pipeline.tokenizer().eos_token_id
    info = control_labels(base, config, corpus.info.vocab_size, eos_token_id, pipeline.recipe.seed, folder)
    return StageResult(labels_fingerprint(info), dataclasses.asdict(info))


def _predictions(pipeline: Pipeline, folder: Path, config: DistillationConfig) -> StageResult:
    inputs = pipeline.predictions_stage_of(config).input_fingerprints()
    return make_artifacts.make_predictions(
        pipeline.teacher(), pipeline.corpus(), config, pipeline.with_batch(pipeline.recipe.labels), inputs, folder
    )


def _losses(pipeline: Pipeline, folder: Path) -> StageResult:
    inputs = pipeline.losses_stage.input_fingerprints()
    return make_artifacts.make_losses(
        pipeline.teacher(), pipeline.corpus(), pipeline.with_batch(pipeline.recipe.labels), inputs, folder
    )


def _catalog(pipeline: Pipeline, folder: Path) -> StageResult:
    recipe = pipeline.recipe
    documents = load_documents(pipeline.teacher_corpus_stage.folder, "train", texts=pipeline.corpus_stage.folder)
    reader = SameTokens(pipeline.teacher_corpus().train, pipeline.teacher_tokenizer(), documents)
    labeled = pipeline.labels()
    extractor = student_inputs.concept_extractor(pipeline, recipe.labels, pipeline.teacher())
    return make_artifacts.make_catalog(
        extractor, reader, labeled, recipe.catalog, pipeline.with_batch(recipe.labels).batch(), folder
    )


def _branch(pipeline: Pipeline, name: str, seed: int) -> Path | None:
    """Return the checkpoint that a student continues, if it is a branch; InputError if it was not kept."""
    recipe, student = pipeline.recipe, pipeline.recipe.students[name]
    if student.branch_from is None:
        return None
    training, parent = recipe.training_of(student), pipeline.student_stages[student.branch_from, seed].folder
    checkpoint = branch_point(parent, training.decay_start())
    if not checkpoint.is_dir():
        raise InputError(
            f"{parent} kept no checkpoint after {training.decay_start() * training.tokens_per_step:,} tokens for "
            f"{name}, because the recipe had no such branch when it was trained; delete it to train it again"
        )
    return checkpoint


def _student(pipeline: Pipeline, folder: Path, name: str, seed: int) -> StageResult:
    recipe, student = pipeline.recipe, pipeline.recipe.students[name]
    inputs = student_inputs.student_inputs(pipeline, student, seed)
    corpus, tokenizer = inputs.data.corpus, inputs.data.tokenizer
    config = student_config(recipe, name, pipeline.student_context(corpus.vocab_size, tokenizer.eos_token_id))
    source = recipe.backbone_of(student).source
    pretrained = None if source is None else pipeline.backbone(source)
    training = recipe.training_of(student)
    settings = make_models.RunSettings(
        name,
        student.method,
        training,
        seed,
        recipe.parallel,
        recipe.to_dict(),
        branch_steps=recipe.branch_steps(name),
        branch=_branch(pipeline, name, seed),
    )
    result = make_models.make_student(config, pretrained, inputs, settings, pipeline.student_stages[name, seed].folder)
    if distributed.is_main_process():
        write_card(folder)
    return result


MAKERS = {
    "corpus": Maker(_corpus, resumes=False),
    "teacher corpus": Maker(_teacher_corpus),
    "teacher": Maker(_teacher, on_all_ranks=True),
    "given teacher": Maker(_given_teacher, on_all_ranks=True),
    "backbone": Maker(_backbone),
    "sae": Maker(_sae, on_all_ranks=True),
    "labels": Maker(_labels, on_all_ranks=True, is_intact=labels_whole),
    "control labels": Maker(_control_labels, on_all_ranks=True, is_intact=labels_whole),
    "external labels": Maker(_external_labels, on_all_ranks=True),
    "predictions": Maker(_predictions, on_all_ranks=True, is_intact=Predictions.is_whole),
    "teacher losses": Maker(_losses, on_all_ranks=True, is_intact=TeacherLosses.is_whole),
    "catalog": Maker(_catalog),
    "student": Maker(_student, on_all_ranks=True),
}
"""The maker of each kind of stage."""
TEACHER_READS = ("sae", "labels", "predictions", "teacher losses", "catalog")
"""Kinds of stages in which the teacher reads text and no student trains."""
