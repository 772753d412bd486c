"""Inputs that the model refuses, and the divisors of its losses."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import cocomix
from cocomix.models.losses import concept_loss, token_loss

IDS = torch.arange(6).view(2, 3)


def test_a_mask_of_another_rank_is_refused(random_model):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 1, 3, 3\); expected \(batch, past"):
        random_model()(IDS, attention_mask=torch.ones(2, 1, 3, 3))


def test_a_mask_that_leaves_out_the_cache_is_refused(random_model):
    model = random_model()
    cache = model(IDS).past_key_values
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\); .*, here \(2, 6\)"):
        model(IDS, attention_mask=torch.ones_like(IDS), past_key_values=cache)


@pytest.mark.parametrize("hidden_by", [{"use_cache": True}, {"attention_mask": torch.ones_like(IDS)}], ids=str)
def test_packed_texts_are_refused_where_they_would_be_read_as_one(hidden_by, random_model):
    with pytest.raises(ValueError, match="position_ids restart within a row, so it holds several texts"):
        random_model()(IDS, position_ids=torch.tensor([[0, 1, 0]]), **hidden_by)


def test_repeated_positions_are_refused_by_a_kernel_that_reads_them(random_model):
    model = random_model("llama", slot_positions="repeat")
    model.upper.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"slot_positions is 'repeat', which .* 'flash_attention_2' reads as several"):
        model(IDS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"cache_implementation": "paged"}, "a CoCoMixForCausalLM takes no paged cache"),
        ({"assistant_early_exit": 1}, "a CoCoMixForCausalLM takes no assistant_early_exit"),
    ],
    ids=["paged", "early exit"],
)
def test_ways_of_generating_that_need_one_decoder_are_refused(arguments, expected, random_model):
    ids = IDS[:1] + 1
    with pytest.raises(ValueError, match=expected):
        random_model().generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, max_new_tokens=2, **arguments)


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


@pytest.fixture(params=["concepts", "multi token"])
def either_model(request, random_model, backbone_config):
    """A model of each class, of three blocks."""
    if request.param == "concepts":
        return random_model("llama")
    return cocomix.MultiTokenForCausalLM(cocomix.MultiTokenConfig(backbone_config("llama"), num_future_tokens=1))


def test_arguments_that_nobody_knows_are_refused(either_model):
    with pytest.raises(TypeError, match="unknown arguments: concept_id"):
        either_model(IDS, concept_id=IDS)


def test_generate_takes_the_tokenizer_of_stop_strings(either_model):
    options = {"attention_mask": torch.ones_like(IDS), "pad_token_id": 0, "max_new_tokens": 2}
    assert either_model.generate(IDS, tokenizer=object(), **options).shape == (len(IDS), IDS.shape[1] + 2)


def test_a_number_of_targets_without_labels_is_refused(either_model):
    with pytest.raises(ValueError, match=r"num_items_in_batch was given without labels.*compute_loss_func"):
        either_model(IDS, num_items_in_batch=4)


def test_hidden_states_are_those_of_both_stacks(either_model):
    assert either_model(IDS).hidden_states is None
    states = either_model(IDS, output_hidden_states=True).hidden_states
    interleaved = isinstance(either_model, cocomix.CoCoMixForCausalLM)
    lengths = [3, 3, 6, 6, 6] if interleaved else [3] * 5
    assert [tuple(state.shape) for state in states] == [(2, length, 32) for length in lengths]
    assert torch.equal(states[0], either_model.get_input_embeddings()(IDS))
    either_model.config.output_hidden_states = True
    assert len(either_model(IDS).hidden_states) == 5
    with pytest.raises(ValueError, match=r"output_hidden_states is \[1\]; expected True or False"):
        either_model(IDS, output_hidden_states=[1])


def test_hidden_states_of_an_empty_lower_stack_begin_with_the_embeddings(random_model):
    model = random_model("llama", insert_layer=0)
    states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], model.get_input_embeddings()(IDS))
    assert [state.shape[1] for state in states] == [3, 6, 6, 6, 6]


def test_attention_weights_are_returned_or_refused(either_model):
    with pytest.raises(ValueError, match=r"output_attentions is not available .* 'sdpa'; use attn_implementation="):
        either_model(IDS, output_attentions=True)
    either_model.set_attn_implementation("eager")
    attentions = either_model(IDS, output_attentions=True).attentions
    slots = 2 if isinstance(either_model, cocomix.CoCoMixForCausalLM) else 1
    assert [weights.shape[-1] for weights in attentions] == ([3, 6, 6] if slots == 2 else [3, 3, 3])


def test_a_configuration_can_turn_the_cache_off(either_model):
    assert either_model.eval()(IDS).past_key_values is not None
    either_model.config.use_cache = False
    assert either_model(IDS).past_key_values is None


@pytest.mark.parametrize("kept", [1, torch.tensor([2, 0, 1])], ids=["last", "by index"])
def test_the_loss_is_that_of_all_logits(kept, either_model):
    expected = either_model(IDS, labels=IDS).loss
    torch.testing.assert_close(either_model(IDS, labels=IDS, logits_to_keep=kept).loss, expected)


def test_hidden_states_at_padding_are_no_targets(random_model):
    model = random_model("llama", content="hidden_states", teacher_hidden_size=8)
    targets = torch.rand(2, 3, 8)
    expected = model(IDS[:, 1:], teacher_hidden_states=targets[:, 1:]).hidden_loss
    mask = torch.tensor([[0, 1, 1], [0, 1, 1]])
    found = model(IDS, attention_mask=mask, teacher_hidden_states=targets).hidden_loss
    torch.testing.assert_close(found, expected)
