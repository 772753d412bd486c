"""Evaluate concept predictions and the use of the continuous vector: `cocomix evaluate concepts RUN`."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from cocomix.common import environment
from cocomix.common.errors import InputError
from cocomix.common.settings import Batch, Count
from cocomix.concepts.label_statistics import label_frequencies
from cocomix.concepts.label_store import LabeledCorpus, labels_fingerprint
from cocomix.concepts.label_tables import LabelTables
from cocomix.data.packing import load_packed
from cocomix.evaluation.channel import channel_losses
from cocomix.evaluation.concepts import concept_predictions
from cocomix.evaluation.record import Evaluation
from cocomix.inspection.runs import OpenRun

KIND = "concepts"


@dataclass(frozen=True)
class ConceptSettings:
    """Settings for evaluating concepts.

    Attributes:
        limit: evaluate only the first `limit` validation blocks; None means all.
        batch_size: blocks per batch.
        precision: `fp32`, or `bf16` for matrix products.
    """

    limit: Count | None = None
    batch_size: Batch = 16
    precision: str = "fp32"


def training_frequencies(labeled: LabeledCorpus) -> np.ndarray:
    """Return the share (C,) of labeled tokens that have each concept as a label.

    Counted on the training labels, or on the validation labels if training labels were computed online.
    """
    return label_frequencies(labeled.train or labeled.validation, labeled.info.num_concepts)


def label_tables(labeled: LabeledCorpus, model: PreTrainedModel) -> LabelTables:
    """Build the tables from the same labels as `training_frequencies`."""
    per_token = labeled.validation.features["concept_ids"].feature.length
    return LabelTables.from_blocks(
        labeled.train or labeled.validation,
        model.config.vocab_size,
        labeled.info.num_concepts,
        max(model.config.num_active_concepts, per_token),
    )


def evaluate_concepts(run: OpenRun, labeled: LabeledCorpus | None, settings: ConceptSettings) -> Evaluation:
    """Measure concept predictions by frequency band, and the losses with a changed continuous vector.

    Args:
        run: run of a model with a mixer.
        labeled: the labels of its corpus; None if the model does not predict concepts.
        settings: amount of text, batch size and precision.

    Raises:
        InputError: the validation text is not available or too short.
    """
    blocks = _first(labeled.validation if labeled is not None else _validation(run), settings.limit)
    if len(blocks) < 2:
        raise InputError(
            "the vector of another text requires at least two blocks of validation text; give --limit 2 or more"
        )
    model = run.model
    batching = (settings.batch_size, settings.precision)
    bands = None
    if labeled is not None:
        tables = label_tables(labeled, model)
        bands = concept_predictions(model, blocks, training_frequencies(labeled), tables, *batching).bands
    assert run.record is not None
    return Evaluation(
        kind=KIND,
        name="validation",
        settings={
            "validation": run.record.validation,
            "labels": None if labeled is None else labels_fingerprint(labeled.info),
            "limit": settings.limit,
            "precision": settings.precision,
        },
        figures={
            "blocks": len(blocks),
            "bands": None if bands is None else [asdict(band) for band in bands],
            "channel": None if model.config.mixing == "none" else channel_losses(model, blocks, *batching),
        },
        environment=environment.describe(),
    )


def _validation(run: OpenRun) -> Dataset:
    if run.corpus is None:
        raise InputError(f"the training corpus of {run.folder}, OUTPUT/corpus, is gone or has changed")
    return load_packed(run.corpus).validation


def _first(blocks: Dataset, limit: int | None) -> Dataset:
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))
