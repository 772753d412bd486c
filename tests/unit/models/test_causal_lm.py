"""Inputs that the model refuses, and sums that the losses divide as they are told."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import cocomix
from cocomix.models.losses import concept_loss, token_loss

IDS = torch.arange(6).view(2, 3)


def test_a_mask_of_another_rank_is_refused(random_model):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 3, 3\); expected \(batch, past"):
        random_model()(IDS, attention_mask=torch.ones(2, 1, 3, 3))


def test_a_static_cache_is_refused(random_model):
    model = random_model()
    cache = StaticCache(config=model.config.backbone_config, max_cache_len=32)
    with pytest.raises(ValueError, match="past_key_values is a StaticCache of 3 layers; expected a dynamic cache of 3"):
        model(IDS, past_key_values=cache)


def test_generating_with_a_static_cache_is_refused(random_model):
    with pytest.raises(ValueError, match="expected a dynamic cache of 3"):
        random_model().generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=2,
            cache_implementation="static",
            pad_token_id=0,
        )


def test_a_cache_of_another_depth_is_refused(random_model, backbone_config):
    cache = DynamicCache(config=backbone_config("gpt2", num_hidden_layers=5))
    with pytest.raises(ValueError, match="a DynamicCache of 5 layers; expected a dynamic cache of 3"):
        random_model()(IDS, past_key_values=cache)


def test_a_batch_without_a_target_has_loss_zero_and_no_gradient():
    logits = torch.randn(1, 4, 7, requires_grad=True)
    loss = token_loss(logits, torch.full((1, 4), -100)) + concept_loss(logits, torch.full((1, 4, 2), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("divisor", [10, torch.tensor(10)], ids=["int", "tensor"])
def test_a_given_count_divides_the_sum_of_the_losses(divisor):
    logits, labels, concepts = torch.randn(2, 5, 7), torch.randint(7, (2, 5)), torch.randint(7, (2, 5, 1))
    concepts[0, 0] = -100
    torch.testing.assert_close(token_loss(logits, labels, divisor), token_loss(logits, labels) * 8 / 10)
    torch.testing.assert_close(concept_loss(logits, concepts, divisor), concept_loss(logits, concepts) * 9 / 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_logits_are_taken_in_float32(dtype):
    logits, labels, concepts = (
        torch.randn(2, 5, 7).to(dtype),
        torch.randint(7, (2, 5)),
        torch.randint(7, (2, 5, 1)),
    )
    for loss, targets in ((token_loss, labels), (concept_loss, concepts)):
        assert loss(logits, targets).dtype == torch.float32
        assert torch.equal(loss(logits, targets), loss(logits.float(), targets))


def test_concept_ids_of_any_integer_type_give_the_same_loss():
    logits, concepts = torch.randn(2, 5, 7), torch.randint(7, (2, 5, 2))
    assert torch.equal(concept_loss(logits, concepts.int()), concept_loss(logits, concepts))


def test_arguments_that_nobody_knows_are_refused():
    config = cocomix.CoCoMixConfig(
        {"model_type": "gpt2", "vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2},
        insert_layer=1,
        num_concepts=6,
        num_active_concepts=2,
    )
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(TypeError, match="unknown arguments: concept_id"):
        cocomix.CoCoMixForCausalLM(config)(ids, concept_id=ids)
