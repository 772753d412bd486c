"""The Concepts tab: a search or a sorted list, and a card for each concept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from cocomix.app import card, links, markup
from cocomix.app.finding import concept_number, find_concepts, found_concept
from cocomix.app.opening import Opening
from cocomix.app.picking import HITS, chooser, chosen, html, search_box
from cocomix.app.predictability import Predictability
from cocomix.app.sorting import LABELS, ORDERS, Sorting
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun
from cocomix.inspection.similar import similar_concepts

NO_CONCEPT = '<p class="empty">Select a concept to see what activates it, and how well the model predicts it.</p>'
SIMILAR = 6
"""Number of similar concepts next to a card."""


class ConceptsView(NamedTuple):
    """The parts of this tab that other tabs use."""

    shown: gr.State
    """The concept whose card is shown."""
    show: Any
    """Generator function (concept) whose values update `outputs`."""
    outputs: list[Any]
    steer: gr.Button
    color: gr.Button
    card: gr.HTML
    """Its event `choose` carries the number of a context."""
    link: gr.Textbox
    """Fragment of the card."""


def concept_card(run: OpenRun, concept: int, predictability: Predictability) -> str:
    """Build the card of a concept; its prediction quality is a placeholder until it has been counted."""
    if predictability.counts is not None:
        predictions = card.predicted(concept, predictability.counts)
        predictions += card.histogram(predictability.logits(concept), predictability.tokens)
    else:
        predictions = card.pending(predictability.missing or "being counted …")
    if run.catalog is None:
        return card.bare_card(concept, predictions, run.no_catalog)
    return card.card(run.catalog.concept(concept), predictions)


def listed(run: OpenRun, sorting: Sorting, query: str, order: str, page: int) -> list[Any]:
    """Return the updates for a page of the search results, or without a query of all concepts in order.

    They are of the list, the page, a note on the range, and the buttons for the previous and the next page.
    """
    first = page * HITS
    try:
        if query.strip():
            found = find_concepts(run, query, first + HITS + 1)
            total, there = len(found), found[first : first + HITS]
            of = "" if total > first + HITS else f" of {total}"
        else:
            concepts = sorting.concepts(order)
            total, there = len(concepts), [found_concept(run, each) for each in concepts[first : first + HITS]]
            of = f" of {total:,}"
    except InputError as problem:
        return [markup.error(problem), 0, "", gr.update(interactive=False), gr.update(interactive=False)]
    hits = markup.hits(there, "show") if there or query.strip() else ""
    note = f'<p class="note">{first + 1:,}–{first + len(there):,}{of}</p>' if there else ""
    return [hits, page, note, gr.update(interactive=page > 0), gr.update(interactive=total > first + HITS)]


def concepts_view(run: OpenRun, opening: Opening) -> ConceptsView:
    """Lay out the tab and connect its components."""
    predictability, shown, page, link = Predictability(run), gr.State(None), gr.State(0), gr.Textbox(visible=False)
    sorting = Sorting(run, opening, predictability)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            query = search_box(run, "Search")
            order = gr.Dropdown(list(ORDERS), value=LABELS, label="Sort all concepts by")
            first = listed(run, sorting, "", LABELS, 0)
            found = chooser(first[0])
            with gr.Row(elem_classes="pages"):
                back = gr.Button("Previous", size="sm", min_width=80, interactive=False)
                range_shown = html(first[2])
                forth = gr.Button("Next", size="sm", min_width=80, interactive=bool(first[0]))
        with gr.Column(scale=7, min_width=320):
            message = html(elem_id="concepts-message")
            with gr.Row(visible=False) as actions:
                steer = gr.Button("Steer with it", size="md", min_width=120)
                color = gr.Button("Color a text by it", size="md", min_width=120)
            shown_card = chooser(NO_CONCEPT, elem_id="card", elem_classes="panel")
            alike = chooser(elem_id="alike")

    for trigger, step in ((query.change, None), (order.input, None), (back.click, -1), (forth.click, 1)):
        trigger(
            lambda query, order, page, step=step: listed(
                run, sorting, query, order, 0 if step is None else max(0, page + step)
            ),
            [query, order, page],
            [found, page, range_shown, back, forth],
            trigger_mode="always_last",
            show_progress="minimal" if trigger == order.input else "hidden",
            show_progress_on=found,
        )

    def show(written: object) -> Iterator[list[Any]]:
        try:
            concept = concept_number(run, written)
        except InputError as problem:
            yield [markup.error(problem), *[gr.skip()] * 5]
            return
        similar = markup.similar(similar_concepts(run.model, concept, SIMILAR), run.names)
        rest = [similar, gr.update(visible=True), links.write_link("concepts", concept=concept)]
        if not predictability.known:
            yield ["", concept, concept_card(run, concept, predictability), *rest]
            predictability.count()
        yield ["", concept, concept_card(run, concept, predictability), *rest]

    def choose(event: gr.EventData) -> Iterator[list[Any]]:
        yield from show(chosen(event, "concept"))

    outputs = [message, shown, shown_card, alike, actions, link]
    for concepts in (found, alike):
        concepts.choose(choose, None, outputs, show_progress="hidden").then(
            None, link, None, js=links.WRITE, show_progress="hidden"
        )
    return ConceptsView(shown, show, outputs, steer, color, shown_card, link)
