"""Run llama.cpp's `convert_hf_to_gguf.py` with the name of a pre-tokenizer for vocabularies that it does not recognize.

    python gguf_conversion.py CONVERTER PRE_TOKENIZER ARGUMENT ...

A process of its own, because the converter imports modules with common names. An empty PRE_TOKENIZER changes nothing.
"""

from __future__ import annotations

import runpy
import sys
from importlib import import_module
from pathlib import Path
from typing import Any


def name_pre_tokenizer(model: Any, name: str) -> None:
    """Let the converter's class `model` use this pre-tokenizer where it recognizes none."""
    recognize = model.get_vocab_base_pre

    def recognized(self: Any, tokenizer: Any) -> str:
        try:
            return recognize(self, tokenizer)
        except NotImplementedError:
            return name

    model.get_vocab_base_pre = recognized


def main() -> None:
    """Run the converter as its own command line would."""
    converter, pre_tokenizer, *arguments = sys.argv[1:]
    sys.path[0] = str(Path(converter).parent)
    sys.path.insert(1, str(Path(converter).parent / "gguf-py"))
    if pre_tokenizer:
        name_pre_tokenizer(import_module("conversion").TextModel, pre_tokenizer)
    sys.argv = [converter, *arguments]
    runpy.run_path(converter, run_name="__main__")


if __name__ == "__main__":
    main()
