"""What a run has cost by each of its evaluations, and what runs are worth at equal cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cocomix.training.run import Run


class Axis(NamedTuple):
    """A kind of cost."""

    label: str
    costs: Callable[[Run, Sequence[Run]], np.ndarray]
    """(evaluations,) of a run among those it is compared with."""


def training_tokens(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Tokens read by each evaluation."""
    return np.array([point["tokens"] for point in run.curve], dtype=np.float64)


def student_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """FLOPs of the student's own training."""
    return training_tokens(run, compared) * run.training_flops_per_token


def shared_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """FLOPs of student and teacher in training, and an equal share of what was prepared for several runs.

    A teacher, SAE or labeling is made once for all runs that learn from it; each of those that are compared bears an
    equal part. What somebody else made costs nothing here.
    """
    users = Counter((kind, made["fingerprint"]) for each in compared for kind, made in each.preparation.items())
    share = sum((made["flops"] or 0.0) / users[kind, made["fingerprint"]] for kind, made in run.preparation.items())
    return share + _flops_in_training(run, compared)


def single_run_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """FLOPs of student and teacher in training, and of everything that was prepared, as if for this run alone."""
    prepared = sum(made["flops"] or 0.0 for made in run.preparation.values())
    return prepared + _flops_in_training(run, compared)


def _flops_in_training(run: Run, compared: Sequence[Run]) -> np.ndarray:
    per_token = run.training_flops_per_token + run.teacher_flops_per_token
    return training_tokens(run, compared) * per_token


def training_seconds(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Seconds of training."""
    return np.array(run.timing["curve"], dtype=np.float64)


AXES = {
    "tokens": Axis("training tokens", training_tokens),
    "student_flops": Axis("training FLOPs of the student", student_flops),
    "all_flops": Axis("FLOPs with a share of teacher, SAE and labels", shared_flops),
    "single_run_flops": Axis("FLOPs with teacher, SAE and labels, all paid by this run", single_run_flops),
    "seconds": Axis("seconds of training", training_seconds),
}
PREPARED = ("all_flops", "single_run_flops")
"""Axes that include what was made before the runs."""


@dataclass(frozen=True)
class EqualCost:
    """Losses of all runs where each has cost the same.

    Attributes:
        budget: the least that any of the runs cost in all; so each has been there.
        losses: validation loss of each run at that cost, linear between evaluations, nats per token; None before a
            run's first evaluation.
    """

    budget: float
    losses: list[float | None]


def at_equal_cost(runs: Sequence[Run], axis: Axis) -> EqualCost:
    """Compare runs at the cost of the cheapest."""
    costs = [axis.costs(run, runs) for run in runs]
    budget = min(float(of_run[-1]) for of_run in costs)
    return EqualCost(budget, [loss_at(of_run, losses_of(run), budget) for run, of_run in zip(runs, costs, strict=True)])


def loss_at(costs: np.ndarray, losses: np.ndarray, budget: float) -> float | None:
    """The loss of a curve at a cost; None before its first point."""
    return None if budget < costs[0] else float(np.interp(budget, costs, losses))


def cost_to_reach(costs: np.ndarray, losses: np.ndarray, loss: float) -> float | None:
    """The cost at which a curve first falls to `loss`, linear between its points.

    None if it never does. A curve that starts below `loss` gives its first point, an upper bound.
    """
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(costs[0])
    return float(np.interp(-loss, [-losses[at - 1], -losses[at]], [costs[at - 1], costs[at]]))


def losses_of(run: Run) -> np.ndarray:
    """(evaluations,) validation losses, nats per token."""
    return np.array([point["loss"] for point in run.curve])
