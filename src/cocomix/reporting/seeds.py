"""Differences between two groups of runs over seeds, in pairs with the same seed.

The runs of a pair share the seed and so the order of the data. Intervals are Student's t over the pairs; with three
seeds they extend about 2.5 standard deviations to either side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cocomix.evaluation.verdicts import MarginTest, t_test
from cocomix.reporting.costs import cost_to_reach

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Curve:
    """The validation curve of a run.

    Attributes:
        costs: (evaluations,) cost until each evaluation, ascending.
        losses: (evaluations,) validation loss, nats per token.
    """

    costs: np.ndarray
    losses: np.ndarray


@dataclass(frozen=True)
class SeedDifference:
    """A difference between two groups of runs over seed pairs.

    Attributes:
        mean: mean over the pairs.
        sd: standard deviation; None for a single pair or for upper bounds.
        interval: 95 % confidence interval of the mean; None if `sd` is None.
        seeds: number of pairs.
    """

    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    seeds: int

    def test(self, bound: float, margin: float) -> MarginTest | None:
        """Test the mean against `bound` ± `margin`; None if the deviation is unknown."""
        return None if self.sd is None else t_test(self.mean - bound, self.sd, self.seeds, margin)


@dataclass(frozen=True)
class CostDifference:
    """The cost for one group to reach the final loss of another.

    Attributes:
        difference: that cost divided by the other group's total cost, minus 1 (−0.3 is 30 % less); None unless every
            seed reaches the loss.
        at_most: whether it is an upper bound, because some first evaluation already reaches the loss; deviation and
            interval are then unknown.
        reached: number of seeds that reach the loss.
        seeds: number of pairs.
    """

    difference: SeedDifference | None
    at_most: bool
    reached: int
    seeds: int


def over_seeds(values: Sequence[float]) -> SeedDifference:
    """Compute mean, deviation and interval of one value per pair."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return SeedDifference(mean, None, None, count)
    from scipy.stats import t as student_t

    deviation = float(np.std(values, ddof=1))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return SeedDifference(mean, deviation, (mean - half, mean + half), count)


def loss_difference(ours: Sequence[Curve], theirs: Sequence[Curve]) -> SeedDifference:
    """Compute the final loss of ours minus theirs, nats per token; both with the same seeds in the same order."""
    return over_seeds([float(our.losses[-1] - their.losses[-1]) for our, their in zip(ours, theirs, strict=True)])


def cost_difference(ours: Sequence[Curve], theirs: Sequence[Curve]) -> CostDifference:
    """Compute what it costs ours to reach the final loss of theirs; both with the same seeds in the same order."""
    shares = []
    at_most = False
    for our, their in zip(ours, theirs, strict=True):
        cost = cost_to_reach(our.costs, our.losses, float(their.losses[-1]))
        if cost is not None:
            shares.append(cost / float(their.costs[-1]) - 1)
            at_most |= starts_at(our.losses, float(their.losses[-1]))
    if len(shares) < len(ours):
        return CostDifference(None, False, len(shares), len(ours))
    difference = over_seeds(shares)
    if at_most:
        difference = replace(difference, sd=None, interval=None)
    elif difference.interval is not None:  # costs are not negative
        difference = replace(difference, interval=(max(-1.0, difference.interval[0]), difference.interval[1]))
    return CostDifference(difference, at_most, len(shares), len(ours))


def starts_at(losses: np.ndarray, loss: float) -> bool:
    """Return whether the first evaluation already reaches a loss, so that the cost is an upper bound."""
    return bool(losses[0] <= loss)
