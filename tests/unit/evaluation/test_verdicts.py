"""What is decided about a difference, one or several at a time, and what a report states of it."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from scipy import stats

from cocomix.evaluation.verdicts import MarginTest, Verdict, verdicts
from cocomix.reporting.seeds import over_seeds
from cocomix.reporting.wording import comparison_sentences, verdict_note


@pytest.mark.parametrize("margin", [0.0, 0.01, 0.1])
def test_one_verdict_is_what_the_interval_says(margin: float) -> None:
    for mean, spread in product([-0.3, -0.12, -0.05, -0.002, 0.0, 0.04, 0.2], [0.0, 0.001, 0.02, 0.1]):
        found = over_seeds([mean - spread, mean, mean + spread])
        assert found.interval is not None
        low, high = found.interval
        if high < -margin:
            expected = Verdict.LOWER
        elif low > margin:
            expected = Verdict.HIGHER
        elif -margin < low and high < margin:
            expected = Verdict.SAME
        else:
            expected = Verdict.UNDECIDED
        assert verdicts([found.test(0.0, margin)]) == [expected], (mean, spread)


def test_the_p_values_are_those_of_one_sided_t_tests() -> None:
    values = [-0.03, -0.01, -0.025, -0.018]
    found = over_seeds(values).test(0.0, 0.01)
    assert found is not None
    assert found.lower == pytest.approx(stats.ttest_1samp(values, -0.01, alternative="less").pvalue)
    assert found.higher == pytest.approx(stats.ttest_1samp(values, 0.01, alternative="greater").pvalue)
    assert found.same == pytest.approx(
        max(
            stats.ttest_1samp(values, -0.01, alternative="greater").pvalue,
            stats.ttest_1samp(values, 0.01, alternative="less").pvalue,
        )
    )


def test_several_verdicts_by_hand() -> None:
    """Two-sided p-values 0.012, 0.016, 0.018, 0.06: Holm asks for 0.05 / 4, / 3, / 2, / 1, and stops at the second."""
    tests = [MarginTest(p / 2, 0.9, 0.9) for p in (0.06, 0.012, 0.018, 0.017)]
    assert verdicts([tests[0], None, *tests[1:]]) == [
        Verdict.UNDECIDED,
        Verdict.UNDECIDED,
        Verdict.LOWER,
        Verdict.UNDECIDED,
        Verdict.UNDECIDED,
    ]
    assert verdicts([]) == [] and verdicts([None]) == [Verdict.UNDECIDED]


def comparison(**changes: Any) -> dict[str, Any]:
    return {
        "run": "a",
        "baseline": "b",
        "seeds": (1, 1),
        "loss_difference": -0.1,
        "loss_over_seeds": None,
        "documents": None,
        "tokens_to_baseline_loss": 750.0,
        "tokens_ratio": 0.75,
        "tokens_at_most": False,
        "tokens_over_seeds": None,
        "flops_to_baseline_loss": 2e9,
        "flops_ratio": 1.25,
        "verdict_over_seeds": None,
        "verdict_over_documents": None,
        **changes,
    }


def results(**changes: Any) -> dict[str, Any]:
    return {
        "students": {"a": {"tokens": 1000}},
        "groups": {"a": ["a"]},
        "comparisons": [comparison(**changes)],
    }


WORDS = {
    "lower": "`a` is better than `b`.",
    "higher": "`a` is worse than `b`.",
    "no difference of interest": "no difference of interest.",
    "not decided": "not decided.",
    None: None,
}


@pytest.mark.parametrize(("seeds", "documents"), list(product(WORDS, WORDS)))
def test_every_combination_of_verdicts_is_stated_as_it_is(seeds: str | None, documents: str | None) -> None:
    found = results(verdict_over_seeds=seeds, verdict_over_documents=documents)
    (sentence,) = comparison_sentences(found)
    for sample, verdict in (
        ("Over seeds: ", seeds),
        ("Over validation documents, for the models trained here: ", documents),
    ):
        words = WORDS[verdict]
        assert (sample in sentence) == (words is not None)
        assert words is None or sample + words in sentence
    note = verdict_note(found)
    assert (note is None) == (seeds is None and documents is None)
    assert note is None or ("more than 0.01 nats per token" in note and "Holm" not in note)


def test_the_note_counts_what_was_tested_together() -> None:
    found = {"comparisons": [comparison(verdict_over_seeds="lower"), comparison(verdict_over_seeds="not decided")]}
    note = verdict_note(found)
    assert note is not None and "for up to 2 comparisons together (Holm)" in note


SHARE = {"mean": -0.25, "interval": [-0.3, -0.2]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "after 750 tokens (25.0% fewer tokens) and 2.00e+09 FLOPs of its own training (25.0% more FLOPs)."),
        (
            {"tokens_at_most": True},
            "at or before 750 tokens (its first evaluation: at least 25.0% fewer tokens) and at most 2.00e+09 FLOPs of "
            "its own training (at most 25.0% more FLOPs).",
        ),
        (
            {"tokens_at_most": True, "tokens_to_baseline_loss": 1000.0, "tokens_ratio": 1.0},
            "; it reaches the final loss of `b` at or before 1,000 tokens (its first evaluation).",
        ),
        (
            {"tokens_over_seeds": {"difference": SHARE, "at_most": False, "reached": 3, "seeds": 3}},
            "(25.0% fewer tokens; mean over 3 seeds -25.0%, 95 % interval -30.0% to -20.0%)",
        ),
        (
            {
                "tokens_over_seeds": {
                    "difference": SHARE | {"interval": None},
                    "at_most": True,
                    "reached": 3,
                    "seeds": 3,
                }
            },
            "(25.0% fewer tokens; mean over 3 seeds at most -25.0%)",
        ),
        (
            {"tokens_over_seeds": {"difference": None, "at_most": False, "reached": 2, "seeds": 3}},
            "(25.0% fewer tokens; reached by 2 of 3 seeds)",
        ),
        ({"tokens_to_baseline_loss": None}, "; it does not reach the final loss of `b`."),
        (
            {
                "tokens_to_baseline_loss": None,
                "seeds": (3, 3),
                "tokens_over_seeds": {"difference": None, "at_most": False, "reached": 1, "seeds": 3},
            },
            "; it does not reach the final loss of `b` by the mean over seeds; reached by 1 of 3 seeds.",
        ),
    ],
)
def test_costs_are_stated_as_bounds_where_they_are(changes: dict[str, Any], words: str) -> None:
    (sentence,) = comparison_sentences(results(**changes))
    assert words in sentence
