"""A configuration says what is wrong with it; its defaults are the published settings but for two."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
from transformers import GPT2Config

from cocomix import CoCoMixConfig, CoCoMixForCausalLM, ConceptExtractor
from cocomix.concepts.labeling import LabelsConfig
from cocomix.pipeline.methods import MixerConfig


def test_the_defaults_are_the_published_settings():
    config = CoCoMixConfig()
    assert config.backbone_config.model_type == "gpt2"
    assert (config.insert_layer, config.num_concepts, config.num_active_concepts) == (3, 32768, 32)
    assert (config.mixing, config.concept_slot, config.concept_loss_weight) == ("interleave", "concept", 0.1)
    assert config.slot_positions == "interleaved"


@pytest.mark.parametrize("tied", [True, False])
def test_heads_are_tied_as_the_configuration_or_else_the_backbone_says(tied, tmp_path):
    assert CoCoMixConfig(GPT2Config(tie_word_embeddings=tied)).tie_word_embeddings is tied
    config = CoCoMixConfig(GPT2Config(tie_word_embeddings=not tied), tie_word_embeddings=tied)
    assert config.tie_word_embeddings is tied
    config.save_pretrained(tmp_path)
    assert CoCoMixConfig.from_pretrained(tmp_path).tie_word_embeddings is tied


def test_a_recipe_has_the_same_defaults_as_the_classes() -> None:
    config, mixer = CoCoMixConfig(), MixerConfig()
    shared = [setting.name for setting in dataclasses.fields(MixerConfig) if setting.name != "concept_loss_schedule"]
    assert {name: getattr(mixer, name) for name in shared} == {name: getattr(config, name) for name in shared}
    parameters = inspect.signature(ConceptExtractor).parameters
    for name in ("labels_per_token", "selection"):
        assert getattr(LabelsConfig(), name) == parameters[name].default
    assert LabelsConfig().selection == "attribution"
    assert inspect.signature(CoCoMixForCausalLM.from_backbone).parameters["concept_loss_weight"].default == 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"insert_layer": 12}, "insert_layer is 12; a backbone of 12 blocks takes 0 to 11"),
        ({"insert_layer": -1}, "insert_layer is -1; a backbone of 12 blocks takes 0 to 11"),
        ({"num_active_concepts": 9, "num_concepts": 8}, "num_active_concepts is 9; with num_concepts 8"),
        ({"num_active_concepts": 0}, "num_active_concepts is 0; .* it must be 1 to 32768"),
        ({"mixing": "concat"}, "mixing is 'concat'; expected one of interleave, add, none"),
        ({"concept_slot": "both"}, "concept_slot is 'both'; expected one of concept, residual"),
        ({"slot_positions": "same"}, "slot_positions is 'same'; expected one of interleaved, repeat"),
        ({"concept_loss_weight": -0.1}, "concept_loss_weight is -0.1; it must be 0 or more"),
        ({"concept_loss_weight": float("nan")}, "concept_loss_weight is nan; it must be 0 or more"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(settings, message):
    with pytest.raises(ValueError, match=message):
        CoCoMixConfig(**settings)


def test_a_backbone_can_be_given_as_a_dictionary():
    given = GPT2Config(n_layer=5, n_embd=24, n_head=2, vocab_size=99, n_positions=17)
    for config in (CoCoMixConfig(given), CoCoMixConfig(given.to_dict())):
        assert isinstance(config.backbone_config, GPT2Config)
        assert (config.num_hidden_layers, config.hidden_size) == (5, 24)
        assert (config.vocab_size, config.max_position_embeddings) == (99, 17)


def test_special_tokens_are_those_of_the_backbone_unless_given():
    backbone = GPT2Config(bos_token_id=1, eos_token_id=2, pad_token_id=3)
    config = CoCoMixConfig(backbone)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 3)
    assert CoCoMixConfig(backbone, eos_token_id=7).eos_token_id == 7


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_as_the_backbone_says(tied):
    assert CoCoMixConfig(GPT2Config(tie_word_embeddings=tied)).tie_word_embeddings is tied


@pytest.mark.parametrize(("mixing", "slots"), [("interleave", 2), ("add", 1), ("none", 1)])
def test_only_interleaving_takes_a_second_slot(mixing, slots):
    assert CoCoMixConfig(mixing=mixing).slots_per_token == slots
