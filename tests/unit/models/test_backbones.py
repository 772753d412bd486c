"""A decoder is cut in two without changing a weight, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel

from cocomix.models.backbones import decoder_blocks, final_norm_name, split_decoder, widen_windows
from cocomix.models.building import BackboneConfig
from cocomix.models.building import backbone_config as building_config

KINDS = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt_neox"]


@pytest.fixture
def decoder(backbone_config):
    def make(kind: str, **changes: object):
        return AutoModel.from_config(backbone_config(kind, **changes)).eval()

    return make


@pytest.mark.parametrize("insert_layer", [0, 1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_two_halves_run_one_after_the_other_equal_the_whole(kind, insert_layer, decoder, redraw):
    whole = decoder(kind).double()
    redraw(whole)
    ids = torch.randint(53, (2, 7))
    with torch.no_grad():
        expected = whole(input_ids=ids, use_cache=False).last_hidden_state
        stacks = split_decoder(whole, insert_layer)
        h = stacks.lower(input_ids=ids, use_cache=False).last_hidden_state
        found = stacks.upper(inputs_embeds=h, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_splitting_moves_every_weight_and_copies_none(kind, decoder):
    whole = decoder(kind)
    before = {id(weight) for weight in whole.parameters()}
    stacks = split_decoder(whole, 1)
    lower = {id(weight) for weight in stacks.lower.parameters()}
    upper = {id(weight) for weight in stacks.upper.parameters()}
    assert not lower & upper
    assert lower | upper == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_halves_know_their_own_depth(kind, decoder):
    stacks = split_decoder(decoder(kind), 1)
    for half, depth in zip(stacks, (1, 2), strict=True):
        assert half.config.num_hidden_layers == len(decoder_blocks(half)) == depth
        kinds = getattr(half.config, "layer_types", None)
        assert kinds is None or len(kinds) == depth


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_stays_on_the_meta_device(kind, decoder):
    stacks = split_decoder(decoder(kind), 1)
    for half in stacks:
        tensors = [*half.parameters(), *half.buffers()]
        assert tensors
        assert {tensor.device.type for tensor in tensors} == {"cpu"}


def test_windows_stay_with_their_blocks(decoder):
    qwen = decoder("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    lower, upper = split_decoder(qwen, 1)
    assert (lower.config.layer_types, upper.config.layer_types) == (["full_attention"], ["sliding_attention"] * 2)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_window_of_tokens_becomes_one_of_as_many_slots(kind, decoder):
    windows = {"sliding_window": 4} | ({"use_sliding_window": True, "max_window_layers": 0} if kind == "qwen2" else {})
    lower, upper = split_decoder(decoder(kind, **windows), 1)
    widen_windows(upper, 2)
    assert (lower.config.sliding_window, upper.config.sliding_window) == (4, 8)
    kept = [getattr(block.self_attn, "sliding_window", 8) for block in decoder_blocks(upper)]
    assert kept == [8, 8]


def test_blocks_that_attend_in_another_way_are_refused(decoder):
    model = decoder("llama")
    model.config.layer_types = ["full_attention", "chunked_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"'llama' has other blocks .*chunked_attention"):
        split_decoder(model, 1)


def test_a_decoder_without_a_list_of_its_blocks_is_refused(decoder):
    model = decoder("gpt2")
    del model.h[2]
    with pytest.raises(ValueError, match="GPT2Model has 0 lists of 3 blocks; a decoder with exactly one"):
        decoder_blocks(model)


def test_a_decoder_with_two_norms_is_refused(decoder):
    model = decoder("gpt2")
    assert final_norm_name(model) == "ln_f"
    model.second = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="GPT2Model has 2 norms outside its blocks; exactly one final norm"):
        final_norm_name(model)


DROPOUT = {
    "gpt2": "embd_pdrop",
    "gpt_neox": "hidden_dropout",
    "gpt_bigcode": "embd_pdrop",
    "phi": "embd_pdrop",
    "starcoder2": "embedding_dropout",
}


@pytest.mark.parametrize("kind", DROPOUT)
def test_embedding_dropout_acts_once(kind):
    sizes = BackboneConfig(kind, 32, 3, 4, {DROPOUT[kind]: 0.5})
    config = building_config(sizes, vocab_size=53, block_size=16, eos_token_id=0)
    stacks = split_decoder(AutoModel.from_config(config).train(), 0)
    ids = torch.randint(53, (2, 8))
    assert (stacks.lower(input_ids=ids).last_hidden_state == 0).float().mean() > 0.25
    seen = []
    decoder_blocks(stacks.upper)[0].register_forward_pre_hook(lambda _block, inputs: seen.append(inputs[0]))
    h = torch.randn(2, 8, 32)
    stacks.upper(inputs_embeds=h)
    assert torch.equal(seen[0], h)


def test_scaled_embeddings_are_refused():
    config = building_config(
        BackboneConfig("afmoe", 32, 3, 4, {"mup_enabled": True}), vocab_size=53, block_size=16, eos_token_id=0
    )
    with pytest.raises(ValueError, match=r"scales its embeddings or logits \(mup_enabled True\)"):
        split_decoder(AutoModel.from_config(config), 1)
