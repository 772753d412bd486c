"""What training again with other seeds says of two ways of training: differences in pairs, one seed each.

Both trainings of a pair have the seed in common, so its order of the data. Intervals are Student's t over the
pairs: with three seeds they are some 2.5 standard deviations to either side, which is what three seeds can tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cocomix.evaluation.costs import cost_to_reach
from cocomix.evaluation.verdicts import MarginTest, t_test

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
        sd: standard deviation; None of a single pair, or of upper bounds.
        interval: in which the mean of many pairs lies, at 95 %; None where the deviation is.
        seeds: pairs.
    """

    mean: float
    sd: float | None
    interval: tuple[float, float] | None
    seeds: int

    def test(self, bound: float, margin: float) -> MarginTest | None:
        """Test the mean against `bound` ± `margin`; None where its deviation is not known."""
        return None if self.sd is None else t_test(self.mean - bound, self.sd, self.seeds, margin)


@dataclass(frozen=True)
class CostDifference:
    """What one way of training costs until it is as good as another at its end.

    Attributes:
        difference: as a share of what the other cost in all, less 1 (−0.3 is 30 % less); None unless every seed gets
            there.
        at_most: whether that is an upper bound, because a seed is there by its first evaluation; its deviation and
            interval are unknown then.
        reached: seeds that get there.
        seeds: pairs.
    """

    difference: SeedDifference | None
    at_most: bool
    reached: int
    seeds: int


def over_seeds(values: Sequence[float]) -> SeedDifference:
    """Mean, deviation and interval of a value per pair."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return SeedDifference(mean, None, None, count)
    from scipy.stats import t as student_t

    deviation = float(np.std(values, ddof=1))
    half = float(student_t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return SeedDifference(mean, deviation, (mean - half, mean + half), count)


def loss_difference(ours: Sequence[Curve], theirs: Sequence[Curve]) -> SeedDifference:
    """Final loss of ours less theirs, nats per token; the same seeds in the same order."""
    return over_seeds([float(our.losses[-1] - their.losses[-1]) for our, their in zip(ours, theirs, strict=True)])


def cost_difference(ours: Sequence[Curve], theirs: Sequence[Curve]) -> CostDifference:
    """What ours costs until the final loss of theirs; each seed against the same seed."""
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
    elif difference.interval is not None:  # no cost is below 0
        difference = replace(difference, interval=(max(-1.0, difference.interval[0]), difference.interval[1]))
    return CostDifference(difference, at_most, len(shares), len(ours))


def starts_at(losses: np.ndarray, loss: float) -> bool:
    """Whether a curve has a loss by its first evaluation, so that the cost to reach it is an upper bound."""
    return bool(losses[0] <= loss)
