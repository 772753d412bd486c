"""The paired randomization test over documents, and its interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from cocomix.evaluation.statistics import MIN_DOCUMENTS, paired_difference
from cocomix.evaluation.verdicts import Verdict, verdicts
from cocomix.training.documents import DocumentLosses, load_document_losses, save_document_losses


def losses(draw: np.random.Generator, shift: float, documents: int = 400) -> list[DocumentLosses]:
    tokens = np.full(documents, 50)
    return [DocumentLosses(tokens * (3.0 + shift + 0.3 * draw.standard_normal(documents)), tokens)]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    """Documents of equal length: the interval of their mean, and Student's interval for it."""
    draw = np.random.default_rng(1)
    ours, theirs = losses(draw, -0.05), losses(draw, 0.0)
    found = paired_difference(ours, theirs)
    apart = (ours[0].nll - theirs[0].nll) / 50
    expected = stats.ttest_rel(ours[0].nll / 50, theirs[0].nll / 50).confidence_interval()
    assert found.difference == pytest.approx(apart.mean())
    assert found.interval == pytest.approx(tuple(expected), abs=0.1 * (expected.high - expected.low))
    assert found.p_value < 0.05
    assert found.documents == 400
    assert paired_difference(ours, theirs) == found  # the same draws


def test_equal_models_differ_by_chance() -> None:
    draw = np.random.default_rng(2)
    covered = [paired_difference(losses(draw, 0.0, 60), losses(draw, 0.0, 60)) for _ in range(40)]
    assert sum(low <= 0 <= high for low, high in (each.interval for each in covered)) >= 33
    assert sum(each.p_value < 0.05 for each in covered) <= 7


def test_seeds_are_averaged_and_empty_documents_left_out(tmp_path: Path) -> None:
    def kept(nll: list[float]) -> DocumentLosses:
        save_document_losses(DocumentLosses(np.array(nll), np.array([10, 0, 30])), tmp_path)
        loaded = load_document_losses(tmp_path)
        assert loaded is not None
        return loaded

    ours, theirs = [kept([10.0, 0.0, 60.0]), kept([20.0, 0.0, 90.0])], [kept([20.0, 0.0, 60.0])]
    found = paired_difference(ours, theirs)
    assert found.difference == pytest.approx((15 - 20 + 75 - 60) / 40)
    assert found.documents == 2


@pytest.mark.parametrize(
    "apart", [[1.0, 2, 4, 3, 2, 5], [-1.0, -2, -4, -3, -2, -5], [1.0, 3, -2, 2, -1, 1, 2], [0.0] * 6]
)
def test_the_p_value_is_the_share_of_signs_that_go_as_far(apart: list[float]) -> None:
    tokens = np.full(len(apart), 10)
    theirs = DocumentLosses(np.full(len(apart), 30.0), tokens)
    found = paired_difference([DocumentLosses(theirs.nll + apart, tokens)], [theirs])
    signs = np.array(np.meshgrid(*[[-1, 1]] * len(apart))).reshape(len(apart), -1)
    exact = (np.abs(np.array(apart) @ signs) >= abs(sum(apart))).mean()
    assert found.p_value == pytest.approx(exact, abs=0.02)


def test_an_interval_excludes_zero_exactly_where_p_is_below_5_percent() -> None:
    draw, excluded = np.random.default_rng(4), 0
    for documents in range(MIN_DOCUMENTS, 60):
        tokens = draw.integers(10, 90, documents)
        theirs = DocumentLosses(np.full(documents, 30.0), tokens)
        shift = draw.choice([0.0, 0.3])
        found = paired_difference([DocumentLosses(theirs.nll + draw.normal(shift, 1, documents), tokens)], [theirs])
        assert found.interval is not None and found.p_value is not None
        low, high = found.interval
        assert low <= found.difference <= high
        assert (found.p_value < 0.05) == (not low <= 0 <= high)
        excluded += found.p_value < 0.05
    assert 0 < excluded < 40


def test_few_documents_have_neither_interval_nor_p() -> None:
    tokens = np.full(MIN_DOCUMENTS - 1, 10)
    theirs = DocumentLosses(np.full(MIN_DOCUMENTS - 1, 30.0), tokens)
    found = paired_difference([DocumentLosses(theirs.nll + 1, tokens)], [theirs])
    assert found.difference == pytest.approx(0.1)
    assert found.interval is found.p_value is found.test is None


@pytest.mark.parametrize(
    ("shift", "deviation", "verdict"),
    [
        (-0.05, 0.05, Verdict.LOWER),
        (0.05, 0.05, Verdict.HIGHER),
        (-0.003, 0.02, Verdict.SAME),  # not 0 for sure, but within the margin
        (-0.02, 0.3, Verdict.UNDECIDED),
    ],
)
def test_documents_are_held_against_the_margin(shift: float, deviation: float, verdict: Verdict) -> None:
    tokens = np.full(200, 50)
    noise = np.random.default_rng(3).standard_normal(200)
    apart = shift + deviation * (noise - noise.mean())
    theirs = DocumentLosses(np.full(200, 150.0), tokens)
    found = paired_difference([DocumentLosses(theirs.nll + apart * tokens, tokens)], [theirs])
    assert verdicts([found.test]) == [verdict]
