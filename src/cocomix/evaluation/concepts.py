"""How well a model predicts its concepts, beside a table that sees the current token only.

B blocks, T tokens, N labelled tokens, C concepts, A labels per token, K concepts that the model mixes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cocomix.concepts.label_baselines import SAMPLE_BLOCKS, TokenTable
from cocomix.concepts.label_statistics import label_statistics
from cocomix.data.blocks import Blocks, collate
from cocomix.evaluation.validation import autocast
from cocomix.models.losses import IGNORE

BANDS = (1.0, 0.1, 0.01, 1e-3, 1e-4, 0.0)
"""Bounds of the frequency bands: the share of the labelled tokens that have a concept as a label."""
PROMISES = (0.0, 1e-4, 1e-3, 0.01, 0.03, 0.1, 0.3, 0.6, 1.0)
"""Bounds of the bins in which promised labels are compared with those that are there."""
CHUNK_NUMBERS = 1 << 22
"""Promises (tokens × concepts) looked at together."""


@dataclass(frozen=True)
class Promise:
    """Predictions of about one strength, and what became of them.

    Attributes:
        promised: labels that the model expects per prediction, mean.
        found: labels per prediction that are there.
        predictions: (token, concept) pairs.
    """

    promised: float
    found: float
    predictions: int


@dataclass(frozen=True)
class ConceptBand:
    """Concepts of about one frequency, and how well a model predicts them.

    Attributes:
        name: the frequencies.
        concepts: number of them.
        labels: of the evaluated tokens that are among them.
        precision: of each token's A most probable concepts, those of this band: the share that are labels (A being the
            labels that the token has); None if none is ever predicted.
        recall_at_a: share of the labels that are among the token's A most probable concepts; None without labels.
        recall: share of the labels that are among the K that the model mixes; None without labels.
        table_recall_at_a: the same share as `recall_at_a` for a `TokenTable`; None without labels.
        table_recall: the same share as `recall` for the table; None without labels.
        misplaced: labels promised too much or too little, summed over `promises`, as a share of the labels; None
            without labels. 0 is a calibrated prediction.
        promises: weakest first.
    """

    name: str
    concepts: int
    labels: int
    precision: float | None
    recall_at_a: float | None
    recall: float | None
    table_recall_at_a: float | None
    table_recall: float | None
    misplaced: float | None
    promises: list[Promise]


@dataclass(frozen=True)
class ConceptPredictions:
    """How a model's predictions of concepts compare with the labels of some text.

    Attributes:
        bands: of all concepts, then by frequency.
        tokens: N, those that were evaluated.
        labels: (C,) of them, by concept.
        predicted: (C,) tokens at which the concept is among the A most probable, A being the labels of the token.
        right: (C,) of those, where it is a label.
        mixed: (C,) tokens at which it is among the K that the model mixes.
        found: (C,) of those, where it is a label.
        table_right: (C,) labels that a `TokenTable` predicts with as many predictions as the token has labels.
        table_found: (C,) labels that it predicts with K predictions.
    """

    bands: list[ConceptBand]
    tokens: int
    labels: np.ndarray
    predicted: np.ndarray
    right: np.ndarray
    mixed: np.ndarray
    found: np.ndarray
    table_right: np.ndarray
    table_found: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(C,) harmonic mean of precision and recall at A; 0 of concepts that are never right."""
        return 2 * self.right / np.maximum(1, self.labels + self.predicted)

    def best(self, count: int, least_labels: int) -> list[int]:
        """The concepts with the largest F1, of those with so many labels; at most `count`, ties by number."""
        order = np.argsort(-self.f1, kind="stable")
        return order[(self.labels >= least_labels)[order] & (self.right > 0)[order]][:count].tolist()


