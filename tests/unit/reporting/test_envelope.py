"""The envelope of next-token prediction over sizes, and tokens at either final loss, counted by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cocomix.reporting.envelope import (
    envelope_loss,
    envelope_picture,
    envelope_table,
    has_envelope,
    plain_tokens,
)
from cocomix.reporting.seeds import Curve
from cocomix.reporting.wording import comparison_sentences


def run(seed: int, losses: list[float], size: int, tokens: tuple[int, ...] = (100, 200), **keys: Any) -> dict[str, Any]:
    flops = [at * size for at in tokens]
    return {
        "method": "ntp",
        "seed": seed,
        "activated_parameters": size,
        "tokens": tokens[-1],
        "curve": [{"loss": loss} for loss in losses],
        "preparation": {},
        "costs": {"tokens": tokens, "student_flops": flops, "single_run_flops": flops},
        **keys,
    }


@pytest.fixture
def results() -> dict[str, Any]:
    teacher = {"teacher": {"fingerprint": "t", "flops": 300.0}}
    costs = {"tokens": [100, 200], "student_flops": [500, 1000], "single_run_flops": [800, 1300]}
    students: dict[str, Any] = {}
    for seed in (0, 1):
        students[f"ntp {seed}"] = run(seed, [4.0, 3.0 + seed], 10)
        students[f"small {seed}"] = run(seed, [3.8, 3.6], 4)
        students[f"long {seed}"] = run(seed, [4.0, 2.0], 10, (100, 600))
        students[f"mixed {seed}"] = run(seed, [3.5, 3.2], 10, method="cocomix", preparation=teacher, costs=costs)
    groups = {name: [f"{name} {seed}" for seed in (0, 1)] for name in ("ntp", "small", "long", "mixed")}
    return {"students": students, "groups": groups}


def test_the_envelope_is_the_lowest_loss_at_no_more_than_a_cost() -> None:
    small = Curve(np.array([4.0, 8.0]), np.array([3.8, 3.6]))
    large = Curve(np.array([10.0, 20.0]), np.array([4.0, 2.0]))
    found = [envelope_loss([small, large], budget) for budget in (3.0, 6.0, 10.0, 15.0, 20.0, 99.0)]
    assert found == [None, *map(pytest.approx, (3.7, 3.6, 3.0, 2.0, 2.0))]


def test_a_student_is_compared_with_the_envelope_at_equal_flops(results: dict[str, Any]) -> None:
    assert has_envelope(results)
    (mixed,) = envelope_table(results).rows
    # At 1,000 FLOPs the small model ended at 3.6, ntp is at 4.0, long at 4.0; at 1,300, ntp at 3.7 and 4.0 by seed.
    assert mixed[:4] == ["mixed", "3.2000", "1.00e+03", "3.6000"]
    assert mixed[4].startswith("-0.4000 (")
    assert mixed[5] == "1.30e+03"
    assert envelope_picture(results).startswith(b"\x89PNG")
    for member in results["groups"]["small"]:
        results["students"][member]["activated_parameters"] = 10
    assert not has_envelope(results)


def test_more_flops_than_any_plain_model_used_are_a_bound(results: dict[str, Any]) -> None:
    results["students"]["mixed 0"]["costs"]["student_flops"] = [500, 90_000]
    row = envelope_table(results).rows[-1]
    assert "at most 2.0000" in row


def test_the_baseline_at_the_students_final_loss_may_be_a_longer_run(results: dict[str, Any]) -> None:
    found = plain_tokens(results, "mixed", "ntp")
    assert found.most == 600
    assert found.tokens == pytest.approx(100 + 500 * 0.4)  # `long`, from 4.0 to 2.0
    del results["groups"]["long"]
    assert plain_tokens(results, "mixed", "ntp") == (None, 200)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (400.0, "`b` reaches the final loss of `a` after 400 tokens: at this level `a` takes 50.0% fewer tokens."),
        (None, "`b` does not reach the final loss of `a` within 600 tokens."),
    ],
)
def test_tokens_at_the_students_own_loss_are_stated(tokens: float | None, words: str) -> None:
    nothing = ("loss_over_seeds", "documents", "tokens_to_baseline_loss", "tokens_over_seeds")
    comparison = {
        **dict.fromkeys((*nothing, "verdict_over_seeds", "verdict_over_documents")),
        **{"run": "a", "baseline": "b", "loss_difference": -0.1, "seeds": (1, 1), "tokens_at_most": False},
        "baseline_to_final_loss": {"tokens": tokens, "most": 600.0},
    }
    results = {"students": {"a": {"tokens": 200}}, "groups": {"a": ["a"]}, "comparisons": [comparison]}
    (sentence,) = comparison_sentences(results)
    assert sentence.endswith(words)
