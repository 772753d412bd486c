"""A run in memory: a student of random weights and a tokenizer of words."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import cocomix
from cocomix.catalog.search import Catalog
from cocomix.inspection.runs import OpenRun


def run_in_memory(
    model: cocomix.CoCoMixForCausalLM,
    catalog: Catalog | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> OpenRun:
    """A run whose tokens are by default the words w0 to w51, and w52 its end."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(53)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = tokenizer or PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w52")
    run = OpenRun(Path("students/random"), model.config, tokenizer, catalog=catalog)
    vars(run)["model"] = model  # instead of one that is loaded from the folder
    return run
