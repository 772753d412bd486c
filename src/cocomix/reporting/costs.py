"""The cost of a run at each of its evaluations, and losses at equal cost."""

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
    """Costs (evaluations,) of a run, given all runs of the comparison."""


def training_tokens(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the training tokens until each evaluation."""
    return np.array([point["tokens"] for point in run.curve], dtype=np.float64)


def student_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the FLOPs of the student's own training until each evaluation."""
    return training_tokens(run, compared) * run.training_flops_per_token


def shared_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the FLOPs of student and teacher in training plus an equal share of the preparation.

    The compared runs that learn from the same teacher, SAE or labels share its FLOPs equally. Artifacts with unknown
    FLOPs, which come from elsewhere, count as 0.
    """
    users = Counter((kind, each["fingerprint"]) for other in compared for kind, each in other.preparation.items())
    share = sum((each["flops"] or 0.0) / users[kind, each["fingerprint"]] for kind, each in run.preparation.items())
    return share + _flops_in_training(run, compared)


def single_run_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the FLOPs of student and teacher in training plus all of the preparation."""
    prepared = sum(each["flops"] or 0.0 for each in run.preparation.values())
    return prepared + _flops_in_training(run, compared)


def _flops_in_training(run: Run, compared: Sequence[Run]) -> np.ndarray:
    per_token = run.training_flops_per_token + run.teacher_flops_per_token
    return training_tokens(run, compared) * per_token


def training_seconds(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the seconds of training until each evaluation."""
    return np.array(run.timing["curve"], dtype=np.float64)


AXES = {
    "tokens": Axis("training tokens", training_tokens),
    "student_flops": Axis("training FLOPs of the student", student_flops),
    "all_flops": Axis("FLOPs with a share of teacher, SAE and labels", shared_flops),
    "single_run_flops": Axis("FLOPs with teacher, SAE and labels, all paid by this run", single_run_flops),
    "seconds": Axis("seconds of training", training_seconds),
}
PREPARED = ("all_flops", "single_run_flops")
"""Axes that include the preparation of teacher, SAE and labels."""


@dataclass(frozen=True)
class EqualCost:
    """Losses of runs at the same cost.

    Attributes:
        budget: total cost of the cheapest run.
        losses: validation loss of each run at that cost, nats per token, interpolated linearly between evaluations;
            None if the budget is below the cost of the run's first evaluation.
    """

    budget: float
    losses: list[float | None]


def at_equal_cost(runs: Sequence[Run], axis: Axis) -> EqualCost:
    """Compare runs at the total cost of the cheapest."""
    costs = [axis.costs(run, runs) for run in runs]
    budget = min(float(run_costs[-1]) for run_costs in costs)
    losses = [loss_at(run_costs, losses_of(run), budget) for run, run_costs in zip(runs, costs, strict=True)]
    return EqualCost(budget, losses)


def loss_at(costs: np.ndarray, losses: np.ndarray, budget: float) -> float | None:
    """Interpolate the loss of a curve at a cost; None below its first point."""
    return None if budget < costs[0] else float(np.interp(budget, costs, losses))


def cost_to_reach(costs: np.ndarray, losses: np.ndarray, loss: float) -> float | None:
    """Return the cost at which a curve first reaches `loss`, interpolated linearly; None if it never does.

    If the first point already reaches `loss`, its cost is returned, which is an upper bound.
    """
    reached = np.flatnonzero(losses <= loss)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(costs[0])
    return float(np.interp(-loss, [-losses[at - 1], -losses[at]], [costs[at - 1], costs[at]]))


def losses_of(run: Run) -> np.ndarray:
    """Return the validation losses (evaluations,), nats per token."""
    return np.array([point["loss"] for point in run.curve])
