"""The ranking of concepts by their effect is that of steering them one after the other."""

from __future__ import annotations

import pytest
import torch

from cocomix.inspection import effects
from cocomix.inspection.effects import candidates, most_probable, next_token_probabilities, rank_effects
from small_catalog import catalog_of
from small_run import run_in_memory

IDS = torch.tensor([3, 1, 4, 1, 5])


@pytest.mark.parametrize("mixing", ["add", "interleave"])
def test_concepts_are_ranked_by_the_rise_of_their_own_tokens(random_model, mixing, monkeypatch):
    monkeypatch.setattr(effects, "ROWS", 3)
    model = random_model(mixing=mixing)
    tokens = {concept: [concept, 52 - concept] for concept in range(7)} | {9: []}
    ranked = rank_effects(model, IDS, tokens, 5.0)
    assert sorted(effect.concept_id for effect in ranked) == list(range(7))
    with torch.no_grad():
        for concept, plain, steered in ranked:
            alone = model(IDS[None], steering={concept: 5.0}).logits[0, -1].softmax(-1)[tokens[concept]].sum()
            none = model(IDS[None]).logits[0, -1].softmax(-1)[tokens[concept]].sum()
            assert (plain, steered) == pytest.approx((none.item(), alone.item()), rel=1e-4)
    rises = [effect.steered - effect.plain for effect in ranked]
    assert rises == sorted(rises, reverse=True)


def test_most_probable_tokens(random_model):
    run = run_in_memory(random_model())
    (probabilities,) = next_token_probabilities(run.model, IDS, [None])
    first, second = most_probable(run.tokenizer, probabilities, 2)
    assert first.probability == probabilities.max() > second.probability
    assert first.token == f"w{int(probabilities.argmax())}"


def test_visible_single_tokens_represent_a_concept(random_model):
    run = run_in_memory(random_model())
    assert effects.representative_tokens(run.tokenizer, ["w7", " w7", "\n", "w1 w2", "\ufffd", "w3", "w4", "w5"]) == [
        7,
        3,
        4,
    ]
    found = candidates(catalog_of({}), run.tokenizer)
    assert list(found)[:2] == [39, 38] and len(found) == 39  # concept 0 is never a label
