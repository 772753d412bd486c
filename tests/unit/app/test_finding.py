"""Concepts by number and by words."""

from __future__ import annotations

import pytest

from cocomix import InputError
from cocomix.app.finding import concept_number, find_concepts
from small_catalog import CONCEPTS, catalog_of

NAMES = {4: "open a file", 9: "close a file", 12: "rivers"}


def test_words_numbers_and_neither(opened):
    run = opened(catalog_of(NAMES))
    assert {found.concept_id for found in find_concepts(run, "file", 8)} == {4, 9}
    assert [found.name for found in find_concepts(run, " 12 ", 8)] == ["rivers"]
    assert find_concepts(run, "", 3) == []
    assert find_concepts(run, "nowhere", 8) == []


def test_without_a_catalogue(opened):
    run = opened()
    (found,) = find_concepts(run, "12", 8)
    assert (found.concept_id, found.name, found.frequency, found.context) == (12, "", None, None)
    assert find_concepts(run, "", 8) == []
    with pytest.raises(InputError, match="builds one"):
        find_concepts(run, "rivers", 8)


@pytest.mark.parametrize("written", [CONCEPTS, "40", "-1", "1.5", None, "x", "٣", "1" * 30])
def test_no_such_concept(opened, written):
    with pytest.raises(InputError, match="this model has 0 to 39"):
        concept_number(opened(), written)


def test_too_long_a_search(opened):
    with pytest.raises(InputError, match="201 characters; the limit is 200"):
        find_concepts(opened(catalog_of(NAMES)), "a" * 201, 8)
