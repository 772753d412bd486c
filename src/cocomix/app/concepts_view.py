"""The Concepts tab: a search, and a card for each concept."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

import gradio as gr

from cocomix.app import markup
from cocomix.app.finding import concept_number
from cocomix.app.picking import chosen, html, picker
from cocomix.app.predictability import Predictability
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun

NO_CONCEPT = '<p class="empty">Choose a concept to see what activates it, and how well the model predicts it.</p>'


class ConceptsView(NamedTuple):
    """The parts of this tab that other tabs use."""

    shown: gr.State
    """The concept whose card is shown."""
    show: Any
    """Generator function (concept) whose values update `outputs`."""
    outputs: list[Any]
    steer: gr.Button
    color: gr.Button


def concept_card(run: OpenRun, concept: int, predictability: Predictability) -> str:
    """Build the card of a concept; its prediction quality is a placeholder until it has been counted."""
    if predictability.counts is not None:
        predictions = markup.predicted(concept, predictability.counts)
    else:
        predictions = escape(predictability.missing or "being counted …")
    if run.catalog is None:
        return markup.bare_card(concept, predictions, run.no_catalog)
    return markup.card(run.catalog.concept(concept), predictions)


def concepts_view(run: OpenRun) -> ConceptsView:
    """Lay out the tab and connect its components."""
    predictability, shown = Predictability(run), gr.State(None)
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            concepts = picker(run, "Search", "show", start=True)
        with gr.Column(scale=7, min_width=320):
            message = html(elem_id="concepts-message")
            with gr.Row(visible=False) as actions:
                steer = gr.Button("Steer with it", size="md", min_width=120)
                color = gr.Button("Color a text by it", size="md", min_width=120)
            card = html(NO_CONCEPT, elem_id="card", elem_classes="panel")

    def show(written: object) -> Iterator[list[Any]]:
        try:
            concept = concept_number(run, written)
        except InputError as problem:
            yield [markup.error(problem), *[gr.skip()] * 3]
            return
        if not predictability.known:
            yield ["", concept, concept_card(run, concept, predictability), gr.update(visible=True)]
            predictability.count()
        yield ["", concept, concept_card(run, concept, predictability), gr.update(visible=True)]

    def choose(event: gr.EventData) -> Iterator[list[Any]]:
        yield from show(chosen(event, "concept"))

    outputs = [message, shown, card, actions]
    concepts.found.choose(choose, None, outputs, show_progress="hidden")
    return ConceptsView(shown, show, outputs, steer, color)
