"""What training again with other seeds says of two ways of training: differences in pairs, one seed each.

Both trainings of a pair have the seed in common, so its order of the data. Intervals are Student's t over the
pairs: with three seeds they are some 2.5 standard deviations to either side, which is what three seeds can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cocomix.evaluation.costs import cost_to_reach

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """One training.

    Attributes:
        costs: (evaluations,) what it had cost by each of its evaluations, ascending.
        losses: (evaluations,) validation loss, nats per token.
    """

    costs: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class SeedDifference:
    """A quantity of one way of training against another's, over seeds.

    Attributes:
        mean: over the pairs.
        sd: standard deviation; None of a single pair.
        interval: in which the mean of many pairs lies, at 95 %; None of a single pair.
        seeds: pairs.
    """

    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    seeds: int


def over_seeds(values: Sequence[float]) -> SeedDifference:
    """Mean, deviation and interval of a value per pair."""
    if len(values) < 2:
        return SeedDifference(float(values[0]), None, None, 1)
    deviation = float(np.std(values, ddof=1))
    if deviation == 0:
        return SeedDifference(float(values[0]), 0.0, (float(values[0]), float(values[0])), len(values))
    from scipy.stats import ttest_1samp

    low, high = ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return SeedDifference(float(np.mean(values)), deviation, (float(low), float(high)), len(values))


def loss_difference(ours: Sequence[Curve], theirs: Sequence[Curve]) -> SeedDifference:
    """Final loss of ours less theirs, nats per token; the same seeds in the same order."""
    return over_seeds([float(our.losses[-1] - their.losses[-1]) for our, their in zip(ours, theirs, strict=True)])


def cost_difference(ours: Sequence[Curve], theirs: Sequence[Curve]) -> SeedDifference | None:
    """What ours costs until the final loss of theirs, as a share of what theirs cost in all, less 1.

    Each seed against the same seed. −0.3 is 30 % less.

    Returns:
        None if any of ours never reaches that loss.
    """
    ratios = []
    for our, their in zip(ours, theirs, strict=True):
        cost = cost_to_reach(our.costs, our.losses, float(their.losses[-1]))
        if cost is None:
            return None
        ratios.append(cost / float(their.costs[-1]) - 1)
    return over_seeds(ratios)
