"""Losses by document, and the paired bootstrap over them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from scipy import stats

from cocomix.data.documents import DocumentTokens
from cocomix.evaluation.documents import (
    DocumentLosses,
    document_losses,
    load_document_losses,
    paired_difference,
    save_document_losses,
)
from cocomix.evaluation.validation import evaluate_model
from cocomix.evaluation.verdicts import Verdict, verdicts


def test_every_predicted_token_counts_for_its_document(random_teacher) -> None:
    """Against a loop over tokens; the sums are those of the whole evaluation."""
    model = random_teacher("gpt2")
    ids = np.random.default_rng(0).integers(0, 53, size=(5, 12))
    blocks = Dataset.from_dict({"input_ids": ids.tolist()})
    from datasets import List, Value

    blocks = blocks.cast_column("input_ids", List(Value("uint8"), length=12))
    lengths = np.array([7, 1, 20, 2, 30, 3])  # the last one lies behind the last whole block
    documents = DocumentTokens(blocks, lengths)
    found = document_losses(model, blocks, documents, 2, "fp32")
    nll, tokens = np.zeros(6), np.zeros(6)
    with torch.no_grad():
        for block in range(5):
            row = torch.from_numpy(ids[block])[None]
            log_p = F.log_softmax(model(row).logits[0], -1)
            for t in range(1, 12):
                number = int(np.searchsorted(lengths.cumsum(), block * 12 + t, side="right"))
                nll[number] -= log_p[t - 1, ids[block, t]].item()
                tokens[number] += 1
    assert found.tokens.tolist() == tokens.tolist()
    assert found.tokens[-1] == 0
    assert found.nll == pytest.approx(nll)
    whole = evaluate_model(model, blocks, 2)["loss"]
    assert found.nll.sum() / found.tokens.sum() == pytest.approx(whole)
    by_block = document_losses(model, blocks, None, 3, "fp32")
    assert by_block.tokens.tolist() == [11] * 5
    assert by_block.nll.sum() == pytest.approx(nll.sum())


def losses(draw: np.random.Generator, shift: float, documents: int = 400) -> list[DocumentLosses]:
    tokens = np.full(documents, 50)
    return [DocumentLosses(tokens * (3.0 + shift + 0.3 * draw.standard_normal(documents)), tokens)]


def test_the_interval_is_that_of_a_paired_t_test() -> None:
    """Documents of equal length: the bootstrap of their mean, and Student's interval for it."""
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


@pytest.mark.parametrize("apart", [[1.0, 2.0, 4.0], [-1.0, -2.0, -4.0], [1.0, 3.0, -2.0], [0.0, 0.0, 0.0]])
def test_the_p_value_is_the_share_of_signs_that_go_as_far(apart: list[float]) -> None:
    """Three documents have eight choices of signs, so never a small p, however alike they differ."""
    tokens = np.full(3, 10)
    theirs = DocumentLosses(np.full(3, 30.0), tokens)
    found = paired_difference([DocumentLosses(theirs.nll + apart, tokens)], [theirs])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 3)).reshape(3, -1)
    exact = (np.abs(np.array(apart) @ signs) >= abs(sum(apart))).mean()
    assert found.p_value == pytest.approx(exact, abs=0.015)


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
