"""A run in memory: a student of random weights and a tokenizer of words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cocomix.catalog.search import Catalog
from cocomix.inspection.runs import OpenRun
from small_catalog import CONCEPTS


@pytest.fixture
def opened(random_model) -> Callable[..., OpenRun]:
    """opened(catalog, tokenizer): a run whose tokens are by default the words w0 to w51, and w52 its end."""

    def make(catalog: Catalog | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> OpenRun:
        words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(53)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = tokenizer or PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w52")
        model = random_model(num_concepts=CONCEPTS)
        run = OpenRun(Path("students/random"), model.config, tokenizer, catalog=catalog)
        vars(run)["model"] = model  # instead of one that is loaded from the folder
        return run

    return make
