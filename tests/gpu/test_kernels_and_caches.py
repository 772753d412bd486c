"""Attention kernels and caches that a GPU offers give what the default ones give."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import is_flash_attn_2_available

from cocomix import CoCoMixForCausalLM

WIDE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2}
"""Sizes of a backbone with a head width of 64."""
IDS = torch.arange(1, 33).view(2, 16)


def logits(model: CoCoMixForCausalLM, kernel: str) -> list[torch.Tensor]:
    """Logits without padding, and of the tokens of a padded batch."""
    model.set_attn_implementation(kernel)
    ids = IDS.to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        return [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]


@pytest.mark.gpu
@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_flex_attention_at_head_width_64_gives_what_sdpa_gives(mixing, random_model, relative_error):
    model = random_model("llama", backbone=WIDE, mixing=mixing).float().cuda()
    for found, expected in zip(logits(model, "flex_attention"), logits(model, "sdpa"), strict=True):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="flash attention 2 is not installed")
@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_flash_attention_2_gives_what_sdpa_gives(mixing, random_model, relative_error):
    model = random_model("llama", backbone=WIDE, mixing=mixing).to("cuda", torch.bfloat16)
    for found, expected in zip(logits(model, "flash_attention_2"), logits(model, "sdpa"), strict=True):
        assert relative_error(found, expected) < 0.05


@pytest.mark.parametrize("mixing", ["interleave", "add"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_static_cache_generates_what_a_dynamic_one_does(kind, mixing, device, random_model):
    """On a GPU its steps are compiled."""
    model = random_model(kind, mixing=mixing).float().to(device)
    ids = IDS.to(device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    assert expected.shape == (2, 28)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
