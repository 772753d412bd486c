"""Models from a few sizes: a backbone of any type, and the width that matches a parameter count."""

from __future__ import annotations

import bisect
import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from cocomix.errors import InputError
from cocomix.models.backbones import fuse_activations
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.experts import idle_weights
from cocomix.models.loading import load_causal_lm, load_config
from cocomix.settings import Blocks, Range
from cocomix.suggest import did_you_mean

MATCH_TOLERANCE = 0.02
"""Two students are of equal size if their activated parameters differ by no more than this share."""

SET_BY_RECIPE = {
    "vocab_size": "tokenizer",
    "max_position_embeddings": "block_size",
    "bos_token_id": "tokenizer",
    "eos_token_id": "tokenizer",
    "pad_token_id": "tokenizer",
    "hidden_size": "hidden_size of the backbone",
    "num_hidden_layers": "num_hidden_layers of the backbone",
    "num_attention_heads": "num_attention_heads of the backbone",
}
"""Keys of a Transformers configuration, each with what decides it in a recipe."""
BLOCK_CONFIGS = {"attn_config", "ffn_config"}
"""Configurations inside a configuration that describe parts of a block, not models of their own."""


@dataclass
class BackboneConfig:
    """Sizes of a decoder, in Hugging Face's names, or pretrained weights to start from.

    Args:
        model_type: any decoder type of Transformers: gpt2, llama, …
        hidden_size: D, width of the residual stream.
        num_hidden_layers: blocks.
        num_attention_heads: attention heads per block.
        options: any other key of that type's configuration, e.g. `num_key_value_heads`.
        source: instead of sizes, a Hugging Face causal language model, folder or id, from whose weights students start.
    """

    model_type: str = "gpt2"
    hidden_size: Annotated[int, Range(1, 2**17)] = 128
    num_hidden_layers: Blocks = 6
    num_attention_heads: Annotated[int, Range(1, 4096)] = 4
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    def problems(self) -> list[str]:
        """Return what cannot work about these settings, a line each."""
        if self.source is not None:
            default = BackboneConfig(source=self.source)
            own = [each.name for each in dataclasses.fields(self)]
            beside = [name for name in own if getattr(self, name) != getattr(default, name)]
            return (
                [f"source is {self.source!r}, which has its own sizes; leave out {', '.join(beside)}"] if beside else []
            )
        names = {key: key for key in SET_BY_RECIPE}
        if self.model_type in CONFIG_MAPPING:
            names |= {own: key for key, own in CONFIG_MAPPING[self.model_type].attribute_map.items() if key in names}
        return [
            f"options.{key} overrides the recipe's {SET_BY_RECIPE[names[key]]}; leave it out"
            for key in self.options
            if key in names
        ]


def _no_dropout(config: PretrainedConfig) -> dict[str, float]:
    """Dropout keys of a configuration type, all 0: dropout is off unless asked for."""
    return {
        key: 0.0
        for key, value in config.to_dict().items()
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop"))
    }


def default_options(sizes: BackboneConfig, widened: bool = False) -> dict[str, Any]:
    """The options that this project sets where `sizes` leaves them out; not the MLP's width of one that is widened.

    No dropout, a tied head, a key and value head per attention head, a gated MLP 8/3 as wide as the model. A type
    that cannot be a backbone has none.
    """
    try:
        default = _default_config(sizes.model_type)
    except InputError:
        return {}
    options: dict[str, Any] = {"tie_word_embeddings": True, **_no_dropout(default)}
    if hasattr(default, "num_key_value_heads"):
        options["num_key_value_heads"] = sizes.num_attention_heads
    if hasattr(default, "intermediate_size") and not widened:
        options["intermediate_size"] = _mlp_width(sizes)
    return options


def _default_config(model_type: str) -> PretrainedConfig:
    """The configuration of a type as Transformers has it.

    Raises:
        InputError: an unknown type, or one whose size a recipe does not decide.
    """
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"backbone model_type is {model_type!r}, which Transformers does not know"
            + did_you_mean(model_type, CONFIG_MAPPING.keys())
        )
    if inner := set(CONFIG_MAPPING[model_type].sub_configs) - BLOCK_CONFIGS:
        raise InputError(
            f"the {model_type} backbone cannot be built: the recipe's sizes do not reach its "
            f"{', '.join(sorted(inner))}; use a model of text only"
        )
    with _refusals(model_type):
        return AutoConfig.for_model(model_type)


