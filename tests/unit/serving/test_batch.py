"""Rows that join and leave a batch get the tokens that `generate` gives each alone."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from cocomix import Steering
from cocomix.serving.batch import Batch, can_join

STEERED = [None, Steering.add({3: 9.0}), Steering.suppress([5, 6, 7]), Steering.set({1: 20.0}, positions="generated")]


def generated(model: PreTrainedModel, row: Any, tokens: int) -> list[int]:
    ids = torch.tensor([row.ids])
    steering = {} if row.steering is None else {"steering": row.steering}
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, **steering)
    return found[0].tolist()


def random_rows(steerings: list[Steering | None], count: int = 10) -> list[tuple[int, Any, int]]:
    """Return for each row the step at which it arrives, the row, and its number of new tokens."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        ids = [draw.randrange(53) for _ in range(draw.choice([1, 2, 5, 12, 25]))]
        steering = steerings[number % len(steerings)]
        steering = None if steering is None else steering.after_prompt(len(ids))
        rows.append((draw.randrange(12), SimpleNamespace(ids=ids, steering=steering), draw.randint(1, 14)))
    return rows


def check(model: PreTrainedModel, steerings: list[Steering | None]) -> None:
    rows = random_rows(steerings)
    expected = [generated(model, row, tokens) for _, row, tokens in rows]
    ends = {id(row): len(row.ids) + tokens for _, row, tokens in rows}
    batch, most = Batch(model), 0
    for step in range(40):
        if batch.rows:
            for row, token in zip(batch.rows, batch.step().argmax(-1).tolist(), strict=True):
                row.ids.append(token)
        if joining := [row for arrival, row, _ in rows if arrival == step]:
            for row, logits in zip(joining, batch.join(joining), strict=True):
                row.ids.append(int(logits[-1].argmax()))
        most = max(most, len(batch.rows))
        batch.keep([at for at, row in enumerate(batch.rows) if len(row.ids) < ends[id(row)]])
        longest = max((len(row.ids) - 1 for row in batch.rows), default=0)
        assert batch.mask.shape == (len(batch.rows), longest)  # no more padding than the longest row needs
    assert most > 3
    assert [row.ids for _, row, _ in rows] == expected


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_concept_models_with_different_steering_in_one_batch(random_model, kind, mixing):
    check(random_model(kind, mixing=mixing), STEERED)


@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_sliding_windows(random_model, mixing):
    check(random_model("mistral", {"sliding_window": 6}, mixing=mixing), STEERED)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}])
def test_plain_models(random_teacher, changes):
    check(random_teacher("mistral", **changes), [None])


def test_a_scored_prompt_has_the_logits_of_one_pass(random_model, relative_error):
    model = random_model()
    rows = [row for _, row, _ in random_rows(STEERED, 4)]
    logits = Batch(model).join(rows, all_logits=True)
    for row, found in zip(rows, logits, strict=True):
        alone = model(torch.tensor([row.ids]), steering=row.steering).logits[0]
        assert relative_error(found[-len(row.ids) :], alone) < 1e-10


def test_caches_whose_rows_cannot_be_joined(random_model):
    model, ids = random_model(), torch.tensor([[1, 2]])
    assert can_join(model(ids, use_cache=True).past_key_values)
    static = model._prepare_static_cache("static", 8)
    assert not can_join(static)
