"""What training again with other seeds says of two ways of training: differences in pairs, one seed each.

Both trainings of a pair have the seed in common, so its order of the data. Intervals are Student's t over the
pairs: with three seeds they are some 2.5 standard deviations to either side, which is what three seeds can tell.
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class CostDifference:
    """What one way of training costs until it is as good as another at its end.

    Attributes:
        difference: as a share of what the other cost in all, less 1 (−0.3 is 30 % less); None unless every seed gets
            there.
        reached: seeds that get there.
        seeds: pairs.
    """

    difference: SeedDifference | None
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
    for our, their in zip(ours, theirs, strict=True):
        cost = cost_to_reach(our.costs, our.losses, float(their.losses[-1]))
        if cost is not None:
            shares.append(cost / float(their.costs[-1]) - 1)
    return CostDifference(over_seeds(shares) if len(shares) == len(ours) else None, len(shares), len(ours))
