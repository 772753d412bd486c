"""Export a trained model: its weights in another dtype and in files of limited size."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from cocomix.common import files
from cocomix.common.errors import InputError
from cocomix.data.tokenizer import load_tokenizer
from cocomix.models.loading import load_causal_lm

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB)")


def export_model(source: Path, target: Path, dtype: str | None, max_shard_size: str | None) -> list[Path]:
    """Save the model and tokenizer in `source` to the new folder `target`.

    Args:
        source: folder of a trained model.
        target: folder to create.
        dtype: one of `DTYPES`; None keeps the saved one.
        max_shard_size: limit on the size of a weights file, such as `15MB`; a larger weight has a file to itself.

    Returns:
        The weights files.

    Raises:
        InputError: the model does not load, `target` exists, or a weight exceeds the range of the dtype.
    """
    if max_shard_size is not None and not SHARD_SIZE.fullmatch(max_shard_size):
        raise InputError(f"--max-shard-size is {max_shard_size!r}; expected a size such as 15MB or 2GB")
    files.check_creatable(target)
    if target.exists() or files.partial(target).exists():
        raise InputError(f"{target if target.exists() else files.partial(target)} exists; choose another folder")
    model = load_causal_lm(source, dtype=None if dtype is None else DTYPES[dtype])
    tokenizer = load_tokenizer(str(source))
    unfinished = files.partial(target)
    model.save_pretrained(unfinished, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    tokenizer.save_pretrained(str(unfinished))
    files.finish(target)
    return sorted(target.glob("*.safetensors"))
