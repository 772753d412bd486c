"""The cost of a run at each of its evaluations, and losses at equal cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from cocomix.training.config import TrainingConfig
from cocomix.training.run import Run


class Axis(NamedTuple):
    """A kind of cost."""

    label: str
    costs: Callable[[Run, Sequence[Run]], np.ndarray]
    """Costs (evaluations,) of a run, given all runs of the comparison."""
    shares_training: bool = False
    """Whether steps that several runs share, because one continues another, count only once."""


def training_tokens(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the training tokens until each evaluation."""
    return np.array([point["tokens"] for point in run.curve], dtype=np.float64)


def student_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the FLOPs of the student's own training until each evaluation."""
    return training_tokens(run, compared) * run.training_flops_per_token


def shared_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the FLOPs of student and teacher in training plus an equal share of the preparation.

    The compared runs that learn from the same teacher, SAE or labels share its FLOPs equally. Artifacts with unknown
    FLOPs, which come from elsewhere, count as 0. A branch pays for its decay only, and the run that it continues
    pays for the part before; if that run is not compared, the branch that leaves it last does.
    """
    users = Counter((kind, each["fingerprint"]) for other in compared for kind, each in other.preparation.items())
    share = sum((each["flops"] or 0.0) / users[kind, each["fingerprint"]] for kind, each in run.preparation.items())
    paid = np.maximum(0.0, training_tokens(run, compared) - shared_tokens(run, compared))
    return share + paid * _flops_per_token(run)


def shared_tokens(run: Run, compared: Sequence[Run]) -> float:
    """Return the training tokens of a branch that another of the compared runs pays for; 0 if none does."""
    found, leaves = 0.0, _leaves_trunk(run)
    for number, other in enumerate(compared):
        if other is run or leaves == math.inf or not _same_trunk(run, other):
            continue
        other_leaves = _leaves_trunk(other)
        is_later = other_leaves > leaves or (other_leaves == leaves and number < _index(run, compared))
        found = leaves if is_later else found
    return found


def _index(run: Run, compared: Sequence[Run]) -> int:
    return next(number for number, other in enumerate(compared) if other is run)


def _leaves_trunk(run: Run) -> float:
    """Return the training tokens after which a branch leaves the run that it continues; infinity for other runs."""
    student = run.recipe.get("students", {}).get(run.name, {})
    if not student.get("branch_from"):
        return math.inf
    training = TrainingConfig(**{**run.recipe["training"], **(student["training"] or {})})
    return float(training.decay_start() * training.tokens_per_step)


def _same_trunk(run: Run, other: Run) -> bool:
    """Return whether both runs are, or continue, the same training: up to where one leaves it, they are equal."""

    def trunk(each: Run) -> tuple[Any, ...]:
        student = each.recipe.get("students", {}).get(each.name, {})
        return student.get("branch_from") or each.name, each.seed, each.corpus, each.training_flops_per_token

    until = min(_leaves_trunk(run), _leaves_trunk(other))
    start, other_start = (
        [(point["tokens"], point["loss"]) for point in each.curve if point["tokens"] <= until] for each in (run, other)
    )
    return trunk(run) == trunk(other) and start == other_start


def single_run_flops(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the FLOPs of student and teacher in training plus all of the preparation."""
    prepared = sum(each["flops"] or 0.0 for each in run.preparation.values())
    return prepared + training_tokens(run, compared) * _flops_per_token(run)


def _flops_per_token(run: Run) -> int:
    return run.training_flops_per_token + run.teacher_flops_per_token


def training_seconds(run: Run, compared: Sequence[Run]) -> np.ndarray:
    """Return the seconds of training until each evaluation."""
    return np.array(run.timing["curve"], dtype=np.float64)


AXES = {
    "tokens": Axis("training tokens", training_tokens),
    "student_flops": Axis("training FLOPs of the student", student_flops),
    "all_flops": Axis("FLOPs with a share of teacher, SAE and labels", shared_flops, shares_training=True),
    "single_run_flops": Axis("FLOPs with teacher, SAE and labels, all paid by this run", single_run_flops),
    "seconds": Axis("seconds of training", training_seconds),
}


@dataclass(frozen=True)
class EqualCost:
    """Losses of runs at the same cost.

    Attributes:
        budget: total cost of the cheapest run; of branches only where they pay for all of their training.
        losses: validation loss of each run at that cost, nats per token, interpolated linearly between evaluations;
            None if the budget is below the cost of the run's first evaluation.
    """

    budget: float
    losses: list[float | None]


def at_equal_cost(runs: Sequence[Run], axis: Axis) -> EqualCost:
    """Compare runs at the total cost of the cheapest."""
    costs = [axis.costs(run, runs) for run in runs]
    is_partial = [axis.shares_training and shared_tokens(run, runs) > 0 for run in runs]
    budget = min(float(run_costs[-1]) for run_costs, partial in zip(costs, is_partial, strict=True) if not partial)
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
