"""Load a causal language model from a folder or the Hugging Face Hub, or refuse it with a one-line error."""

from __future__ import annotations

import re
from pathlib import Path, PurePath
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from cocomix.common import files
from cocomix.common.errors import InputError, UnreachableError, error_message

CONSTANTS = re.compile(
    r"(^|\.)((attn|attention|self_attn|self_attention)(\.attention)?\.(bias|masked_bias)|rotary_emb\.inv_freq)$"
)
"""Names of causal masks and rotary frequencies, which older versions of Transformers saved."""


def load_config(source: str | Path) -> PretrainedConfig:
    """Load the configuration of the model at `source`, a folder or Hub id.

    Raises:
        InputError: it does not load, or its model needs custom code; UnreachableError if nothing was found.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # malformed files raise errors of many types
        raise _refusal(source, error) from error
    classes = getattr(config, "auto_map", None) or {}
    if "AutoModelForCausalLM" in classes and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _custom_code(source)
    return config


def load_causal_lm(
    source: str | Path, dtype: torch.dtype | None = None, config: PretrainedConfig | None = None
) -> PreTrainedModel:
    """Load the causal language model at `source`; its files must hold exactly the weights that it needs.

    Args:
        source: a folder or Hub id.
        dtype: dtype of the weights; by default that of the files.
        config: configuration that replaces the saved one.

    Raises:
        InputError: it does not load, needs custom code, lacks weights, has unknown ones, or some are not finite.
    """
    config = config or load_config(source)
    _require_own_files(Path(source))
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
            ("unexpected_keys", "its files hold weights that it does not know"),
            ("mismatched_keys", "its files hold weights of a wrong shape"),
        )
        if info[kind]
    ]
    if not problems and (wrong := _not_finite(model)):
        problems = [f"its weights contain NaN or infinity ({_some(wrong)})"]
    if problems:
        raise InputError(f"the model {source} is not used: {'; '.join(problems)}; give a completely saved model")
    return model


def check_vocabulary(
    config: PretrainedConfig, tokens: int, source: str | Path, tokenizer: str | Path | None = None
) -> None:
    """Raise InputError if the model at `source` has fewer embeddings than its tokenizer has tokens.

    Args:
        config: configuration of the model.
        tokens: vocabulary size of the tokenizer.
        source: folder or Hub id of the model.
        tokenizer: folder or id of the tokenizer; by default the model's.
    """
    known = config.get_text_config().vocab_size
    if tokens > known:
        raise InputError(
            f"the tokenizer {tokenizer or source} has {tokens} tokens, but the model {source} only {known} "
            "embeddings; use the tokenizer that the model was trained with, or save the model with more embeddings "
            "(resize_token_embeddings)"
        )


def _require_own_files(folder: Path) -> None:
    """Raise InputError if an index of weight files names one outside its folder."""
    for index in folder.glob("*.index.json"):
        content = files.read_json(index)
        names = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(names, dict) or not all(map(_is_file_name, names.values())):
            raise InputError(f"the model {folder} is not used: {index.name} does not name files of this folder only")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and PurePath(name).name == name != ".."


def _not_finite(model: PreTrainedModel) -> list[str]:
    """List the names of weights that contain NaN or infinity."""
    return [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.element_size() > 1 and not bool(weight.isfinite().all())
    ]


def _some(keys: Any) -> str:
    """Name the first of several weights and count the others."""
    names = sorted(key if isinstance(key, str) else key[0] for key in keys)
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _refusal(source: str | Path, error: Exception) -> InputError:
    """Convert an error of Transformers to the one to raise."""
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return _custom_code(source)
    elsewhere = isinstance(error, OSError) and not Path(source).exists()
    return (UnreachableError if elsewhere else InputError)(
        f"the model {source} does not load ({type(error).__name__}: {error_message(error)})"
    )


def _custom_code(source: str | Path) -> InputError:
    return InputError(
        f"the model {source} needs custom code, which cocomix does not run; give one whose type Transformers knows"
    )
