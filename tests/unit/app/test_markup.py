"""What the page shows: figures where they belong, and no text that becomes markup."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from cocomix.app import card, markup
from cocomix.app.finding import FoundConcept, find_concepts
from cocomix.app.generating import Continuations
from cocomix.app.reading import Reading
from cocomix.catalog.rows import Context
from cocomix.common.console import compact
from cocomix.concepts.label_tables import LabelHits
from cocomix.evaluation.concepts import ConceptPredictions, TableHits
from cocomix.inspection.effects import NextToken
from cocomix.inspection.similar import SimilarConcept
from cocomix.inspection.trace import TracedConcept, TracedToken
from small_catalog import catalog_of

EVIL = "</p><script>alert(1)</script><img src=x onerror=\"alert('2')\">'\"&${1+1}{{2}}`"


class Elements(HTMLParser):
    """The elements, attributes and texts of some HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.open, self.text = set(), set(), [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def concept(number: int, effect: float, ablated: bool = True) -> TracedConcept:
    return TracedConcept(number, EVIL, 3.0 - number, 0.1, 0.2, 1.0, effect, effect if ablated else None)


def token(concepts: list[TracedConcept]) -> TracedToken:
    return TracedToken(2, 5, EVIL, 6, EVIL, True, -1.25, tuple(concepts), 0.1)


def evil_card() -> str:
    catalog = catalog_of({3: EVIL}, {3: (EVIL, EVIL, EVIL)})
    row = catalog.concept(3)
    return card.card(row, card.pending("not known"))


READING = Reading(
    [1, 2, 3], 3, [EVIL, "b\n", "c"], np.array([np.nan, 2.0, 4.0]), np.zeros((3, 1), int), np.ones((3, 1))
)
MADE = {
    "hits": lambda: markup.hits(
        [FoundConcept(3, EVIL, 0.5, catalog_of({}, {3: (EVIL,) * 3}).concept(3).contexts[0])], "x"
    ),
    "similar": lambda: markup.similar([SimilarConcept(3, 0.5)], {3: EVIL}),
    "brief hits": lambda: markup.brief_hits([FoundConcept(3, EVIL, None, None)], EVIL),
    "card": evil_card,
    "bare card": lambda: card.bare_card(3, card.pending(EVIL), EVIL),
    "bars": lambda: markup.bars(token([concept(1, 0.5), concept(2, -0.25, ablated=False)]), 3.0),
    "tokens": lambda: markup.read_tokens(READING, READING.losses.tolist(), "loss"),
    "legend": lambda: markup.legend([1.0, 3.0], EVIL, EVIL),
    "texts": lambda: "".join(markup.both(EVIL, Continuations(EVIL, EVIL + EVIL, 3, ""))),
    "next tokens": lambda: markup.next_tokens([NextToken(EVIL, 0.5)]),
    "note": lambda: markup.note(EVIL),
    "error": lambda: markup.error(EVIL),
}


@pytest.mark.parametrize("name", MADE)
def test_no_text_becomes_markup(name):
    found = Elements(MADE[name]())
    assert not found.open, "an element is left open"
    assert not {"script", "img"} & found.tags
    assert not [each for each in found.attributes if each.startswith("on")]
    assert "<script>alert(1)</script>" in found.text


def test_what_differs_is_marked():
    plain, steered = markup.both("Go ", Continuations("to the sea", "to the hills", 3, ""))
    assert "<mark>" not in plain
    assert "to the <mark>hills</mark>" in steered
    assert "<mark>" not in markup.both("Go ", Continuations("to", "to", 1, ""))[1]


def test_tokens_say_their_figures():
    html = markup.read_tokens(READING, READING.losses.tolist(), "loss")
    assert re.findall(r"--weight: ([\d.]+)", html) == ["0.500", "1.000"]
    assert html.count('tabindex="0"') == 1
    assert "token 1, b⏎, loss 2.00" in html
    assert html.count("<br>") == 1
    assert "at most 4.00, on average 3.00" in markup.legend(READING.losses.tolist(), "loss", "")
    assert "--weight" not in markup.read_tokens(READING, [math.nan] * 3, "loss")


def test_bars_have_sides_and_a_scale():
    html = markup.bars(token([concept(1, 0.5), concept(2, -0.25)]), math.nan)
    assert 'class="effect up"' in html
    assert 'class="effect down"' in html
    assert re.findall(r"--weight: ([\d.]+)", html) == ["1.000", "1.000", "0.500", "0.500"]
    assert "-0.250" in html


def test_how_well_a_concept_is_predicted():
    none = np.zeros(2, np.int64)
    labels, mixed, found = np.array([8, 0]), np.array([20, 3]), np.array([6, 0])
    model, token, bigram = (LabelHits(none, none, mixed, at_k) for at_k in (found, np.array([4, 0]), np.array([2, 0])))
    counts = ConceptPredictions([], 200, labels, model, TableHits(token, bigram))
    assert "75% of the 8 places" in card.predicted(0, counts)
    assert "(a table of the current token's most frequent labels: 50%, of the last two tokens: 25%)" in (
        card.predicted(0, counts)
    )
    assert "not a label of any of 200 validation tokens" in card.predicted(1, counts)


def test_histogram_has_a_bar_for_each_range_of_logits():
    html = card.histogram(np.array([1.0, 1.1, 1.2, 5.0]), 40)
    weights = re.findall(r"--weight: ([\d.]+)", html)
    assert (len(weights), weights[0], weights[-1]) == (card.BINS, "1.000", "0.500")
    assert "at 10% of 40 validation tokens, with a median logit of 1.15" in html
    assert "at none of 40 validation tokens" in card.histogram(np.array([]), 40)


@pytest.mark.parametrize(
    ("name", "shown"),
    [("\n" + " " * 11, "⏎␣×11"), ("⏎␣␣␣␣ · ⏎", "⏎␣×4 · ⏎"), ("a  b", "a  b"), ("    x", "␣×4x")],
)
def test_long_runs_of_blanks_are_shortened(name, shown):
    assert compact(name) == shown


def test_the_token_of_an_excerpt_is_marked_between_what_is_cut():
    context = Context("the long text before ", " ", "after", 1.0, "", 0, 0)
    assert re.sub("<[^>]+>", "|", markup.excerpt(context)) == "|the long text before ||␣||after|"


def test_error_is_a_sentence():
    assert ">Enter a text first.<" in markup.error("enter a text first")


def test_a_concept_that_was_never_active_has_no_contexts(opened):
    run = opened(catalog_of({}))
    assert "Never active in the text that the catalog was built from" in card.card(run.catalog.concept(5), "")
    assert "No concept fits" in markup.hits(find_concepts(run, "nowhere", 3), "show")
