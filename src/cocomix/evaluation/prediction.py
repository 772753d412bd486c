"""`cocomix evaluate concepts RUN`: how well a model predicts its concepts, and whether it uses what it mixes in."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel

from cocomix import environment
from cocomix.concepts.label_baselines import TokenTable
from cocomix.concepts.label_store import LabelledCorpus, labels_fingerprint
from cocomix.data.packing import load_packed
from cocomix.errors import InputError
from cocomix.evaluation.channel import channel_losses
from cocomix.evaluation.concepts import concept_predictions, label_frequencies
from cocomix.evaluation.record import Evaluation
from cocomix.settings import Batch, Count
from cocomix.steering.runs import OpenRun

KIND = "concepts"


@dataclass(frozen=True)
class ConceptSettings:
    """How concepts are evaluated.

    Attributes:
        limit: so many validation blocks, the first; by default all.
        batch_size: blocks read at once.
        precision: `fp32`, or `bf16` for matrix products.
    """

    limit: Count | None = None
    batch_size: Batch = 16
    precision: str = "fp32"


def training_frequencies(labelled: LabelledCorpus) -> np.ndarray:
    """(C,) share of the labelled tokens that have each concept as a label: in training, or where those labels were made
    in the training step, in validation."""
    return label_frequencies(labelled.train or labelled.validation, labelled.info.num_concepts)


def token_table(labelled: LabelledCorpus, model: PreTrainedModel) -> TokenTable:
    """Count the labels of each token where `training_frequencies` counts them, for all predictions that are scored."""
    per_token = labelled.validation.features["concept_ids"].feature.length
    return TokenTable.of_blocks(
        labelled.train or labelled.validation,
        model.config.vocab_size,
        labelled.info.num_concepts,
        max(model.config.num_active_concepts, per_token),
    )


def evaluate_concepts(run: OpenRun, labelled: LabelledCorpus | None, settings: ConceptSettings) -> Evaluation:
    """Predictions by frequency band, where the model predicts concepts, and losses without its continuous vector.

    Args:
        run: run of a model with a mixer.
        labelled: its labels, if it predicts concepts.
        settings: what is read, and how.

    Raises:
        InputError: its validation text is not beside it, or too short.
    """
    blocks = _first(labelled.validation if labelled is not None else _validation(run), settings.limit)
    if len(blocks) < 2:
        raise InputError(
            "a continuous vector of another text needs two blocks of validation text; give --limit 2 or more"
        )
    model = run.model
    reading = (settings.batch_size, settings.precision)
    bands = None
    if labelled is not None:
        table = token_table(labelled, model)
        bands = concept_predictions(model, blocks, training_frequencies(labelled), table, *reading).bands
    assert run.record is not None
    return Evaluation(
        kind=KIND,
        name="validation",
        settings={
            "validation": run.record.validation,
            "labels": None if labelled is None else labels_fingerprint(labelled.info),
            "limit": settings.limit,
            "precision": settings.precision,
        },
        figures={
            "blocks": len(blocks),
            "bands": None if bands is None else [asdict(band) for band in bands],
            "channel": None if model.config.mixing == "none" else channel_losses(model, blocks, *reading),
        },
        environment=environment.describe(),
    )


def _validation(run: OpenRun) -> Dataset:
    if run.corpus is None:
        raise InputError(f"the corpus that {run.folder} was trained on is not beside it, at OUTPUT/corpus")
    return load_packed(run.corpus).validation


def _first(blocks: Dataset, limit: int | None) -> Dataset:
    return blocks if limit is None else blocks.select(range(min(limit, len(blocks))))
