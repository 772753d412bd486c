"""Build backbones of any type from a few sizes, and match the width to a parameter count."""

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

from cocomix.common.errors import InputError, did_you_mean, error_message
from cocomix.common.settings import Blocks, Range
from cocomix.models.backbones import fuse_activations
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.experts import idle_weights
from cocomix.models.loading import load_causal_lm, load_config

MATCH_TOLERANCE = 0.02
"""Largest relative difference in activated parameters between students of equal size."""
HEAD_WIDTHS = (64, 8, 2)
"""Steps in which heads widen to match a size, most preferred first."""
WIDTH_TOLERANCE = 0.05
"""Largest change of a model's width for the sake of its heads' width."""
MLP_WIDTHS = (64, 8, 1)
"""Multiples of which the width of a matched MLP can be, most preferred first."""
MLP_TOLERANCE = 0.005
"""Largest relative difference in activated parameters for the sake of a preferred width of the MLP."""

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
"""Keys of a Transformers configuration and the recipe keys that set them."""
BLOCK_CONFIGS = {"attn_config", "ffn_config"}
"""Nested configurations that describe parts of a block, not separate models."""


@dataclass
class BackboneConfig:
    """Sizes of a decoder, with Hugging Face's names, or pretrained weights to start from.

    Args:
        model_type: any decoder type of Transformers: gpt2, llama, …
        hidden_size: D, width of the residual stream.
        num_hidden_layers: number of blocks.
        num_attention_heads: number of attention heads per block.
        options: other keys of that type's configuration, such as `num_key_value_heads`.
        source: instead of sizes, folder or id of a Hugging Face causal language model with whose weights students
            start.
    """

    model_type: str = "gpt2"
    hidden_size: Annotated[int, Range(1, 2**17)] = 128
    num_hidden_layers: Blocks = 6
    num_attention_heads: Annotated[int, Range(1, 4096)] = 4
    options: dict[str, Any] = field(default_factory=dict)
    source: str | None = None

    def problems(self) -> list[str]:
        """List what is wrong with these settings, one line each."""
        if self.source is not None:
            default = BackboneConfig(source=self.source)
            own = [each.name for each in dataclasses.fields(self)]
            redundant = [name for name in own if getattr(self, name) != getattr(default, name)]
            return (
                [f"source is {self.source!r}, which has its own sizes; leave out {', '.join(redundant)}"]
                if redundant
                else []
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
    """Dropout keys of a configuration type, all 0: dropout is off by default."""
    return {
        key: 0.0
        for key, value in config.to_dict().items()
        if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop"))
    }


def default_options(sizes: BackboneConfig, widened: bool = False) -> dict[str, Any]:
    """Return the default options of a backbone; empty for a type that cannot be one.

    No dropout, a tied head, as many key and value heads as attention heads, and a gated MLP 8/3 as wide as the model,
    unless `widened`, where the MLP follows from the matched size.
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
    """Return the default configuration of a type.

    Raises:
        InputError: the type is unknown, or a recipe cannot set its size.
    """
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"backbone model_type is {model_type!r}, which Transformers does not know"
            + did_you_mean(model_type, CONFIG_MAPPING.keys())
        )
    if inner := set(CONFIG_MAPPING[model_type].sub_configs) - BLOCK_CONFIGS:
        raise InputError(
            f"the {model_type} backbone cannot be built: the recipe's sizes do not apply to its "
            f"{', '.join(sorted(inner))}; use a text-only model"
        )
    with _refusals(model_type):
        return AutoConfig.for_model(model_type)


@contextmanager
def _refusals(model_type: str) -> Iterator[None]:
    """Convert the various errors of Transformers to InputError."""
    try:
        yield
    except Exception as error:
        raise InputError(f"the {model_type} backbone cannot be built: {error_message(error)}") from None


def backbone_config(sizes: BackboneConfig, *, vocab_size: int, block_size: int, eos_token_id: int) -> PretrainedConfig:
    """Build the Hugging Face configuration of a backbone for blocks of `block_size` tokens.

    `default_options` complete the options.

    Raises:
        InputError: an unknown type or option, or sizes that the type refuses or ignores.
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
        "pad_token_id": None,  # otherwise a real token of our vocabularies would have no embedding
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
    """Raise InputError for an option that the type's architecture lacks."""
    default, general = _default_config(sizes.model_type), PretrainedConfig()
    for key in sizes.options:
        if key != "tie_word_embeddings" and (not hasattr(default, key) or hasattr(general, key)):
            raise InputError(
                f"backbone option {key!r} is not a setting of the {sizes.model_type} architecture"
                + did_you_mean(key, default.to_dict())
            )


def pretrained_config(source: str, block_size: int) -> PretrainedConfig:
    """Load the configuration of the model at `source`, for training in float32 without dropout.

    Raises:
        InputError: it does not load, or its context is shorter than a block.
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
    """Load the causal language model at `source` with a configuration of `pretrained_config`."""
    return fuse_activations(load_causal_lm(source, torch.float32, copy.deepcopy(config)))


def _mlp_width(sizes: BackboneConfig) -> int:
    """Width of a gated MLP with as many weights as a plain one of width 4 D: 8/3 D, a multiple of 8."""
    return 8 * round(sizes.hidden_size / 3)


def build_plain(config: PretrainedConfig) -> PreTrainedModel:
    """Build a causal language model with random weights from torch's generator."""
    return fuse_activations(AutoModelForCausalLM.from_config(config))


def activated_parameters(model: PreTrainedModel) -> int:
    """Count the weights that one token uses."""
    if isinstance(model, CoCoMixForCausalLM):
        return model.num_activated_parameters()
    return model.num_parameters() - idle_weights(model, model.config)


def match_parameters(sizes: BackboneConfig, target: int, size_of: Callable[[BackboneConfig], int]) -> BackboneConfig:
    """Widen `sizes` until a model has as close to `target` weights as possible.

    Depth, heads and type stay. Heads widen in steps of 64, 8 or 2 (`HEAD_WIDTHS`): attention kernels are fast at
    multiples of 64 and need multiples of 8, and rotary positions need even widths. A step of 64 or 8 must divide the
    width of the heads, and may change the width of the model by at most `WIDTH_TOLERANCE`. The width of the MLP absorbs
    the remainder, as a multiple of 64 or 8 if that is close enough (`MLP_WIDTHS`).

    Args:
        sizes: sizes to widen.
        target: number of weights.
        size_of: function that counts the weights of a model with given sizes.

    Raises:
        InputError: no width is within `MATCH_TOLERANCE`.
    """
    heads = sizes.num_attention_heads
    finest = _widen(sizes, HEAD_WIDTHS[-1] * heads, target, size_of)
    for step in HEAD_WIDTHS:
        widened = finest
        if step != HEAD_WIDTHS[-1]:
            steps = round((finest.hidden_size - sizes.hidden_size) / (step * heads))
            widened = dataclasses.replace(sizes, hidden_size=sizes.hidden_size + steps * step * heads)
            change = abs(widened.hidden_size / finest.hidden_size - 1)
            if sizes.hidden_size % (step * heads) or change > WIDTH_TOLERANCE:
                continue
        found = _widen_mlp(widened, target, size_of)
        reached = size_of(found)
        if abs(reached - target) <= MATCH_TOLERANCE * target:
            return found
    raise InputError(
        f"no {sizes.model_type} of {sizes.num_hidden_layers} blocks and {sizes.num_attention_heads} heads has "
        f"{target:,} weights within {MATCH_TOLERANCE:.0%}: the nearest has {reached:,}; set its backbone yourself"
    )


def _widen(sizes: BackboneConfig, step: int, target: int, size_of: Callable[[BackboneConfig], int]) -> BackboneConfig:
    """Return the widest model of at most `target` weights whose width is that of `sizes` plus a multiple of `step`."""

    def widened(steps: int) -> BackboneConfig:
        return dataclasses.replace(sizes, hidden_size=sizes.hidden_size + steps * step)

    too_many = 1
    while size_of(widened(too_many)) <= target:
        too_many *= 2
    first_too_wide = bisect.bisect_right(
        range(too_many), target, lo=too_many // 2 + 1, key=lambda steps: size_of(widened(steps))
    )
    return widened(first_too_wide - 1)


def _widen_mlp(sizes: BackboneConfig, target: int, size_of: Callable[[BackboneConfig], int]) -> BackboneConfig:
    """Set the width of the MLP with which a model is closest to `target` weights, unless the type or recipe has none
    to set."""
    key = "n_inner" if sizes.model_type == "gpt2" else "intermediate_size"
    if key in sizes.options or not hasattr(AutoConfig.for_model(sizes.model_type), key):
        return sizes
    width = 4 * sizes.hidden_size if key == "n_inner" else _mlp_width(sizes)

    def with_mlp(width: int) -> BackboneConfig:
        return dataclasses.replace(sizes, options={**sizes.options, key: width})

    per_unit = size_of(with_mlp(width + 1)) - size_of(with_mlp(width))
    if not per_unit:  # the type has no blocks with such an MLP
        return sizes
    exact = width + (target - size_of(with_mlp(width))) / per_unit
    for multiple in MLP_WIDTHS:
        rounded = multiple * max(1, round(exact / multiple))
        if abs(rounded - exact) * per_unit <= MLP_TOLERANCE * target:
            break
    return with_mlp(rounded)
