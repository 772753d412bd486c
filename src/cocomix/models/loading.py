"""Load a causal language model from a folder or the Hugging Face hub: complete, or refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from cocomix.errors import InputError, UnreachableError

CONSTANTS = re.compile(
    r"(^|\.)((attn|attention|self_attn|self_attention)(\.attention)?\.(bias|masked_bias)|rotary_emb\.inv_freq)$"
)
"""Causal masks and rotary frequencies, which models now compute and older versions of Transformers saved."""


def load_config(source: str | Path) -> PretrainedConfig:
    """The configuration of the model at `source`, a folder or hub id.

    Raises:
        InputError: it does not load, or its model needs code of its own; UnreachableError where nothing was found.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # malformed files raise errors of many types
        raise _refusal(source, error) from error
    classes = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in classes and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _own_code(source)
    return config


def load_causal_lm(
    source: str | Path, dtype: torch.dtype | None = None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """The causal language model at `source`, with every weight from its files and every weight of its files used.

    Args:
        source: a folder or hub id.
        dtype: of the weights; by default the one they were saved in.
        config: instead of its own.

    Raises:
        InputError: it does not load, needs code of its own, lacks weights, has others, or some are not finite.
    """
    config = config or load_config(source)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # damaged files and files of other models raise errors of many types
        raise _refusal(source, error) from error
    info["unexpected_keys"] = [key for key in info["unexpected_keys"] if not CONSTANTS.search(key)]
    problems = [
        f"{problem} ({_some(info[kind])})"
        for kind, problem in (
            ("missing_keys", "its files lack weights that it needs"),
            ("unexpected_keys", "its files hold weights that it has no place for"),
            ("mismatched_keys", "its files hold weights of another shape"),
        )
        if info[kind]
    ]
    if not problems and (wrong := _not_finite(model)):
        problems = [f"its weights contain NaN or infinity ({_some(wrong)})"]
    if problems:
        raise InputError(f"the model {source} is not used: {'; '.join(problems)}; give one that was saved whole")
    return model


def check_vocabulary(
    config: PretrainedConfig, tokens: int, source: str | Path, tokenizer: str | Path | None = None
) -> None:
    """Raise InputError unless the model at `source` has an embedding for each of a tokenizer's `tokens`.

    The tokenizer is that at `tokenizer`, by default the model's own.
    """
    known = config.get_text_config().vocab_size
    if tokens > known:
        raise InputError(
            f"the tokenizer {tokenizer or source} has {tokens} tokens, but the model {source} only {known} "
            "embeddings; use the tokenizer that the model was trained with, or save the model with more embeddings "
            "(resize_token_embeddings)"
        )


def _not_finite(model: PreTrainedModel) -> list[str]:
    """Names of the weights that contain NaN or infinity."""
    return [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.element_size() > 1 and not bool(weight.isfinite().all())
    ]


def _some(keys: Any) -> str:
    """The first of several weights and how many there are."""
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _refusal(source: str | Path, error: Exception) -> InputError:
    """The error to raise for one that Transformers raised."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return _own_code(source)
    elsewhere = isinstance(error, OSError) and not Path(source).exists()
    reason = " ".join(str(error).split())
    return (UnreachableError if elsewhere else InputError)(
        f"the model {source} does not load ({type(error).__name__}: {reason:.300})"
    )


def _own_code(source: str | Path) -> InputError:
    return InputError(
        f"the model {source} brings its own code, which cocomix does not run; give one whose type Transformers knows"
    )
