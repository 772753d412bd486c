"""Matched widths."""

from __future__ import annotations

import pytest
import torch

from cocomix.common.errors import InputError
from cocomix.models.building import BackboneConfig, backbone_config, build_plain, match_parameters


def size_of(sizes: BackboneConfig) -> int:
    config = backbone_config(sizes, vocab_size=512, block_size=64, eos_token_id=0)
    with torch.device("meta"):
        return build_plain(config).num_parameters()


@pytest.mark.parametrize(
    ("sizes", "growth", "head_width", "mlp_multiple"),
    [
        (BackboneConfig("gpt2", 512, 4, 2), 1.5, 5 * 64, 64),
        (BackboneConfig("gpt2", 512, 4, 8), 1.3, 9 * 8, 8),
        (BackboneConfig("llama", 512, 4, 8), 3.0, 14 * 8, 64),
        (BackboneConfig("gpt2", 96, 4, 4), 1.25, 13 * 2, 8),  # 12 or 16 times 2 would be too far
        # An MLP that the recipe sets cannot absorb the remainder, so heads widen in finer steps.
        (BackboneConfig("gpt2", 512, 4, 8, options={"n_inner": 2048}), 1.1, 34 * 2, 64),
    ],
)
def test_matched_widths_suit_kernels_as_far_as_the_size_allows(sizes, growth, head_width, mlp_multiple) -> None:
    target = round(growth * size_of(sizes))
    found = match_parameters(sizes, target, size_of)
    assert size_of(found) == pytest.approx(target, rel=0.02)
    assert found.hidden_size == head_width * sizes.num_attention_heads
    mlp = found.options.get("n_inner") or found.options["intermediate_size"]
    assert mlp % mlp_multiple == 0
    assert (found.num_attention_heads, found.num_hidden_layers) == (sizes.num_attention_heads, sizes.num_hidden_layers)


def test_blocks_without_the_usual_mlp_are_matched_by_their_width() -> None:
    sizes = BackboneConfig("qwen3_moe", 64, 2, 4, options={"num_experts": 4, "moe_intermediate_size": 64})
    target = round(1.5 * size_of(sizes))
    assert size_of(match_parameters(sizes, target, size_of)) == pytest.approx(target, rel=0.02)


def test_a_size_that_no_width_has_is_refused() -> None:
    sizes = BackboneConfig("gpt2", 512, 4, 8, options={"n_inner": 2048})
    with pytest.raises(InputError, match=r"no gpt2 of 4 blocks and 8 heads has 1,000 weights within 2%"):
        match_parameters(sizes, 1000, size_of)
