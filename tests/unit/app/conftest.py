"""A run in memory: a student of random weights and a tokenizer of words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cocomix.catalog.search import Catalog
from cocomix.steering.runs import OpenRun
from small_catalog import CONCEPTS


@pytest.fixture
def opened(random_model) -> Callable[..., OpenRun]:
    """opened(catalog): a run whose tokens are the words w0 to w51, and w52 its end."""

    def make(catalog: Catalog | None = None) -> OpenRun:
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(53)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w52")
        return OpenRun(Path("students/random"), random_model(num_concepts=CONCEPTS), tokenizer, catalog)

    return make
