"""Reading costs off curves, and saying so in words."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cocomix.common.console import table
from cocomix.common.units import duration, size
from cocomix.reporting.compare import training_differences
from cocomix.reporting.costs import cost_to_reach
from cocomix.reporting.wording import _seed_caveat, comparison_sentences, repetitions
from cocomix.training.validation import bits_per_byte, concept_hits

TOKENS, LOSSES = np.array([100.0, 200.0, 300.0]), np.array([4.0, 3.0, 2.8])


@pytest.mark.parametrize(
    ("loss", "tokens"),
    [(3.5, 150), (3.0, 200), (2.9, 250), (2.8, 300), (2.7, None), (5.0, 100)],
)
def test_costs_to_reach_a_loss_are_read_between_evaluations(loss: float, tokens: float | None) -> None:
    assert cost_to_reach(TOKENS, LOSSES, loss) == (None if tokens is None else pytest.approx(tokens))


def test_the_first_crossing_counts_where_a_curve_rises_again() -> None:
    assert cost_to_reach(np.array([1.0, 2.0, 3.0]), np.array([4.0, 2.0, 3.0]), 3.0) == pytest.approx(1.5)


def test_a_difference_is_stated_with_its_intervals() -> None:
    comparison = {
        "run": "a",
        "baseline": "b",
        "loss_difference": -0.1,
        "loss_over_seeds": {"sd": 0.02, "interval": [-0.15, -0.05], "seeds": 3},
        "documents": {"interval": [-0.13, -0.07], "documents": 50, "p_value": 0.0004},
        "seeds": (3, 3),
        "tokens_to_baseline_loss": None,
        "tokens_at_most": False,
        "tokens_over_seeds": None,
        "verdict_over_seeds": None,
        "verdict_over_documents": None,
    }
    results = {"students": {"a, seed 0": {"tokens": 1000}}, "groups": {"a": ["a, seed 0"]}}
    (lower,) = comparison_sentences({**results, "comparisons": [comparison]})
    assert "0.1000 nats lower" in lower
    assert "(standard deviation over 3 seeds 0.0200, 95 % interval -0.1500 to -0.0500; 95 % interval over 50" in lower
    assert "50 validation documents -0.1300 to -0.0700, p = 0.0004)" in lower
    few = {"documents": {"interval": None, "documents": 4, "p_value": None}}
    (undecided,) = comparison_sentences({**results, "comparisons": [{**comparison, **few}]})
    assert "4 validation documents are too few for an interval)" in undecided
    alone = {"loss_difference": 0.1, "loss_over_seeds": None, "documents": None, "seeds": (1, 1)}
    (higher,) = comparison_sentences({**results, "comparisons": [{**comparison, **alone}]})
    assert "0.1000 nats higher" in higher
    assert "seeds" not in higher


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ((None, None), "seeds"),
        (("t", "t"), "seeds (same teacher, SAE)"),
        (("t", "u"), "replicates"),
    ],
)
def test_what_an_interval_is_over(teachers: tuple[str | None, str | None], words: str) -> None:
    students = {
        f"{name}{seed}": {"preparation": {kind: {"fingerprint": teacher} for kind in ("teacher", "sae") if used}}
        for seed, teacher in enumerate(teachers)
        for name, used in (("a", teacher), ("ntp", False))
    }
    results = {"students": students, "groups": {"a": ["a0", "a1"], "ntp": ["ntp0", "ntp1"]}}
    assert repetitions(results, ("a", "ntp")) == words
    assert repetitions(results, ("ntp",)) == "seeds"


def test_groups_with_one_seed_are_named() -> None:
    one, two = {"a": ["a"]}, {"b": ["b, seed 0", "b, seed 1"]}
    students = {name: {"seed": int(name[-1] == "1"), "preparation": {}} for name in ("a", "b, seed 0", "b, seed 1")}
    assert _seed_caveat({"students": students, "groups": one | two}).startswith("One seed of a: a small")
    assert _seed_caveat({"students": students, "groups": one}).startswith("One seed (0, 1) per student")
    assert _seed_caveat({"students": students, "groups": two}).startswith("Seeds 0, 1: the deviation")


def test_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2) * 6, 3.0) == pytest.approx(2.0)


def test_concept_hits_against_sets() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 30)
    labels = torch.stack([torch.randperm(30)[:4] for _ in range(10)]).view(2, 5, 4)
    labels[0, 0] = -100
    labels[1, 2, 1:] = -100
    at_a, expected = 0, {1: 0, 6: 0}
    for b, t in itertools.product(range(2), range(5)):
        known = {label for label in labels[b, t].tolist() if label >= 0}
        for k in expected:
            expected[k] += len(set(logits[b, t].topk(k).indices.tolist()) & known)
        at_a += len(set(logits[b, t].topk(len(known)).indices.tolist()) & known)
    for k, count in expected.items():
        assert [each.item() for each in concept_hits(logits, labels, k)] == [count, at_a]
    assert expected[6] > at_a > 0


def test_a_table_lines_up() -> None:
    lines = table(["name", "loss"], [["ntp", "4.1"], ["cocomix", "10.25"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| ntp     |   4.1 |"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.3, "< 1 s"), (5, "5 s"), (65, "1 min 5 s"), (3700, "1 h 1 min"), (259_200, "3.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(100, "0 KiB"), (2**20, "1 MiB"), (50.3 * 2**20, "50.3 MiB"), (79 * 2**30, "79 GiB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_trainings_of_different_lengths_and_steps_are_stated() -> None:
    def group(name: str, tokens: int, **own: object) -> Any:
        students = {name: {"training": own or None}}
        recipe = {"training": {"tokens_per_step": 512, "optimizer": "adamw"}, "students": students}
        return SimpleNamespace(name=name, runs=[SimpleNamespace(name=name, tokens=tokens, corpus="c", recipe=recipe)])

    assert training_differences([group("a", 1024), group("b", 1024)]) == []
    b = group("b", 2048, tokens_per_step=1024, optimizer="muon")
    tokens, steps, optimizers = training_differences([group("a", 1024), b])
    assert tokens.startswith("The runs were trained on different numbers of tokens; compare their losses at equal cost")
    assert tokens.endswith("`a` 1,024 tokens, `b` 2,048 tokens.")
    assert steps.endswith("`a` 512 tokens, `b` 1,024 tokens.")
    assert optimizers == "The runs were trained with different optimizers: `a` adamw, `b` muon."
