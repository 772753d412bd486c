"""Bootstrap intervals and paired tests that treat documents, not tokens, as the sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cocomix.evaluation.verdicts import LOSS_MARGIN, MarginTest, from_tails
from cocomix.training.documents import DocumentLosses

RESAMPLES = 2000
FLIPS = 9999
"""Random sign flips of the paired test."""
SAMPLED_AT_ONCE = 1 << 22
"""Random numbers drawn at once."""


@dataclass(frozen=True)
class PairedDifference:
    """The loss of one model minus that of another, on the same documents.

    Attributes:
        difference: nats per token.
        interval: 95 % bootstrap interval over documents.
        p_value: two-sided p-value of a paired randomization test, which swaps the two models' losses at random for each
            document. It does not cover the randomness of training; see `seeds`.
        test: the same randomization, one-sided, against a difference of ±`LOSS_MARGIN`.
        documents: N.
    """

    difference: float
    interval: tuple[float, float]
    p_value: float
    test: MarginTest
    documents: int


def paired_difference(ours: list[DocumentLosses], theirs: list[DocumentLosses]) -> PairedDifference:
    """Compare two groups of runs over documents: the mean over our seeds minus the mean over theirs.

    The interval is a paired bootstrap: documents are drawn with replacement, the same ones for both groups. The test
    flips signs instead, because a bootstrap of few documents underestimates the uncertainty.

    Args:
        ours: losses of each seed, on the same documents in the same order.
        theirs: the same for the other group.
    """
    tokens = ours[0].tokens
    apart = np.mean([each.nll for each in ours], axis=0) - np.mean([each.nll for each in theirs], axis=0)
    interval = percentile_interval(bootstrap_ratios(apart, tokens))
    # Null hypotheses: the true difference is 0, or at either end of the margin.
    below, above = _sign_tails(np.stack([apart, apart + LOSS_MARGIN * tokens, apart - LOSS_MARGIN * tokens], axis=1))
    return PairedDifference(
        difference=float(apart.sum() / tokens.sum()),
        interval=interval,
        p_value=min(1.0, 2 * min(below[0], above[0])),
        test=from_tails((below[1], below[2]), (above[1], above[2])),
        documents=len(tokens),
    )


def _sign_tails(apart: np.ndarray) -> tuple[list[float], list[float]]:
    """Flip the signs of differences (N, columns) at random.

    The observed signs count as one of the draws.

    Returns:
        For each column, the share of draws whose sum is at most, and at least, the observed sum.
    """
    draw = np.random.default_rng(0)
    at_once = max(1, SAMPLED_AT_ONCE // len(apart))
    seen, slack = apart.sum(0), 1e-12 * np.abs(apart).sum(0)  # equal sums may differ by rounding
    low, high = np.ones(apart.shape[1]), np.ones(apart.shape[1])
    for start in range(0, FLIPS, at_once):
        signs = draw.integers(2, size=(min(at_once, FLIPS - start), len(apart))) * 2 - 1
        sums = signs @ apart
        low += (sums <= seen + slack).sum(0)
        high += (sums >= seen - slack).sum(0)
    return (low / (FLIPS + 1)).tolist(), (high / (FLIPS + 1)).tolist()


def bootstrap_ratios(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute bootstrap samples (RESAMPLES,) of Σ sums / Σ counts over N documents drawn with replacement.

    The draws depend only on the number of documents.

    Args:
        sums: (N,) sum of each document, for example nats.
        counts: (N,) positive denominators, tokens or bytes.
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
    """Return the 95 % percentile interval of bootstrap samples."""
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)
