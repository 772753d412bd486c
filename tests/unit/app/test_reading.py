"""What is read of a text, against the model's own output."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import cocomix
from cocomix import InputError
from cocomix.app.limits import Limits
from cocomix.app.reading import BARS, read_text, token_concepts, window_start

TEXT = "w5 w17 w3 w42 w8 w29"
IDS = torch.tensor([[5, 17, 3, 42, 8, 29]])


@torch.no_grad()
def test_losses_and_strengths_are_the_models(opened):
    run = opened()
    reading = read_text(run, TEXT, Limits().for_run(run))
    output = run.model(IDS, labels=IDS, output_concepts=True)
    assert reading.tokens == TEXT.split()
    assert math.isnan(reading.losses[0])
    assert reading.losses[1:].mean() == pytest.approx(output.token_loss.item(), rel=1e-5)
    z = output.concept_logits[0]
    for concept in range(run.model.config.num_concepts):
        found, kept = reading.strengths(concept), (z.topk(5).indices == concept).any(-1).numpy()
        assert np.array_equal(~np.isnan(found), kept)
        assert np.allclose(found[kept], z[:, concept].numpy()[kept])


def test_the_strongest_concepts_of_a_text(opened):
    run = opened()
    reading = read_text(run, TEXT, Limits().for_run(run))
    strongest = reading.strongest(4)
    largest = {concept: np.nanmax(reading.strengths(concept)) for concept in np.unique(reading.indices).tolist()}
    assert strongest == sorted(largest, key=lambda concept: -largest[concept])[:4]


def test_a_token_is_traced_alone(opened):
    run = opened()
    reading = read_text(run, TEXT, Limits().for_run(run))
    found = token_concepts(run, reading, "3")
    whole = cocomix.trace(run.model, run.tokenizer, TEXT, ablate=BARS)
    assert [each.concept_id for each in found.concepts] == [each.concept_id for each in whole.tokens[3].concepts]
    for one, other in zip(found.concepts, whole.tokens[3].concepts, strict=True):
        assert one.gradient_effect == other.gradient_effect
        assert one.ablation_effect == pytest.approx(other.ablation_effect, rel=1e-9)
    assert all(concept.ablation_effect is not None for concept in found.concepts)
    assert found.next_logprob == pytest.approx(-reading.losses[4], rel=1e-5)


@pytest.mark.parametrize("written", ["6", "-1", "x", None, "1" * 30, "１"])
def test_no_such_token(opened, written):
    run = opened()
    with pytest.raises(InputError, match="the text has 0 to 5"):
        token_concepts(run, read_text(run, TEXT, Limits().for_run(run)), written)


def test_positions_of_a_trace(opened):
    run = opened()
    found = cocomix.trace(run.model, run.tokenizer, TEXT, ablate=2, positions=[4, 1])
    whole = cocomix.trace(run.model, run.tokenizer, TEXT, ablate=2)
    assert [token.position for token in found.tokens] == [1, 4]
    for token in found.tokens:
        for one, other in zip(token.concepts, whole.tokens[token.position].concepts, strict=True):
            assert one.gradient_effect == other.gradient_effect
            assert one.ablation_effect == (other.ablation_effect and pytest.approx(other.ablation_effect, rel=1e-9))
    assert found.verify() < 1e-12
    with pytest.raises(InputError, match="position 6 is not in the text; its tokens are 0 to 5"):
        cocomix.trace(run.model, run.tokenizer, TEXT, positions=[6])


def test_long_text_is_read_in_windows(opened):
    run = opened()
    context = run.model.config.max_position_embeddings
    ids = [5 + 7 * at % 40 for at in range(2 * context + 9)]
    reading = read_text(run, " ".join(f"w{each}" for each in ids), Limits())
    assert reading.ids == ids
    assert len(reading.losses) == len(reading.indices) == len(reading.logits) == len(ids)
    for at in (1, context - 1, context, context + 1, len(ids) - 1):
        start = window_start(at, context)
        assert start == 0 or context // 2 <= at - start < context
        window = torch.tensor([ids[start : start + context]])
        with torch.no_grad():
            output = run.model(window, output_concepts=True)
        place = at - start
        lost = -output.logits[0, place - 1].log_softmax(-1)[ids[at]]
        assert reading.losses[at] == pytest.approx(lost.item(), rel=1e-5)
        assert reading.logits[at, 0] == pytest.approx(output.concept_logits[0, place].max().item(), rel=1e-5)
    for at in (0, context - 1, context, len(ids) - 2):
        token = token_concepts(run, reading, at)
        assert (token.position, token.next_id) == (at, ids[at + 1])
        assert token.next_logprob == pytest.approx(-reading.losses[at + 1], rel=1e-5)


def test_the_rest_of_a_very_long_text_is_left_out(opened):
    reading = read_text(opened(), TEXT, dataclasses.replace(Limits(), read_tokens=5))
    assert (len(reading.tokens), reading.total) == (5, 6)
