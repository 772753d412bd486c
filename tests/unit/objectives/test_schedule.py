"""Weights that change during training, and what is left out where they are 0."""

from __future__ import annotations

import math
from typing import NoReturn

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import CoCoMixConfig, CoCoMixForCausalLM
from cocomix.models.plain import with_token_loss
from cocomix.objectives import ConceptMixing, Distillation, HiddenStateMixing, NextToken, WeightSchedule

SIZES = GPT2Config(vocab_size=31, n_positions=8, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
OFF = WeightSchedule("constant", 0.5, 1.0)
IDS = torch.arange(24).view(3, 8)


def refuse(input_ids: Tensor) -> NoReturn:
    raise AssertionError("the teacher runs although its loss has weight 0")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (WeightSchedule(), [1, 1, 1, 1, 1]),
        (WeightSchedule("constant", 0.4), [0, 0, 1, 1, 1]),
        (WeightSchedule("constant", 0.0, 0.4), [1, 1, 0, 0, 0]),
        (WeightSchedule("linear"), [1, 0.8, 0.6, 0.4, 0.2]),
        (WeightSchedule("linear", 0.2, 0.6), [0, 1, 0.5, 0, 0]),
        (WeightSchedule("cosine", 0.0, 0.8), [1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0]),
    ],
    ids=str,
)
def test_a_schedule_is_on_between_its_shares_of_the_steps(schedule, expected):
    assert [schedule.factor(step / 5) for step in range(5)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (WeightSchedule("linar"), "kind is 'linar'; expected one of constant, linear, cosine; did you mean 'linear'?"),
        (WeightSchedule(start=0.5, end=0.5), "start is 0.5 and end is 0.5; start must be less than end"),
    ],
)
def test_an_impossible_schedule_is_refused(schedule, message):
    assert schedule.problems() == [message]


def mixing(**options: object) -> CoCoMixForCausalLM:
    torch.manual_seed(0)
    return CoCoMixForCausalLM(
        CoCoMixConfig(SIZES, insert_layer=1, num_concepts=9, num_active_concepts=3, **options)
    ).eval()


def test_the_teacher_of_a_loss_of_weight_0_does_not_run():
    batch, plain = {"input_ids": IDS}, with_token_loss(GPT2LMHeadModel(SIZES).eval())
    kd = Distillation(2.0, teacher=refuse, schedule=OFF).at(0.25)
    assert kd.scheduled_weights() == {"kd_weight": 0.0}
    assert kd(plain, batch, kd.count(batch)).parts.keys() == {"token_loss"}
    hidden = HiddenStateMixing(refuse, 1.0, OFF).at(0.25)
    model = mixing(content="hidden_states", teacher_hidden_size=4)
    assert hidden(model, batch, hidden.count(batch)).parts.keys() == {"token_loss"}


def test_concepts_of_weight_0_are_not_labeled_and_change_nothing():
    model, both = mixing(), ConceptMixing(refuse, Distillation(2.0, teacher=refuse, schedule=OFF), 1.0, OFF)
    step = both.at(0.0)
    (batch,) = step.prepare([{"input_ids": IDS}])
    losses = step(model, batch, {name: count.clamp(min=1) for name, count in step.count(batch).items()})
    alone = NextToken()
    assert losses.parts.keys() == {"token_loss"}
    torch.testing.assert_close(losses.total, alone(model, batch, alone.count(batch)).total)
    losses.total.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())  # as ddp needs it


def test_a_weight_that_is_on_is_that_of_the_model():
    model, labels = mixing(concept_loss_weight=0.5), torch.randint(0, 9, (3, 8, 2))
    batch, constant = {"input_ids": IDS, "concept_ids": labels}, ConceptMixing()
    counts = constant.count(batch)
    step = ConceptMixing(weight=0.5, schedule=OFF).at(0.5)
    assert step(model, batch, counts).total.item() == pytest.approx(constant(model, batch, counts).total.item())
