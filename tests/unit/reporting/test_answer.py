"""The first sentences of a report."""

from __future__ import annotations

from typing import Any

import pytest

from cocomix.common.document import Bullets, Table
from cocomix.reporting.answer import answer
from cocomix.reporting.curves import curves_picture
from cocomix.reporting.figures import scale
from cocomix.reporting.report import report


def student(loss: float, preparation: dict[str, Any], losses: tuple[float, ...] = (4.0, 3.0)) -> dict[str, Any]:
    costs = [500.0 * (number + 1) for number in range(len(losses))]
    return {
        "metrics": {"loss": loss, "perplexity": 20.0, "bits_per_byte": 1.0},
        "tokens": 1000,
        "seed": 0,
        "method": "cocomix" if preparation else "ntp",
        "stored_parameters": 10,
        "activated_parameters": 10,
        "training_flops": 10_000.0,
        "training_flops_per_token": 10,
        "teacher_flops_per_token": 0,
        "preparation": preparation,
        "timing": {"seconds": 3.0, "tokens_per_second": 300.0},
        "environment": {"hardware": "a CPU"},
        "curve": [{"loss": each} for each in losses],
        "costs": dict.fromkeys(("tokens", "student_flops", "all_flops", "single_run_flops", "seconds"), costs),
    }


def results(flops: float | None = 40_000.0, **changes: Any) -> dict[str, Any]:
    comparison = {
        "run": "a",
        "baseline": "b",
        "seeds": (1, 1),
        "loss_difference": -0.25,
        "loss_over_seeds": None,
        "documents": None,
        "tokens_to_baseline_loss": 600.0,
        "tokens_ratio": 0.6,
        "tokens_at_most": False,
        "tokens_over_seeds": None,
        "flops_to_baseline_loss": 6000.0,
        "flops_ratio": 0.6,
        "verdict_over_seeds": None,
        "verdict_over_documents": "lower",
    }
    preparation = {kind: {"fingerprint": kind, "flops": flops} for kind in ("sae", "labels", "teacher")}
    axes = ("tokens", "student_flops", "all_flops", "single_run_flops", "seconds")
    return {
        "name": "r",
        "students": {"b": student(3.25, {}), "a": student(3.0, preparation)},
        "groups": {"b": ["b"], "a": ["a"]},
        "comparisons": [comparison | changes],
        "equal_cost": {axis: {"budget": 1000.0, "losses": {"a": 3.0, "b": None}} for axis in axes},
        "evaluations": {},
    }


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (
            results(),
            "`a` ends 0.250 nats per token below `b` (perplexity 20.09 against 25.79), a clear difference over",
        ),
        (
            results(),
            "It reaches the final loss of `b` with 40% fewer tokens. Teacher, SAE and labels took 12.0 times the",
        ),
        (results(), "times the FLOPs of `b`; they pay off after 30 runs that share them and stop at that loss."),
        (
            results(1000.0),
            "Teacher, SAE and labels took 0.3 times the FLOPs of `b`; a single run that stops at that loss",
        ),
        (
            results(tokens_to_baseline_loss=None),
            "It does not reach the final loss of `b`. Teacher, SAE and labels took",
        ),
        (
            results(tokens_to_baseline_loss=1100.0, tokens_ratio=1.1),
            "with 10% more tokens. Teacher, SAE and labels took",
        ),
        (results(tokens_at_most=True), "already at the final loss of `b` at its first evaluation, after 600 tokens."),
        (results(verdict_over_documents=None), "; how certain this is was not measured."),
        (results(verdict_over_seeds="not decided"), ", not decided over seeds."),
    ],
)
def test_the_answer_says_who_is_ahead_and_whether_it_pays(found: dict[str, Any], words: str) -> None:
    (sentence,) = answer(found)
    assert words in sentence


def test_an_answer_has_no_cost_that_is_unknown() -> None:
    (sentence,) = answer(results(None))
    assert "FLOPs" not in sentence


def test_a_report_begins_with_the_answer_then_losses() -> None:
    found = results()
    _, first, table, *_ = report(found)
    assert first == answer(found)[0]
    assert isinstance(table, Table) and table.header[:2] == ["student", "loss"]
    found["comparisons"] *= 2
    assert isinstance(report(found)[1], Bullets)


@pytest.mark.parametrize(
    ("maximum", "label", "unit"),
    [
        (204_800, "training tokens", "training tokens, thousands"),
        (2e10, "training tokens", "training tokens, billions"),
        (4.2e14, "training FLOPs", "training FLOPs, $10^{12}$"),
        (0.5, "training tokens", "training tokens"),
    ],
)
def test_axes_have_few_digits(maximum: float, label: str, unit: str) -> None:
    factor, found = scale(maximum, label)
    assert found == unit and maximum / factor < 1000


def test_curves_are_drawn_for_light_and_dark_wide_and_narrow() -> None:
    pictures = [curves_picture(results(), dark=dark, narrow=narrow) for dark in (0, 1) for narrow in (0, 1)]
    assert len({*pictures}) == 4
