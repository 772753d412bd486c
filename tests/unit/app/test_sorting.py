"""Orders of the concepts, and the example with which the page opens."""

from __future__ import annotations

import numpy as np
import pytest

from cocomix import InputError
from cocomix.app.opening import Opening, opening
from cocomix.app.predictability import Predictability
from cocomix.app.sorting import EFFECT, FREQUENCY, LABELS, PREDICTABILITY, Sorting
from small_catalog import CONCEPTS, catalog_of


def test_the_example_is_a_line_and_a_concept(opened):
    run = opened(catalog_of({}, {39: ("w9 w8\nw1 w2", " w3", " w4")}))
    first = opening(run)
    assert first.prompt == "w1 w2 w3"
    assert first.concepts[0] in run.catalog.steerable
    assert 1 <= first.strength <= 20
    low, _, high = first.typical.partition(" to ")
    assert float(low) < float(high)


def test_nothing_to_show_without_texts(opened):
    for run in (opened(), opened(catalog_of({}))):
        assert opening(run).prompt == ""
        assert opening(run).concepts == []


def test_orders(opened):
    run = opened(catalog_of({}, {39: ("w1 ", "w2", "")}))
    sorting = Sorting(run, opening(run), Predictability(run))
    labels = [*range(CONCEPTS - 1, 0, -1)]  # concept 0 is never a label
    assert sorting.concepts(LABELS) == labels
    assert sorting.concepts(FREQUENCY) == labels
    assert set(sorting.concepts(EFFECT)) <= set(labels)
    with pytest.raises(InputError, match="predictability is not known"):
        sorting.concepts(PREDICTABILITY)
    counts = type("Counts", (), {"f1": np.arange(CONCEPTS) / CONCEPTS})
    sorting.predictability.counts, sorting.predictability.missing = counts, ""
    assert sorting.concepts(PREDICTABILITY) == labels
    assert Sorting(opened(), Opening("", [], 6, ""), Predictability(run)).concepts(LABELS) == []
