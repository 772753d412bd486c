"""Weights of losses that change during a training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cocomix.common.errors import did_you_mean
from cocomix.common.settings import Share

KINDS: dict[str, Callable[[float], float]] = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
"""Factor of the weight at the share x, 0 ≤ x < 1, of the time in which the schedule is on."""


@dataclass(frozen=True)
class WeightSchedule:
    """The weight of a loss over a training; the weight is 0 before `start` and from `end` on.

    Args:
        kind: between `start` and `end`, constant at the given weight, or linear or cosine from it to 0.
        start: share of the training's steps after which the loss is on.
        end: share of the training's steps after which it is off.
    """

    kind: str = "constant"
    start: Share = 0.0
    end: Share = 1.0

    def problems(self) -> list[str]:
        """List what is wrong with these settings, one line each."""
        found = []
        if self.kind not in KINDS:
            known = ", ".join(KINDS)
            found.append(f"kind is {self.kind!r}; expected one of {known}{did_you_mean(self.kind, KINDS)}")
        if not self.start < self.end:
            found.append(f"start is {self.start} and end is {self.end}; start must be less than end")
        return found

    def factor(self, progress: float) -> float:
        """Return the factor of the weight in a step; `progress` is the share of the steps before it."""
        if not self.start <= progress < self.end:
            return 0.0
        return KINDS[self.kind]((progress - self.start) / (self.end - self.start))


def scheduled(weight: float, schedule: WeightSchedule | None, progress: float) -> float:
    """Return the weight of a loss in a step; without a schedule it is constant."""
    return weight if schedule is None else weight * schedule.factor(progress)
