"""Verdicts: whether a measured difference is of interest, is not of interest, or is not decided.

A difference is of interest if it exceeds a margin. Each hypothesis is tested one-sided at half the level. A single
verdict therefore agrees with the 95 % interval, which lies entirely beyond the margin or entirely within it. Verdicts
that are reported together are corrected for their number (Holm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

LEVEL = 0.05
"""Probability of any wrong verdict among those that are reported together."""
LOSS_MARGIN = 0.01
"""Smallest difference of interest between losses, nats per token: about 1 % of perplexity."""
COST_MARGIN = 0.05
"""Smallest difference of interest between costs, as a share of the baseline's."""


class Verdict(StrEnum):
    """Verdict on a difference from a bound."""

    LOWER = "lower"
    HIGHER = "higher"
    SAME = "no difference of interest"
    UNDECIDED = "not decided"


@dataclass(frozen=True)
class MarginTest:
    """One-sided p-values of the null hypotheses that each verdict rejects.

    Attributes:
        lower: null hypothesis: the difference is not below the lower end of the margin.
        higher: null hypothesis: the difference is not above the upper end.
        same: null hypothesis: the difference is not between them.
    """

    lower: float
    higher: float
    same: float

    @property
    def strongest(self) -> Verdict:
        """The verdict with the smallest p-value."""
        return min(((self.lower, Verdict.LOWER), (self.higher, Verdict.HIGHER), (self.same, Verdict.SAME)))[1]

    @property
    def p_value(self) -> float:
        """Two-sided p-value of the strongest verdict."""
        return min(1.0, 2 * min(self.lower, self.higher, self.same))


def from_tails(below: tuple[float, float], above: tuple[float, float]) -> MarginTest:
    """Combine one-sided p-values at both ends of the margin.

    Args:
        below: probabilities of a difference at most the observed one if the true one is at the lower, upper end.
        above: probabilities of a difference at least the observed one.
    """
    return MarginTest(lower=below[0], higher=above[1], same=max(above[0], below[1]))


def t_test(mean: float, sd: float, count: int, margin: float) -> MarginTest:
    """Test a mean over pairs with Student's t.

    Args:
        mean: mean over the pairs minus the bound to test.
        sd: standard deviation over the pairs.
        count: number of pairs, two or more.
        margin: smallest difference of interest; 0 if every difference from the bound is of interest.
    """
    from scipy.stats import t as student_t

    error = sd / math.sqrt(count)
    ends = [mean + margin, mean - margin]  # the distances from the lower and the upper end
    scores = [end / error if error else math.copysign(math.inf, end) if end else 0.0 for end in ends]
    below = float(student_t.cdf(scores[0], count - 1)), float(student_t.cdf(scores[1], count - 1))
    above = float(student_t.sf(scores[0], count - 1)), float(student_t.sf(scores[1], count - 1))
    return from_tails(below, above)


def verdicts(tests: Sequence[MarginTest | None]) -> list[Verdict]:
    """Decide several tests together with Holm's method; None, a missing test, stays undecided."""
    tested = [at for at, test in enumerate(tests) if test is not None]
    p_values = np.array([test.p_value for test in tests if test is not None])
    order = np.argsort(p_values, kind="stable")
    adjusted = np.maximum.accumulate(p_values[order] * np.arange(len(order), 0, -1))
    found = [Verdict.UNDECIDED] * len(tests)
    for at, p_value in zip(order, adjusted, strict=True):
        test = tests[tested[at]]
        if test is not None and p_value <= LEVEL:
            found[tested[at]] = test.strongest
    return found