@torch.no_grad()
def concept_predictions(
    model: PreTrainedModel,
    blocks: Dataset,
    frequencies: np.ndarray,
    table: TokenTable,
    batch_size: int,
    precision: str = "fp32",
) -> ConceptPredictions:
    """Precision, recall and calibration of predicted concepts, of all, by frequency band, and of each.

    The concept loss of a token is the mean of the cross-entropies of its labels, so it is least where a concept's
    probability is the expected number of labels with that concept over A: A times the probability is what the model
    promises, and is compared with what is there.

    Args:
        model: a CoCoMix model that predicts concepts, in evaluation mode.
        blocks: with columns `input_ids` (T,) and `concept_ids` (T, A).
        frequencies: (C,) share of the labelled training tokens that have each concept as a label.
        table: scored on the same tokens.
        batch_size: blocks read at once.
        precision: of the model's matrix products; what comes after them is float32.
    """
    assert not model.training, "evaluation in training mode"
    k = model.config.num_active_concepts
    counts = _Counts(torch.from_numpy(band_of(frequencies)).to(model.device), table)
    rows = Blocks(blocks, ["input_ids", "concept_ids"])
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc="concepts", unit="batch", leave=False, delay=1.0):
        batch = collate(rows.__getitems__(list(range(start, min(start + batch_size, len(blocks))))))
        counts.add_table(batch["input_ids"].flatten().numpy(), batch["concept_ids"].flatten(0, 1).numpy(), k)
        ids, labels = (batch[name].to(model.device) for name in ("input_ids", "concept_ids"))
        with autocast(model.device, precision):
            z = model(input_ids=ids, use_cache=False, output_concepts=True, logits_to_keep=1).concept_logits
        labelled = (labels != IGNORE).any(-1)
        z, labels = z[labelled], labels[labelled]  # (N, C), (N, A)
        size = max(1, CHUNK_NUMBERS // z.shape[-1])
        for z_, labels_ in zip(z.split(size), labels.split(size), strict=True):
            counts.add(z_.float(), labels_, k)
    return counts.predictions()


def band_of(frequencies: np.ndarray) -> np.ndarray:
    """(C,) the band of each concept: the index of its upper bound in `BANDS`."""
    return np.searchsorted(-np.array(BANDS[1:-1]), -frequencies, side="left")


def band_names() -> list[str]:
    """What each band is called."""
    return [f"{low:.2%} to {high:.2%}" if low else f"below {high:.2%}" for high, low in pairwise(BANDS)]


class _Counts:
    """Sums over tokens: of each concept, and of each band (C,) by strength of the promise."""

    def __init__(self, bands: Tensor, table: TokenTable) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=bands.device)

        self.band_of, self.table = bands, table
        self.table_at_a, self.table_at_k = zeros(len(bands)), zeros(len(bands))
        self.tokens = 0
        self.labels, self.predicted, self.at_a, self.mixed, self.at_k = (zeros(len(bands)) for _ in range(5))
        self.pairs, self.promised, self.found = (zeros(len(BANDS) - 1, len(PROMISES) - 1) for _ in range(3))

    def add_table(self, ids: np.ndarray, labels: np.ndarray, k: int) -> None:
        """Score the table on tokens (N,) with labels (N, A)."""
        at_a, at_k = self.table.hits(ids, labels, k)
        self.table_at_a += torch.from_numpy(at_a).to(self.table_at_a)
        self.table_at_k += torch.from_numpy(at_k).to(self.table_at_k)

    def add(self, z: Tensor, labels: Tensor, k: int) -> None:
        """Tokens with concept logits z (N, C) and labels (N, A)."""
        bands, bins = self.pairs.shape
        has = labels != IGNORE
        there = torch.zeros_like(z, dtype=torch.bool)
        there[has.nonzero()[:, 0], labels[has]] = True
        order = z.topk(max(k, labels.shape[-1]), dim=-1).indices
        first = torch.zeros_like(there)  # each token's A most probable, A being how many labels it has
        ranks = torch.arange(labels.shape[-1], device=z.device)
        first.scatter_(-1, order[:, : labels.shape[-1]], ranks < has.sum(-1, keepdim=True))
        mixed = torch.zeros_like(there).scatter_(-1, order[:, :k], True)
        self.tokens += len(z)
        self.labels += there.sum(0)
        self.predicted += first.sum(0)
        self.at_a += (first & there).sum(0)
        self.mixed += mixed.sum(0)
        self.at_k += (mixed & there).sum(0)
        promised = z.softmax(-1) * has.sum(-1, keepdim=True)
        inner = torch.tensor(PROMISES[1:-1], device=z.device)
        cell = (self.band_of * bins + torch.bucketize(promised, inner)).flatten()
        for total, weights in ((self.pairs, None), (self.promised, promised.double()), (self.found, there.double())):
            flat = None if weights is None else weights.flatten()
            total += torch.bincount(cell, flat, minlength=bands * bins).view(bands, bins).double()

    def predictions(self) -> ConceptPredictions:
        """All concepts, each band that has some, and each concept."""
        everything = torch.ones_like(self.band_of, dtype=torch.bool)
        parts = [self._band("all", everything, slice(None))]
        for band, name in enumerate(band_names()):
            if (members := self.band_of == band).any():
                parts.append(self._band(name, members, slice(band, band + 1)))
        of_model = (self.labels, self.predicted, self.at_a, self.mixed, self.at_k)
        counts = (each.cpu().numpy().astype(np.int64) for each in (*of_model, self.table_at_a, self.table_at_k))
        return ConceptPredictions(parts, self.tokens, *counts)

    def _band(self, name: str, members: Tensor, rows: slice) -> ConceptBand:
        """Of the concepts `members` (C,) bool, and the same by `rows` of the bands."""
        labels, at_a, at_k, predicted = (
            float(each[members].sum()) for each in (self.labels, self.at_a, self.at_k, self.predicted)
        )
        table_at_a, table_at_k = (float(each[members].sum()) for each in (self.table_at_a, self.table_at_k))
        pairs, promised, found = (each[rows].sum(0).tolist() for each in (self.pairs, self.promised, self.found))
        return ConceptBand(
            name=name,
            concepts=int(members.sum()),
            labels=int(labels),
            precision=at_a / predicted if predicted else None,
            recall_at_a=at_a / labels if labels else None,
            recall=at_k / labels if labels else None,
            table_recall_at_a=table_at_a / labels if labels else None,
            table_recall=table_at_k / labels if labels else None,
            misplaced=sum(abs(p - f) for p, f in zip(promised, found, strict=True)) / labels if labels else None,
            promises=[Promise(p / n, f / n, int(n)) for n, p, f in zip(pairs, promised, found, strict=True) if n],
        )


def label_frequencies(blocks: Dataset, num_concepts: int) -> np.ndarray:
    """(C,) share of the labelled tokens that have each concept as a label, in the first `SAMPLE_BLOCKS` blocks."""
    found = label_statistics(blocks.select(range(min(SAMPLE_BLOCKS, len(blocks)))), num_concepts)
    return found.concept_counts / max(1, int(found.slots[1:].sum()))
