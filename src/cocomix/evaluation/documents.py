"""The loss of each validation document, and what it says of two models: documents are the sample, not tokens.

N documents, or blocks where the corpus has no documents.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel

from cocomix import processes
from cocomix.data.blocks import Blocks, collate
from cocomix.data.documents import DocumentTokens
from cocomix.evaluation.validation import autocast
from cocomix.evaluation.verdicts import LOSS_MARGIN, MarginTest, from_tails

LOSSES_FILE = "validation-documents.npz"
RESAMPLES = 2000
FLIPS = 9999
"""Random signs of the paired test."""
SAMPLED_AT_ONCE = 1 << 22
"""Numbers drawn at once."""


@dataclass(frozen=True)
class DocumentLosses:
    """A model on validation text.

    Attributes:
        nll: (N,) float64, summed over a document's predicted tokens, nats.
        tokens: (N,) int64, predicted tokens of each; the first of a block is not predicted.
    """

    nll: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class PairedDifference:
    """A model's loss less another's, on the same documents.

    Attributes:
        difference: nats per token.
        interval: in which it lies in 95 of 100 bootstrap samples of the documents.
        p_value: of a paired randomisation test: how often a difference as large comes about if which of the two models
            a document's losses belong to is left to chance. Chance in the training is another matter, see seeds.
        test: the same randomization, one-sided, against a difference of `LOSS_MARGIN` either way.
        documents: N.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    test: MarginTest
    documents: int


@torch.no_grad()
def document_losses(
    model: PreTrainedModel, blocks: Dataset, documents: DocumentTokens | None, batch_size: int, precision: str
) -> DocumentLosses:
    """The losses of a model in evaluation mode; called by every process, each reads its share, all get the result.

    Args:
        model: any causal language model.
        blocks: of the validation side, whole.
        documents: which of them each token is in; without them, each block counts as one.
        batch_size: blocks read at once.
        precision: as in training.
    """
    assert not model.training, "evaluation in training mode"
    rows = Blocks(blocks, ["input_ids"])
    length = len(blocks[0]["input_ids"])
    count = len(blocks) if documents is None else len(documents)
    nll, tokens = np.zeros(count), np.zeros(count, dtype=np.int64)
    starts = range(0, len(blocks), batch_size)
    mine = processes.share(starts)
    for turn in range(math.ceil(len(starts) / processes.count())):
        start = mine[turn] if turn < len(mine) else starts[0]  # as in evaluate_model
        stop = min(start + batch_size, len(blocks))
        ids = collate(rows.__getitems__(list(range(start, stop))))["input_ids"].to(model.device)
        with autocast(model.device, precision):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        if turn >= len(mine):
            continue
        positions = (np.arange(start, stop)[:, None] * length + np.arange(1, length)).ravel()
        numbers = positions // length if documents is None else documents.number_of(positions)
        nll += np.bincount(numbers, weights=losses.double().cpu().numpy(), minlength=count)
        tokens += np.bincount(numbers, minlength=count)
    summed = processes.sum_arrays([nll, tokens.astype(np.float64)])
    return DocumentLosses(summed[0], summed[1].astype(np.int64))


def save_document_losses(losses: DocumentLosses, folder: Path) -> None:
    """Into the folder of a run; only of documents that have predicted tokens, which whole blocks decide."""
    read = losses.tokens > 0
    np.savez_compressed(folder / LOSSES_FILE, nll=losses.nll[read], tokens=losses.tokens[read])


def load_document_losses(folder: Path) -> DocumentLosses | None:
    """Of the run in `folder`; None if it has none."""
    if not (folder / LOSSES_FILE).is_file():
        return None
    with np.load(folder / LOSSES_FILE) as stored:
        return DocumentLosses(stored["nll"], stored["tokens"])


def paired_difference(ours: list[DocumentLosses], theirs: list[DocumentLosses]) -> PairedDifference:
    """Mean over our seeds less mean over theirs, and how sure the validation documents make of it.

    The interval is a paired bootstrap's: whole documents are drawn with replacement, the same ones for both. The test
    changes signs instead, since a bootstrap of few documents is too sure of them.

    Args:
        ours: of each seed, on the same documents in the same order.
        theirs: the same.
    """
    tokens = ours[0].tokens
    apart = np.mean([each.nll for each in ours], axis=0) - np.mean([each.nll for each in theirs], axis=0)
    interval = percentile_interval(bootstrap_ratios(apart, tokens))
    # As if the true difference were 0, or at either end of the margin.
    below, above = _sign_tails(np.stack([apart, apart + LOSS_MARGIN * tokens, apart - LOSS_MARGIN * tokens], axis=1))
    return PairedDifference(
        difference=float(apart.sum() / tokens.sum()),
        interval=interval,
        p_value=min(1.0, 2 * min(below[0], above[0])),
        test=from_tails((below[1], below[2]), (above[1], above[2])),
        documents=len(tokens),
    )


def _sign_tails(apart: np.ndarray) -> tuple[list[float], list[float]]:
    """Randomize the signs of differences (N, columns): the shares with a sum as low, and as high, as without.

    The signs as they are count as one of the draws.
    """
    draw = np.random.default_rng(0)
    at_once = max(1, SAMPLED_AT_ONCE // len(apart))
    seen, slack = apart.sum(0), 1e-12 * np.abs(apart).sum(0)  # equal sums may round apart
    low, high = np.ones(apart.shape[1]), np.ones(apart.shape[1])
    for start in range(0, FLIPS, at_once):
        signs = draw.integers(2, size=(min(at_once, FLIPS - start), len(apart))) * 2 - 1
        sums = signs @ apart
        low += (sums <= seen + slack).sum(0)
        high += (sums >= seen - slack).sum(0)
    return (low / (FLIPS + 1)).tolist(), (high / (FLIPS + 1)).tolist()


def bootstrap_ratios(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(RESAMPLES,) values of Σ sums / Σ counts over N documents drawn with replacement, whole ones.

    The draws are the same in every call with the same number of documents.

    Args:
        sums: (N,) of each document, nats say.
        counts: (N,) what they are divided by, tokens or bytes; above 0.
    """
    count = len(sums)
    draw = np.random.default_rng(0)
    at_once = max(1, SAMPLED_AT_ONCE // count)
    samples: list[np.ndarray] = []
    for start in range(0, RESAMPLES, at_once):
        chosen = draw.integers(count, size=(min(at_once, RESAMPLES - start), count))
        samples.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    return np.concatenate(samples)


def percentile_interval(samples: np.ndarray) -> tuple[float, float]:
    """In which 95 of 100 bootstrap samples lie."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
