"""Models from a few sizes: a backbone of any type, and the width that matches a parameter count."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cocomix.errors import InputError
from cocomix.models.backbones import fuse_activations
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.experts import idle_weights
from cocomix.suggest import did_you_mean

MATCH_TOLERANCE = 0.02
"""Two students are of equal size if their activated parameters differ by no more than this share."""


@dataclass
class BackboneConfig:
    """Sizes of a decoder, in Hugging Face's names.

    Args:
        model_type: any decoder type of Transformers: gpt2, llama, …
        hidden_size: D, width of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: attention heads per block.
        options: any other key of that type's configuration, e.g. `num_key_value_heads`.
    """

    model_type: str = "gpt2"
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    options: dict[str, Any] = field(default_factory=dict)


def _no_dropout(config: PretrainedConfig) -> dict[str, float]:
    """Dropout keys of a configuration type, all 0: dropout is off unless asked for."""
    return {
        key: 0.0
        for key, value in config.to_dict().items()
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop"))
    }


def default_options(sizes: BackboneConfig, widened: bool = False) -> dict[str, Any]:
    """The options that this project sets where `sizes` leaves them out; not the MLP's width of one that is widened.

    No dropout, a tied head, a key and value head per attention head, a gated MLP 8/3 as wide as the model. An unknown
    type has none.
    """
    if sizes.model_type not in CONFIG_MAPPING:
        return {}
    default = AutoConfig.for_model(sizes.model_type)
    options: dict[str, Any] = {"tie_word_embeddings": True, **_no_dropout(default)}
    if hasattr(default, "num_key_value_heads"):
        options["num_key_value_heads"] = sizes.num_attention_heads
    if hasattr(default, "intermediate_size") and not widened:
        options["intermediate_size"] = _mlp_width(sizes)
    return options


def backbone_config(sizes: BackboneConfig, *, vocab_size: int, block_size: int, eos_token_id: int) -> PretrainedConfig:
    """The Hugging Face configuration of a backbone for blocks of `block_size` tokens.

    What `options` leave out is as `default_options` has it.

    Raises:
        InputError: unknown type or option, or sizes that the type refuses.
    """
    if sizes.model_type not in CONFIG_MAPPING:
        raise InputError(
            f"backbone model_type is {sizes.model_type!r}, which Transformers does not know"
            + did_you_mean(sizes.model_type, CONFIG_MAPPING.keys())
        )
    default = AutoConfig.for_model(sizes.model_type)
    for key in sizes.options:
        if not hasattr(default, key):
            raise InputError(
                f"backbone option {key!r} is not a key of {type(default).__name__}"
                + did_you_mean(key, default.to_dict())
            )
    settings: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": block_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,  # else the token of that id, a real one in our vocabularies, would have no embedding
        **default_options(sizes),
        **sizes.options,
    }
    try:
        config = AutoConfig.for_model(sizes.model_type, **settings)
        with torch.device("meta"):
            activated_parameters(AutoModelForCausalLM.from_config(config))
    except Exception as error:  # Transformers refuses sizes and values in many ways
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the {sizes.model_type} backbone cannot be built: {reason}") from None
    return config


def _mlp_width(sizes: BackboneConfig) -> int:
    """Width of a gated MLP with as many weights as a plain one of 4 D: 8/3 D, a multiple of 8."""
    return 8 * round(sizes.hidden_size / 3)


def build_plain(config: PretrainedConfig) -> PreTrainedModel:
    """A freshly initialised causal language model of that configuration (seeded by torch's generator)."""
    return fuse_activations(AutoModelForCausalLM.from_config(config))


def activated_parameters(model: PreTrainedModel) -> int:
    """Weights that one token uses."""
    if isinstance(model, CoCoMixForCausalLM):
        return model.num_activated_parameters()
    return model.num_parameters() - idle_weights(model, model.config)


def match_parameters(sizes: BackboneConfig, target: int, size_of: Callable[[BackboneConfig], int]) -> BackboneConfig:
    """`sizes` widened so that a model of it has `target` weights, as near as it can.

    The width grows by whole multiples of the heads, then the MLP takes up what is left.

    Args:
        sizes: depth, heads and type are kept.
        target: weights wanted.
        size_of: weights of the model that is made of some sizes.

    Raises:
        InputError: no width comes within `MATCH_TOLERANCE`.
    """
    step = 2 * sizes.num_attention_heads  # rotary positions need an even width per head
    best = sizes
    while size_of(wider := dataclasses.replace(best, hidden_size=best.hidden_size + step)) <= target:
        best = wider
    key = "n_inner" if sizes.model_type == "gpt2" else "intermediate_size"
    width = 4 * best.hidden_size if key == "n_inner" else _mlp_width(best)

    def with_mlp(extra: int) -> BackboneConfig:
        return dataclasses.replace(best, options={**best.options, key: width + extra})

    if key not in best.options and hasattr(AutoConfig.for_model(sizes.model_type), key):
        per_unit = size_of(with_mlp(1)) - size_of(with_mlp(0))
        best = with_mlp(round((target - size_of(best)) / per_unit))
    reached = size_of(best)
    if abs(reached - target) > MATCH_TOLERANCE * target:
        raise InputError(
            f"no {sizes.model_type} of {sizes.num_hidden_layers} blocks and {sizes.num_attention_heads} heads has "
            f"{target:,} weights within {MATCH_TOLERANCE:.0%}: the nearest has {reached:,}; set its backbone yourself"
        )
    return best
