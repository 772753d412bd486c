"""Train the teacher and the students, and examine pretrained models that a recipe names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from cocomix.common import distributed, files, fingerprint, portable
from cocomix.concepts.label_baselines import label_baselines
from cocomix.concepts.teacher import check_causal
from cocomix.data.documents import DocumentTokens
from cocomix.data.packing import PackedInfo
from cocomix.data.streaming import BlockStream
from cocomix.models.building import BackboneConfig, backbone_config, build_plain
from cocomix.models.configuration import CoCoMixConfig
from cocomix.objectives import NextToken, Objective
from cocomix.pipeline.stage import StageResult
from cocomix.pipeline.students import build_student, start_from
from cocomix.training.config import TrainingConfig
from cocomix.training.documents import document_losses, save_document_losses
from cocomix.training.pretrain import TrainingResult, pretrain
from cocomix.training.run import Preparation, Run, describe_run, save_run
from cocomix.training.validation import evaluate_model

REPORTED = ("stored_parameters", "activated_parameters", "tokens", "training_flops_per_token", "metrics", "timing")
"""Figures of a run that its stage's record repeats for the report."""


@dataclass(frozen=True)
class TrainingData:
    """What a model is trained and validated on.

    Attributes:
        train: blocks with the columns that the objective reads, or this rank's stream of blocks.
        validation: blocks with the same columns.
        corpus: record of the packed corpus.
        documents: which validation document each token belongs to; None for token files.
        tokenizer: of the corpus.
    """

    train: Dataset | BlockStream
    validation: Dataset
    corpus: PackedInfo
    documents: DocumentTokens | None
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class StudentInputs:
    """What one student learns from, besides its own settings.

    Attributes:
        data: blocks, with labels and stored predictions where the objective reads them.
        objective: what is minimized.
        labels: blocks whose labels the baselines count; None if the student learns no labels.
        teacher_flops_per_token: computed by teacher and SAE in each training step.
        preparation: cost of each artifact that the student depends on.
    """

    data: TrainingData
    objective: Objective
    labels: Dataset | None
    teacher_flops_per_token: int
    preparation: dict[str, Preparation] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSettings:
    """How a model is trained and recorded.

    Attributes:
        name: of the model in its recipe.
        method: of training.
        training: optimizer, schedule and batch.
        seed: of initialization, data order and dropout.
        parallel: how ranks share a training (see `training.config.PARALLEL`).
        recipe: the resolved recipe, for the record.
        branch_steps: steps whose checkpoints others continue.
        branch: checkpoint of another training to continue.
    """

    name: str
    method: str
    training: TrainingConfig
    seed: int
    parallel: str
    recipe: dict[str, Any]
    branch_steps: Collection[int] = ()
    branch: Path | None = None


def examine_pretrained(
    model: PreTrainedModel, role: str, source: str, validation: Dataset, blocks_per_batch: int
) -> dict[str, Any]:
    """Check that a given model is causal, and return its source and its validation loss.

    Raises:
        InputError: later tokens change the model's predictions for earlier ones.
    """
    check_causal(model, role, source)
    return {"source": portable.short(source), "metrics": evaluate_model(model.eval(), validation, blocks_per_batch)}


def make_teacher(
    backbone: BackboneConfig, data: TrainingData, settings: RunSettings, folder: Path, untrained: bool = False
) -> dict[str, Any]:
    """Train a teacher by next-token prediction and return the figures for the report. Every rank calls this.

    Args:
        backbone: sizes.
        data: text in the teacher's tokens.
        settings: how it is trained.
        folder: final folder; the model is written into its unfinished form, `files.partial(folder)`.
        untrained: keep the initial weights.
    """
    set_seed(settings.seed)
    sizes = backbone_config(
        backbone,
        vocab_size=data.corpus.vocab_size,
        block_size=data.corpus.block_size,
        eos_token_id=data.tokenizer.eos_token_id,
    )
    model = build_plain(sizes)
    if untrained:
        result = _untrained(model, data, settings, folder)
    else:
        result = _pretrain(model, NextToken(), data, settings, folder)
    run = _describe(model, result, data, settings)
    if distributed.is_main_process():
        save_run(run, files.partial(folder))
    return _reported(run)


def make_student(
    config: PretrainedConfig,
    pretrained: PreTrainedModel | None,
    inputs: StudentInputs,
    settings: RunSettings,
    folder: Path,
) -> StageResult:
    """Train one student and record its losses and costs. Every rank calls this.

    Args:
        config: of the student.
        pretrained: weights that it starts from; None to initialize it by the seed.
        inputs: what it learns from.
        settings: how it is trained.
        folder: final folder; everything is written into its unfinished form, `files.partial(folder)`.

    Raises:
        InputError: the pretrained model cannot be split, or the training diverged.
    """
    data, unfinished = inputs.data, files.partial(folder)
    set_seed(settings.seed)
    model = build_student(config) if pretrained is None else start_from(config, pretrained, settings.name)
    result = _pretrain(model, inputs.objective, data, settings, folder)
    training = settings.training
    losses = document_losses(
        model.eval(), data.validation, data.documents, training.blocks_per_batch, training.precision
    )
    if distributed.is_main_process():
        save_document_losses(losses, unfinished)
    run = _describe(
        model,
        result,
        data,
        settings,
        teacher_flops_per_token=inputs.teacher_flops_per_token,
        preparation=inputs.preparation,
    )
    if inputs.labels is not None:
        assert isinstance(config, CoCoMixConfig)
        run.metrics.update(
            label_baselines(
                inputs.labels, data.validation, config.vocab_size, config.num_concepts, config.num_active_concepts
            )
        )
    if distributed.is_main_process():
        save_run(run, unfinished)
    return StageResult(fingerprint.hash_json(run.curve), _reported(run))


def _untrained(model: PreTrainedModel, data: TrainingData, settings: RunSettings, folder: Path) -> TrainingResult:
    """Save a model with its initial weights; the result is that of 0 training tokens."""
    if distributed.is_main_process():
        model.save_pretrained(files.partial(folder))
        data.tokenizer.save_pretrained(str(files.partial(folder)))
    training = settings.training
    model.to(distributed.device())
    metrics = evaluate_model(model.eval(), data.validation, training.blocks_per_batch, training.precision)
    return TrainingResult(metrics, [{"tokens": 0, **metrics}], tokens=0, seconds=0.0, seconds_curve=[0.0])


def _pretrain(
    model: PreTrainedModel, objective: Objective, data: TrainingData, settings: RunSettings, folder: Path
) -> TrainingResult:
    return pretrain(
        model,
        objective,
        data.train,
        data.validation,
        settings.training,
        folder,
        description=folder.name,
        project=settings.recipe["name"],
        seed=settings.seed,
        tokenizer=data.tokenizer,
        parallel=settings.parallel,
        branch_steps=settings.branch_steps,
        branch=settings.branch,
    )


def _describe(
    model: PreTrainedModel, result: TrainingResult, data: TrainingData, settings: RunSettings, **costs: Any
) -> Run:
    return describe_run(
        model,
        result,
        name=settings.name,
        method=settings.method,
        seed=settings.seed,
        corpus=data.corpus,
        recipe=settings.recipe,
        **costs,
    )


def _reported(run: Run) -> dict[str, Any]:
    return {key: getattr(run, key) for key in REPORTED}
