"""Precision, recall and calibration of concept predictions, compared with tables of the current tokens.

B blocks, T tokens, N labeled tokens, C concepts, A labels per token, K active concepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common.console import progress_bar
from cocomix.concepts.label_tables import LabelHits, LabelTables, Tokens, label_hits
from cocomix.data.blocks import Blocks
from cocomix.models.losses import IGNORE
from cocomix.training.validation import autocast

BANDS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 0.0)
"""Bounds of the frequency bands: the share of labeled tokens that have a concept as a label."""
CALIBRATION_BOUNDS = (0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
"""Bounds of the calibration bins, by the expected number of labels."""
CHUNK_NUMBERS = 1 << 22
"""Predictions (tokens × concepts) that are processed at once."""


@dataclass(frozen=True)
class CalibrationBin:
    """A calibration bin: predictions with a similar expected number of labels.

    Attributes:
        promised: mean expected number of labels per prediction.
        found: mean observed number of labels per prediction.
        predictions: number of (token, concept) pairs.
    """

    promised: float
    found: float
    predictions: int


@dataclass(frozen=True)
class ConceptBand:
    """Concepts of similar frequency, and how well a model predicts them.

    Attributes:
        name: range of frequencies.
        concepts: number of concepts.
        labels: number of labels on the evaluated tokens.
        precision: precision at A, where A is the number of labels of the token: the share of labels among the A most
            probable concepts of each token, restricted to this band; None if no concept is predicted.
        recall_at_a: share of the labels that are among the token's A most probable concepts; None without labels.
        recall: share of the labels that are among the token's K active concepts; None without labels.
        table_precision, table_recall_at_a, table_recall: the same of a `TokenTable`.
        bigram_precision, bigram_recall_at_a, bigram_recall: the same of a `BigramTable`.
        misplaced: calibration error: |expected − observed labels| summed over `promises`, as a share of the labels;
            None without labels.
        promises: calibration bins, weakest predictions first.
    """

    name: str
    concepts: int
    labels: int
    precision: float | None
    recall_at_a: float | None
    recall: float | None
    table_precision: float | None
    table_recall_at_a: float | None
    table_recall: float | None
    bigram_precision: float | None
    bigram_recall_at_a: float | None
    bigram_recall: float | None
    misplaced: float | None
    promises: list[CalibrationBin]


USEFUL_F1 = 0.3
"""F1 from which a concept's predictions are worth a look."""


class TableHits(NamedTuple):
    """Predictions of `LabelTables` that are labels."""

    token: LabelHits
    bigram: LabelHits


