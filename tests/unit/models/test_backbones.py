"""A decoder is cut in two without changing a weight, or refused with the reason."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModel

from cocomix.models.backbones import decoder_blocks, final_norm_name, split_decoder

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


def test_blocks_with_a_sliding_window_are_refused(decoder):
    qwen = decoder("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ValueError, match=r"'qwen2' has sliding-window .*sliding_attention.*only full attention"):
        split_decoder(qwen, 1)


def test_a_window_over_all_of_a_backbone_is_refused(decoder):
    """Above the mixer a window of n positions would be one of n/2 tokens."""
    mistral = decoder("mistral", sliding_window=4)
    with pytest.raises(ValueError, match="sliding"):
        split_decoder(mistral, 1)


def test_a_decoder_without_a_list_of_its_blocks_is_refused(decoder):
    model = decoder("gpt2")
    del model.h[2]
    with pytest.raises(ValueError, match="GPT2Model has 0 lists of 3 blocks; a decoder with exactly one"):
        decoder_blocks(model)


def test_a_decoder_with_two_norms_is_refused(decoder):
    model = decoder("gpt2")
    assert final_norm_name(model) == "ln_f"
    model.second = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="GPT2Model has 2 norms beside its blocks; exactly one final norm"):
        final_norm_name(model)
