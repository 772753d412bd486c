"""A run in memory for all cases of a property."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cocomix.catalog.search import Catalog
from cocomix.inspection.runs import OpenRun
from small_catalog import CONCEPTS
from small_run import run_in_memory


@pytest.fixture(scope="session")
def run_of(random_model) -> Callable[[Catalog], OpenRun]:
    """run_of(catalog): a student of random weights with this catalog."""
    return lambda catalog: run_in_memory(random_model(num_concepts=CONCEPTS), catalog)
