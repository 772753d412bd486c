"""Any decoder can be tried: it is split exactly, or refused by name with what is missing."""

from __future__ import annotations

import pytest
import torch

from cocomix import InputError
from cocomix.models.building import BackboneConfig, backbone_config
from cocomix.models.checking import check_backbone

WORK = (
    *("gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt_neox"),
    *("gemma", "gemma3_text", "phi3", "falcon", "mixtral", "qwen3_moe", "stablelm", "starcoder2", "granite", "mpt"),
)
REFUSED = {
    "gemma2": r"scales its embeddings or logits \(final_logit_softcapping 30.0\)",
    "cohere": r"scales its embeddings or logits \(logit_scale",
    "phi": "has a bias on its token head",
    "opt": "OPTModel has 0 norms outside its blocks; exactly one final norm",
    "bloom": "BloomModel has 2 norms",
    "llama4_text": r"other blocks than full and sliding-window attention \(layer_types chunked_attention\)",
    "bert": "a later token changes its predictions at earlier ones",
    "mamba": "a trial fails",
}


def tiny(kind: str):
    sizes = BackboneConfig(kind, hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
    return backbone_config(sizes, vocab_size=64, block_size=32, eos_token_id=0)


@pytest.mark.parametrize("kind", WORK)
def test_decoders_that_can_be_split_pass(kind):
    config = tiny(kind)
    before, state = config.to_dict(), torch.get_rng_state()
    check_backbone(config, is_split=True)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_decoder_of_one_block_is_split_before_it():
    sizes = BackboneConfig("gpt2", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    check_backbone(backbone_config(sizes, vocab_size=64, block_size=8, eos_token_id=0), is_split=True)


@pytest.mark.parametrize(("kind", "missing"), REFUSED.items())
def test_others_are_refused_by_name_with_what_is_missing(kind, missing):
    with pytest.raises(InputError, match=missing) as caught:
        check_backbone(tiny(kind), is_split=True)
    message = str(caught.value)
    assert message.startswith(f"the backbone {kind!r} cannot be split around the mixer: ")
    assert "\n" not in message


@pytest.mark.parametrize(("kind", "problem"), {"bert": "a later token changes", "gptj": "a trial fails"}.items())
def test_a_decoder_that_cannot_be_trained_is_refused_whole_too(kind, problem):
    with pytest.raises(InputError, match=f"the backbone '{kind}' cannot be trained: {problem}"):
        check_backbone(tiny(kind), is_split=False)


def test_what_is_no_stack_of_blocks_is_not_tried_whole():
    check_backbone(tiny("mamba"), is_split=False)


def test_no_token_is_padding_in_a_vocabulary_of_our_own():
    """Padding has no embedding, and many types take 0 or 1 for it."""
    for kind in ("gemma", "phi3", "olmo2"):
        assert tiny(kind).pad_token_id is None
