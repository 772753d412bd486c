"""Export a trained model: its weights in another dtype and in files of limited size, or as the plain decoder."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from cocomix.common import files
from cocomix.common.errors import InputError
from cocomix.data.tokenizer import load_tokenizer
from cocomix.models.configuration import StackedConfig
from cocomix.models.loading import load_causal_lm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)")


def export_model(
    source: Path, target: Path, dtype: str | None, max_shard_size: str | None, plain: bool = False
) -> list[Path]:
    """Save the model and tokenizer in `source` to the new folder `target`.

    Args:
        source: folder of a trained model.
        target: folder to create.
        dtype: one of `DTYPES`; None keeps the saved one.
        max_shard_size: limit on the size of a weights file, such as `15MB`; a larger weight has a file to itself.
        plain: save the plain decoder, which Transformers loads without this package.

    Returns:
        The weights files.

    Raises:
        InputError: the model does not load, `target` exists, a weight exceeds the range of the dtype, or no plain
            decoder makes the same predictions.
    """
    if max_shard_size is not None and not SHARD_SIZE.fullmatch(max_shard_size):
        raise InputError(f"--max-shard-size is {max_shard_size!r}; expected a size such as 15MB or 2GB")
    files.check_new(target)
    model = load_causal_lm(source, dtype=None if dtype is None else DTYPES[dtype])
    if plain:
        model = plain_decoder(model, source)
    tokenizer = load_tokenizer(str(source))
    with files.new_folder(target) as unfinished:
        model.save_pretrained(unfinished, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
        tokenizer.save_pretrained(str(unfinished))
    return sorted(target.glob("*.safetensors"))


def plain_decoder(model: PreTrainedModel, source: Path) -> PreTrainedModel:
    """Return the decoder of Transformers that makes the same predictions as `model`, or `model` if it is one.

    Raises:
        InputError: there is none.
    """
    if not isinstance(model.config, StackedConfig):
        return model
    try:
        if not hasattr(model, "to_backbone"):
            raise ValueError("its last blocks are heads for several future tokens; no backbone has them")
        return model.to_backbone()
    except ValueError as error:
        raise InputError(
            f"{source} cannot become a plain decoder: {error}; export it with --to model, or train a student with "
            "mixing: none, which can"
        ) from error
