"""A file that is no published checkpoint is refused by what it lacks."""

from __future__ import annotations

import pytest
import torch

from cocomix import load_reference_checkpoint

SETTINGS = {"num_attention_heads": 4, "insert_layer": 1, "num_active_concepts": 4}


def test_an_ordinary_gpt2_is_refused_by_the_weights_it_lacks(random_teacher):
    state = random_teacher("gpt2").state_dict()
    with pytest.raises(ValueError, match=r"not a published CoCoMix checkpoint: it has no transformer\.pre_bias, .*"):
        load_reference_checkpoint(state, **SETTINGS)


def test_weights_of_only_half_a_model_are_refused(random_teacher):
    state = dict(random_teacher("gpt2").state_dict())
    state |= {
        "transformer.pre_bias": torch.zeros(32),
        "transformer.concept_predictor.weight": torch.zeros(40, 32),
        "transformer.concept_predictor.bias": torch.zeros(40),
        "transformer.compress_layer.weight": torch.zeros(32, 40),
        "transformer.compress_layer.bias": torch.zeros(32),
    }
    assert load_reference_checkpoint(state, **SETTINGS).config.num_concepts == 40
    del state["transformer.wte.weight"]
    with pytest.raises(ValueError, match="not a published CoCoMix checkpoint"):
        load_reference_checkpoint(state, **SETTINGS)
