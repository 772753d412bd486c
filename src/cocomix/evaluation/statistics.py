"""Bootstrap intervals and paired tests that treat documents, not tokens, as the sample."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cocomix.evaluation.verdicts import LEVEL, LOSS_MARGIN, MarginTest, from_tails
from cocomix.training.documents import DocumentLosses

RESAMPLES = 2000
FLIPS = 9999
"""Random sign flips of the paired test."""
MIN_DOCUMENTS = 6
"""Fewest documents for an interval: of N documents that all differ alike, the smallest p is 2^(1 − N) > 0.05 below."""
SAMPLED_AT_ONCE = 1 << 22
"""Random numbers drawn at once."""


@dataclass(frozen=True)
class PairedDifference:
    """The loss of one model minus that of another, on the same documents.

    Attributes:
        difference: nats per token.
        interval: 95 % interval over documents: the differences that the test does not reject at 5 %, so it excludes 0
            exactly if `p_value` is below 0.05; None for fewer than `MIN_DOCUMENTS` documents.
        p_value: two-sided p-value of a paired randomization test, which swaps the two models' losses at random for each
            document; None if `interval` is. It does not cover the randomness of training; see `seeds`.
        test: the same randomization, one-sided, against a difference of ±`LOSS_MARGIN`; None if `interval` is.
        documents: N.
    """

    difference: float
    interval: tuple[float, float] | None
    p_value: float | None
    test: MarginTest | None
    documents: int


def paired_difference(ours: list[DocumentLosses], theirs: list[DocumentLosses]) -> PairedDifference:
    """Compare two groups of runs over documents: the mean over our seeds minus the mean over theirs.

    Args:
        ours: losses of each seed, on the same documents in the same order.
        theirs: the same for the other group.
    """
    tokens = ours[0].tokens
    apart = np.mean([each.nll for each in ours], axis=0) - np.mean([each.nll for each in theirs], axis=0)
    difference, count = float(apart.sum() / tokens.sum()), len(tokens)
    if count < MIN_DOCUMENTS:
        return PairedDifference(difference, None, None, None, count)
    ratios = _flipped_ratios(apart, tokens)
    (below, above), lower, higher = (_tails(ratios, true) for true in (0.0, -LOSS_MARGIN, LOSS_MARGIN))
    rank = round(LEVEL / 2 * (FLIPS + 1)) - 1 - (FLIPS - len(ratios))
    return PairedDifference(
        difference=difference,
        interval=(float(ratios[rank - 1]), float(ratios[-rank])),
        p_value=min(1.0, 2 * min(below, above)),
        test=from_tails((lower[0], higher[0]), (lower[1], higher[1])),
        documents=count,
    )


def _flipped_ratios(apart: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Flip the signs of the documents' differences at random; return the mean difference of the flipped documents.

    If the true difference is δ, flipping signs of apart − δ · tokens leads to a sum of at most the observed one
    exactly if the flipped documents differ by δ or more on average. These means therefore give the test of every δ.

    Args:
        apart: (N,) differences of the documents, nats.
        tokens: (N,) their tokens.

    Returns:
        At most FLIPS values, nats per token, ascending. Draws that flip nothing are left out.
    """
    draw = np.random.default_rng(0)
    at_once = max(1, SAMPLED_AT_ONCE // len(apart))
    columns = np.stack([apart, tokens], axis=1)
    drawn = (draw.integers(2, size=(min(at_once, FLIPS - start), len(apart))) for start in range(0, FLIPS, at_once))
    sums = np.concatenate([flipped @ columns for flipped in drawn])
    sums = sums[sums[:, 1] > 0]
    ratios = sums[:, 0] / sums[:, 1]
    ratios[np.abs(sums[:, 0]) <= 1e-12 * np.abs(apart).sum()] = 0.0  # equal sums may differ by rounding
    return np.sort(ratios)


def _tails(ratios: np.ndarray, true: float) -> tuple[float, float]:
    """Return the shares of flips with a sum of at most, and of at least, the observed one if `true` is the difference.

    The observed signs count as one of the draws, and a draw that flips nothing leads to the observed sum.
    """
    same = 1 + FLIPS - len(ratios)
    low, high = np.count_nonzero(ratios >= true), np.count_nonzero(ratios <= true)
    return (same + low) / (FLIPS + 1), (same + high) / (FLIPS + 1)


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