@contextmanager
def _refusals(model_type: str) -> Iterator[None]:
    """Raise what Transformers refuses, which it does in many ways, as InputError."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise InputError(f"the {model_type} backbone cannot be built: {reason}") from None


def backbone_config(sizes: BackboneConfig, *, vocab_size: int, block_size: int, eos_token_id: int) -> PretrainedConfig:
    """The Hugging Face configuration of a backbone for blocks of `block_size` tokens.

    What `options` leave out is as `default_options` has it.

    Raises:
        InputError: unknown type or option, or sizes that the type refuses or ignores.
    """
    _check_options(sizes)
    required: dict[str, Any] = {
        "vocab_size": vocab_size,
        "max_position_embeddings": block_size,
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_attention_heads": sizes.num_attention_heads,
    }
    settings = {
        **required,
        "bos_token_id": eos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": None,  # else the token of that id, a real one in our vocabularies, would have no embedding
        **default_options(sizes),
        **sizes.options,
    }
    with _refusals(sizes.model_type):
        config = AutoConfig.for_model(sizes.model_type, **settings)
        with torch.device("meta"):
            activated_parameters(AutoModelForCausalLM.from_config(config))
    for key, value in required.items():
        if key not in sizes.options and (built := getattr(config, key, value)) != value:
            raise InputError(
                f"the {sizes.model_type} backbone cannot be built: its {key} is {built}, and the recipe has {value}"
            )
    return config


def _check_options(sizes: BackboneConfig) -> None:
    """Raise InputError unless every option describes the architecture of the type."""
    default, general = _default_config(sizes.model_type), PretrainedConfig()
    for key in sizes.options:
        if key != "tie_word_embeddings" and (not hasattr(default, key) or hasattr(general, key)):
            raise InputError(
                f"backbone option {key!r} is not a setting of the {sizes.model_type} architecture"
                + did_you_mean(key, default.to_dict())
            )


def pretrained_config(source: str, block_size: int) -> PretrainedConfig:
    """Return the configuration of the model at `source`, to be trained in float32 without dropout.

    Raises:
        InputError: it does not load, or reads less than a block.
    """
    config = load_config(source).get_text_config()
    context = getattr(config, "max_position_embeddings", block_size)
    if context < block_size:
        raise InputError(f"block_size is {block_size}; the backbone {source} reads at most {context} tokens")
    for key, value in _no_dropout(config).items():
        setattr(config, key, value)
    config.dtype = torch.float32
    config._name_or_path = ""
    return config


def load_pretrained(source: str, config: PretrainedConfig) -> PreTrainedModel:
    """Return the causal language model at `source` as `pretrained_config` has it."""
    return fuse_activations(load_causal_lm(source, torch.float32, copy.deepcopy(config)))


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

    def widened(steps: int) -> BackboneConfig:
        return dataclasses.replace(sizes, hidden_size=sizes.hidden_size + steps * step)

    too_many = 1
    while size_of(widened(too_many)) <= target:
        too_many *= 2
    first_too_wide = bisect.bisect_right(
        range(too_many), target, lo=too_many // 2 + 1, key=lambda steps: size_of(widened(steps))
    )
    best = widened(first_too_wide - 1)
    key = "n_inner" if sizes.model_type == "gpt2" else "intermediate_size"
    width = 4 * best.hidden_size if key == "n_inner" else _mlp_width(best)

    def with_mlp(extra: int) -> BackboneConfig:
        return dataclasses.replace(best, options={**best.options, key: width + extra})

    if key not in best.options and hasattr(AutoConfig.for_model(sizes.model_type), key):
        per_unit = size_of(with_mlp(1)) - size_of(with_mlp(0))
        best = with_mlp(max(1 - width, round((target - size_of(best)) / per_unit)))
    reached = size_of(best)
    if abs(reached - target) > MATCH_TOLERANCE * target:
        raise InputError(
            f"no {sizes.model_type} of {sizes.num_hidden_layers} blocks and {sizes.num_attention_heads} heads has "
            f"{target:,} weights within {MATCH_TOLERANCE:.0%}: the nearest has {reached:,}; set its backbone yourself"
        )
    return best
