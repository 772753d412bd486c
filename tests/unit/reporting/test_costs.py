"""What runs are worth at equal cost, counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cocomix.reporting.compare import _kind
from cocomix.reporting.costs import AXES, at_equal_cost
from cocomix.training.run import Run

RUN = Run(
    name="ntp",
    method="ntp",
    seed=0,
    corpus="c",
    validation="v",
    tokenizer="t",
    block_size=8,
    bytes_per_token=4.0,
    stored_parameters=1,
    activated_parameters=1,
    tokens=300,
    training_flops_per_token=10,
    metrics={"loss": 2.0},
    curve=[{"tokens": 100, "loss": 4.0}, {"tokens": 200, "loss": 3.0}, {"tokens": 300, "loss": 2.0}],
    timing={"seconds": 6.0, "tokens_per_second": 50.0, "curve": [2.0, 4.0, 6.0]},
    recipe={},
    environment={},
)
MADE = {"teacher": {"fingerprint": "T", "flops": 1000.0}, "labels": {"fingerprint": "L", "flops": 600.0}}
COCOMIX = replace(
    RUN,
    training_flops_per_token=20,
    curve=[{"tokens": 100, "loss": 3.5}, {"tokens": 200, "loss": 2.5}, {"tokens": 300, "loss": 1.5}],
    timing={"seconds": 9.0, "tokens_per_second": 33.0, "curve": [3.0, 6.0, 9.0]},
    preparation=MADE,
)
KD = replace(RUN, teacher_flops_per_token=5, preparation={"teacher": MADE["teacher"]})


@pytest.mark.parametrize(
    ("axis", "budget", "losses"),
    [
        ("tokens", 300, [2.0, 1.5, 2.0]),
        ("student_flops", 3000, [2.0, 3.0, 2.0]),
        ("seconds", 6, [2.0, 2.5, 2.0]),
        # kd and cocomix bear half of the teacher each: 500 + 15 · tokens, and, with the labels, 1,100 + 20 · tokens,
        # which is more than 3,000 at cocomix's first evaluation.
        ("all_flops", 3000, [2.0, None, 4.0 - (2500 / 15 - 100) / 100]),
        # Each by itself: 1,000 + 15 · tokens, and 1,600 + 20 · tokens.
        ("single_run_flops", 3000, [2.0, None, 4.0 - (2000 / 15 - 100) / 100]),
    ],
)
def test_losses_at_the_cost_of_the_cheapest(axis: str, budget: float, losses: list[float | None]) -> None:
    found = at_equal_cost([RUN, COCOMIX, KD], AXES[axis])
    assert found.budget == budget
    assert found.losses == [loss and pytest.approx(loss) for loss in losses]


def branched(name: str, max_tokens: int, parent: str | None, losses: list[float]) -> Run:
    """A run of steps of 100 tokens, half of which decay."""
    training = {"schedule": "wsd", "tokens_per_step": 100, "decay_ratio": 0.5, "max_tokens": 400}
    students = {name: {"branch_from": parent, "training": {"max_tokens": max_tokens}}}
    curve = [{"tokens": 100 * (number + 1), "loss": loss} for number, loss in enumerate(losses)]
    return replace(RUN, name=name, curve=curve, tokens=max_tokens, recipe={"training": training, "students": students})


def test_steps_before_a_branch_are_paid_once() -> None:
    trunk = branched("long", 800, None, [5, 4.8, 4.6, 4.4, 4.0, 3.0, 2.5, 2])
    first, second = branched("first", 200, "long", [5, 4.5]), branched("second", 400, "long", [5, 4.8, 4.2, 3.5])
    shared, single = AXES["all_flops"], AXES["single_run_flops"]
    every = [trunk, first, second]
    assert [list(shared.costs(run, every)[-2:]) for run in every] == [[7000, 8000], [0, 1000], [1000, 2000]]
    assert list(single.costs(first, every)) == [1000, 2000]
    assert at_equal_cost(every, shared).budget == 8000  # a decay alone is no training
    assert at_equal_cost(every, AXES["tokens"]).budget == 200
    # Without the run that they continue, the branch that leaves it last pays.
    assert [shared.costs(run, [first, second])[-1] for run in (first, second)] == [1000, 4000]
    # Another seed, and a run of that name with other losses, are other trainings.
    others = [replace(trunk, seed=1), branched("long", 800, None, [5.1, 4.8, 4.6, 4.4])]
    assert [shared.costs(first, [first, other])[-1] for other in others] == [2000, 2000]


def test_seeds_of_one_model_are_a_group_and_another_model_is_not() -> None:
    recipe = {"training": {}, "students": {"ntp": {"match": "cocomix"}, "cocomix": {"width": 8}}}
    one = replace(RUN, recipe=recipe)
    other_seed = replace(one, seed=1)
    matched_to_another = replace(other_seed, stored_parameters=2)
    of_other_text = replace(other_seed, corpus="of more documents, the same validation")
    assert _kind(one) == _kind(other_seed)
    assert len({_kind(each) for each in (one, matched_to_another, of_other_text)}) == 3


def test_what_is_shared_with_more_runs_costs_each_less() -> None:
    alone = AXES["all_flops"].costs(COCOMIX, [COCOMIX])
    shared = AXES["all_flops"].costs(COCOMIX, [COCOMIX, KD, replace(COCOMIX, seed=1)])
    assert alone[0] == 1000 + 600 + 2000
    assert shared[0] == pytest.approx(1000 / 3 + 600 / 2 + 2000)
    paid_by_one = AXES["single_run_flops"].costs(COCOMIX, [COCOMIX, KD])
    assert list(paid_by_one) == list(alone)
    elsewhere = replace(COCOMIX, preparation={"teacher": {"fingerprint": "T", "flops": None}})
    assert AXES["all_flops"].costs(elsewhere, [elsewhere])[0] == 2000
