"""How well a model predicts its concepts, and what a model that has learnt nothing about its input would score.

B blocks, T tokens, N labelled tokens, C concepts, A labels per token, K concepts that the model mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from cocomix.concepts.label_statistics import label_statistics
from cocomix.data.blocks import Blocks, collate
from cocomix.evaluation.validation import autocast
from cocomix.models.losses import IGNORE

SAMPLE_BLOCKS = 4096
"""Training blocks from which frequencies are counted."""
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
    misplaced: float | None
    promises: list[Promise]


@torch.no_grad()
def concept_bands(
    model: PreTrainedModel, blocks: Dataset, frequencies: np.ndarray, batch_size: int, precision: str = "fp32"
) -> list[ConceptBand]:
    """Precision, recall and calibration of predicted concepts, first of all concepts, then by frequency band.

    The concept loss of a token is the mean of the cross-entropies of its labels, so it is least where a concept's
    probability is the expected number of labels with that concept over A: A times the probability is what the model
    promises, and is compared with what is there.

    Args:
        model: a CoCoMix model that predicts concepts, in evaluation mode.
        blocks: with columns `input_ids` (T,) and `concept_ids` (T, A).
        frequencies: (C,) share of the labelled training tokens that have each concept as a label.
        batch_size: blocks read at once.
        precision: of the model's matrix products; what comes after them is float32.
    """
    assert not model.training, "evaluation in training mode"
    band_of = torch.from_numpy(np.searchsorted(-np.array(BANDS[1:-1]), -frequencies, side="left")).to(model.device)
    counts = _Counts(len(BANDS) - 1, model.device)
    rows = Blocks(blocks, ["input_ids", "concept_ids"])
    starts = range(0, len(blocks), batch_size)
    for start in tqdm(starts, desc="concepts", unit="batch", leave=False, delay=1.0):
        batch = collate(rows.__getitems__(list(range(start, min(start + batch_size, len(blocks))))))
        ids, labels = (batch[name].to(model.device) for name in ("input_ids", "concept_ids"))
        with autocast(model.device, precision):
            z = model(input_ids=ids, use_cache=False, output_concepts=True, logits_to_keep=1).concept_logits
        labelled = (labels != IGNORE).any(-1)
        z, labels = z[labelled], labels[labelled]  # (N, C), (N, A)
        size = max(1, CHUNK_NUMBERS // z.shape[-1])
        for z_, labels_ in zip(z.split(size), labels.split(size), strict=True):
            counts.add(z_.float(), labels_, band_of, model.config.num_active_concepts)
    return counts.bands(np.bincount(band_of.cpu().numpy(), minlength=len(BANDS) - 1))


class _Counts:
    """Sums over tokens, by band."""

    def __init__(self, bands: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.labels, self.at_a, self.at_k, self.predicted = (zeros(bands) for _ in range(4))
        self.pairs, self.promised, self.found = (zeros(bands, len(PROMISES) - 1) for _ in range(3))

    def add(self, z: Tensor, labels: Tensor, band_of: Tensor, k: int) -> None:
        """Tokens with concept logits z (N, C) and labels (N, A); `band_of` (C,) is each concept's band."""
        bands, bins = self.pairs.shape
        has = labels != IGNORE
        there = torch.zeros_like(z, dtype=torch.bool)
        there[has.nonzero()[:, 0], labels[has]] = True
        order = z.topk(max(k, labels.shape[-1]), dim=-1).indices
        first = torch.zeros_like(there)  # each token's A most probable, A being how many labels it has
        ranks = torch.arange(labels.shape[-1], device=z.device)
        first.scatter_(-1, order[:, : labels.shape[-1]], ranks < has.sum(-1, keepdim=True))
        mixed = torch.zeros_like(there).scatter_(-1, order[:, :k], True)

        def by_band(chosen: Tensor) -> Tensor:
            return torch.bincount(band_of[chosen.nonzero()[:, 1]], minlength=bands).double()

        self.labels += by_band(there)
        self.predicted += by_band(first)
        self.at_a += by_band(first & there)
        self.at_k += by_band(mixed & there)
        promised = z.softmax(-1) * has.sum(-1, keepdim=True)
        inner = torch.tensor(PROMISES[1:-1], device=z.device)
        cell = (band_of * bins + torch.bucketize(promised, inner)).flatten()
        for total, weights in ((self.pairs, None), (self.promised, promised.double()), (self.found, there.double())):
            flat = None if weights is None else weights.flatten()
            total += torch.bincount(cell, flat, minlength=bands * bins).view(bands, bins).double()

    def bands(self, concepts: np.ndarray) -> list[ConceptBand]:
        """All concepts, and each band that has some, of which there are `concepts` (bands,)."""
        names = [f"{low:.2%} to {high:.2%}" if low else f"below {high:.2%}" for high, low in pairwise(BANDS)]
        parts = [("all", list(range(len(concepts))))]
        parts += [(name, [band]) for band, name in enumerate(names) if concepts[band]]
        return [self._band(name, members, int(concepts[members].sum())) for name, members in parts]

    def _band(self, name: str, members: Sequence[int], concepts: int) -> ConceptBand:
        labels, at_a, at_k, predicted = (
            float(each[members].sum()) for each in (self.labels, self.at_a, self.at_k, self.predicted)
        )
        pairs, promised, found = (each[members].sum(0).tolist() for each in (self.pairs, self.promised, self.found))
        return ConceptBand(
            name=name,
            concepts=concepts,
            labels=int(labels),
            precision=at_a / predicted if predicted else None,
            recall_at_a=at_a / labels if labels else None,
            recall=at_k / labels if labels else None,
            misplaced=sum(abs(p - f) for p, f in zip(promised, found, strict=True)) / labels if labels else None,
            promises=[Promise(p / n, f / n, int(n)) for n, p, f in zip(pairs, promised, found, strict=True) if n],
        )


def label_frequencies(blocks: Dataset, num_concepts: int) -> np.ndarray:
    """(C,) share of the labelled tokens that have each concept as a label, in the first `SAMPLE_BLOCKS` blocks."""
    found = label_statistics(blocks.select(range(min(SAMPLE_BLOCKS, len(blocks)))), num_concepts)
    return found.concept_counts / max(1, int(found.slots[1:].sum()))


def constant_recall(train: Dataset, validation: Dataset, num_concepts: int, k: int) -> float:
    """Share of the validation labels that are among the k most frequent training labels.

    The recall of predicting the same k concepts at every token: what a predictor has to beat.

    Args:
        train: blocks with `concept_ids` (T, A); the first `SAMPLE_BLOCKS` are counted.
        validation: the same.
        num_concepts: C.
        k: predictions per token.
    """
    frequent = np.argsort(-label_frequencies(train, num_concepts), kind="stable")[:k]
    labels = label_statistics(validation, num_concepts).concept_counts
    return float(labels[frequent].sum() / max(1, labels.sum()))