@dataclass(frozen=True)
class ConceptPredictions:
    """A model's concept predictions compared with the labels of some text.

    Attributes:
        bands: all concepts, then the concepts of each frequency band.
        tokens: N.
        labels: (C,) labels per concept.
        model: predictions of the model, by concept; at rank k, these are its active concepts.
        tables: predictions of the tables, by concept.
    """

    bands: list[ConceptBand]
    tokens: int
    labels: np.ndarray
    model: LabelHits
    tables: TableHits

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean (C,) of precision and recall at A; 0 for concepts that are never predicted correctly."""
        return self._f1(self.model)

    def _f1(self, hits: LabelHits) -> np.ndarray:
        return 2 * hits.at_a / np.maximum(1, self.labels + hits.predicted)

    def best(self, count: int, least_labels: int) -> list[int]:
        """Return up to `count` concepts with at least `least_labels` labels that show most of what the model knows.

        First those with an F1 of at least `USEFUL_F1`, by how far it exceeds the better table's: these follow from more
        than the last two tokens. Then the others by F1. Ties by id.
        """
        ahead = self.f1 - np.maximum(self._f1(self.tables.token), self._f1(self.tables.bigram))
        order = np.argsort(-np.where(self.f1 >= USEFUL_F1, 2 + ahead, self.f1), kind="stable")
        return order[(self.labels >= least_labels)[order] & (self.model.at_a > 0)[order]][:count].tolist()


@torch.no_grad()
def concept_predictions(
    model: PreTrainedModel,
    blocks: Dataset,
    frequencies: np.ndarray,
    tables: LabelTables,
    batch_size: int,
    precision: str = "fp32",
) -> ConceptPredictions:
    """Measure precision, recall and calibration of concept predictions, overall, by frequency band and by concept.

    The concept loss of a token is the mean cross-entropy over its A labels. It is minimal where a concept's probability
    equals its expected number of labels divided by A. Calibration therefore compares A times the probability, the
    expected number of labels, with the observed number.

    Args:
        model: a CoCoMix model that predicts concepts, in evaluation mode.
        blocks: rows with the columns `input_ids` (T,) and `concept_ids` (T, A).
        frequencies: (C,) share of labeled training tokens that have each concept as a label.
        tables: baselines to score on the same tokens.
        batch_size: blocks per batch.
        precision: precision of the model's matrix products; later operations use float32.
    """
    assert not model.training, "evaluation in training mode"
    k = model.config.num_active_concepts
    counts = _Counts(torch.from_numpy(band_of(frequencies)).to(model.device), tables)
    rows = Blocks(blocks, ["input_ids", "concept_ids"])
    starts = range(0, len(blocks), batch_size)
    for start in progress_bar(starts, desc="concepts", unit="batch", leave=False, delay=1.0):
        batch = rows.batch(start, batch_size)
        tokens = Tokens.from_blocks(batch["input_ids"].numpy())
        counts.add_tables(tokens, batch["concept_ids"].flatten(0, 1).numpy(), k)
        ids, labels = (batch[name].to(model.device) for name in ("input_ids", "concept_ids"))
        with autocast(model.device, precision):
            z = model(input_ids=ids, use_cache=False, output_concepts=True, logits_to_keep=1).concept_logits
        labeled = (labels != IGNORE).any(-1)
        z, labels = z[labeled], labels[labeled]  # (N, C), (N, A)
        size = max(1, CHUNK_NUMBERS // z.shape[-1])
        for z_, labels_ in zip(z.split(size), labels.split(size), strict=True):
            counts.add(z_.float(), labels_, k)
    return counts.predictions()


def band_of(frequencies: np.ndarray) -> np.ndarray:
    """Return the band (C,) of each concept: the index of its upper bound in `BANDS`."""
    return np.searchsorted(-np.array(BANDS[1:-1]), -frequencies, side="left")


def band_names() -> list[str]:
    """Return the name of each band."""
    return [f"{low:.2%} to {high:.2%}" if low else f"below {high:.2%}" for high, low in pairwise(BANDS)]


class _Counts:
    """Sums over tokens, by concept (C,), and by band and calibration bin."""

    def __init__(self, bands: Tensor, tables: LabelTables) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=bands.device)

        self.band_of, self.tables = bands, tables
        self.tokens = 0
        self.labels = zeros(len(bands))
        self.model, self.token, self.bigram = (zeros(len(LabelHits._fields), len(bands)) for _ in range(3))
        self.pairs, self.promised, self.found = (zeros(len(BANDS) - 1, len(CALIBRATION_BOUNDS) - 1) for _ in range(3))

    def add_tables(self, tokens: Tokens, labels: np.ndarray, k: int) -> None:
        """Score the tables on tokens (N,) with labels (N, A)."""
        for total, table in ((self.token, self.tables.token), (self.bigram, self.tables.bigram)):
            hits = label_hits(table.predictions(tokens), labels, k, len(self.band_of))
            total += torch.from_numpy(np.stack(hits)).to(total)

    def add(self, z: Tensor, labels: Tensor, k: int) -> None:
        """Add tokens with concept logits z (N, C) and labels (N, A)."""
        bands, bins = self.pairs.shape
        valid = labels != IGNORE
        is_label = torch.zeros_like(z, dtype=torch.bool)
        is_label[valid.nonzero()[:, 0], labels[valid]] = True
        order = z.topk(max(k, labels.shape[-1]), dim=-1).indices
        predicted = torch.zeros_like(is_label)  # the A most probable concepts of each token, A its number of labels
        ranks = torch.arange(labels.shape[-1], device=z.device)
        predicted.scatter_(-1, order[:, : labels.shape[-1]], ranks < valid.sum(-1, keepdim=True))
        mixed = torch.zeros_like(is_label).scatter_(-1, order[:, :k], True)
        self.tokens += len(z)
        self.labels += is_label.sum(0)
        hits = (predicted, predicted & is_label, mixed, mixed & is_label)
        self.model += torch.stack([each.sum(0) for each in hits])
        promised = z.softmax(-1) * valid.sum(-1, keepdim=True)
        inner = torch.tensor(CALIBRATION_BOUNDS[1:-1], device=z.device)
        cell = (self.band_of * bins + torch.bucketize(promised, inner)).flatten()
        for total, weights in ((self.pairs, None), (self.promised, promised.double()), (self.found, is_label.double())):
            flat = None if weights is None else weights.flatten()
            total += torch.bincount(cell, flat, minlength=bands * bins).view(bands, bins).double()

    def predictions(self) -> ConceptPredictions:
        """Compute the results over all concepts, each non-empty band, and each concept."""
        everything = torch.ones_like(self.band_of, dtype=torch.bool)
        parts = [self._band("all", everything, slice(None))]
        for band, name in enumerate(band_names()):
            if (members := self.band_of == band).any():
                parts.append(self._band(name, members, slice(band, band + 1)))
        model, token, bigram = (
            LabelHits(*total.cpu().numpy().astype(np.int64)) for total in (self.model, self.token, self.bigram)
        )
        labels = self.labels.cpu().numpy().astype(np.int64)
        return ConceptPredictions(parts, self.tokens, labels, model, TableHits(token, bigram))

    def _band(self, name: str, members: Tensor, rows: slice) -> ConceptBand:
        """Compute the results over the concepts `members` (C,) bool, which are those of the bands `rows`."""
        labels = float(self.labels[members].sum())
        shares: dict[str, float | None] = {}
        for prefix, total in (("", self.model), ("table_", self.token), ("bigram_", self.bigram)):
            hits = LabelHits(*total[:, members].sum(-1).tolist())
            shares[f"{prefix}precision"] = float(hits.at_a / hits.predicted) if hits.predicted else None
            shares[f"{prefix}recall_at_a"] = float(hits.at_a / labels) if labels else None
            shares[f"{prefix}recall"] = float(hits.at_k / labels) if labels else None
        pairs, promised, found = (each[rows].sum(0).tolist() for each in (self.pairs, self.promised, self.found))
        return ConceptBand(
            name=name,
            concepts=int(members.sum()),
            labels=int(labels),
            **shares,
            misplaced=sum(abs(p - f) for p, f in zip(promised, found, strict=True)) / labels if labels else None,
            promises=[
                CalibrationBin(p / n, f / n, int(n)) for n, p, f in zip(pairs, promised, found, strict=True) if n
            ],
        )
