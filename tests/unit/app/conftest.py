"""A run in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from cocomix.catalog.search import Catalog
from cocomix.inspection.runs import OpenRun
from small_catalog import CONCEPTS
from small_run import run_in_memory


@pytest.fixture
def opened(random_model) -> Callable[..., OpenRun]:
    """opened(catalog, tokenizer): a student of random weights, by default with a tokenizer of words."""

    def make(catalog: Catalog | None = None, tokenizer: PreTrainedTokenizerFast | None = None) -> OpenRun:
        return run_in_memory(random_model(num_concepts=CONCEPTS), catalog, tokenizer)

    return make
