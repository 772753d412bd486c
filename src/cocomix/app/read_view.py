"""The Read tab: the colored tokens of a text, and the concepts at the chosen token."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from cocomix.app import links, markup
from cocomix.app.finding import concept_number, found_concept
from cocomix.app.limits import Limits
from cocomix.app.opening import Opening
from cocomix.app.picking import HITS, chooser, chosen, html, picker
from cocomix.app.reading import Reading, read_text, token_concepts
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun

LOSS, CONCEPT = "loss", "a concept"
COLOR = "color the tokens by"
NO_TEXT = '<p class="empty">Enter or paste a text above, and press Read.</p>'
NO_TOKEN = '<p class="empty">Select a token to see which concepts the model mixes in there.</p>'


class ReadView(NamedTuple):
    """The parts of this tab that other tabs use."""

    bars: gr.HTML
    """Its event `choose` carries a concept."""
    read: Any
    """Function (text, color, concept) whose result updates `outputs`."""
    color_by: Any
    """Function (concept, reading) whose result updates `colored`."""
    fields: list[Any]
    """Text, color and concept, in this order."""
    reading: gr.State
    outputs: list[Any]
    colored: list[Any]
    link: gr.Textbox
    """Fragment of the last reading."""
    restored: Any
    """Function (link) whose result updates `fields`."""


def colored(run: OpenRun, reading: Reading | None, color: str, concept: int | None) -> tuple[str, str]:
    """Return the colored tokens and the legend as HTML."""
    if reading is None:
        return NO_TEXT, ""
    if color == LOSS:
        values, what = reading.losses.tolist(), "loss (nats)"
        about = "The first token has no loss, because nothing precedes it."
    else:
        concept = reading.strongest(1)[0] if concept is None else concept
        values, what = reading.strengths(concept).tolist(), f"logit of {concept}"
        mixed = int((reading.indices == concept).sum())
        title = markup.title_of(concept, run.names.get(concept, ""))
        about = f"«{title}» is mixed in at {mixed} of {len(reading.tokens)} tokens."
    return markup.read_tokens(reading, values, what), markup.legend(values, what, about)


def _read(run: OpenRun, limits: Limits, text: str, color: str, concept: int | None) -> list[Any]:
    """Return message, reading, tokens, legend, bars, the strongest concepts of the text, and the link."""
    try:
        found = read_text(run, text, limits)
    except InputError as problem:
        return [markup.error(problem), *[gr.skip()] * 6]
    strongest = [found_concept(run, each) for each in found.strongest(HITS)]
    listed = '<p class="note">The strongest in this text:</p>' + markup.brief_hits(strongest, COLOR)
    left_out = f"The text has {found.total:,} tokens; these are the first {len(found.ids):,}."
    message = markup.note(left_out) if found.total > len(found.ids) else ""
    shown = {"concept": concept} if color == CONCEPT and concept is not None else {}
    link = links.write_link("read", text=text, **shown)
    return [message, found, *colored(run, found, color, concept), NO_TOKEN, listed, link]


def restored(run: OpenRun, link: links.Link) -> list[Any]:
    """Return the updates of the fields (`ReadView.fields`) by a link."""
    try:
        concept = concept_number(run, link.text("concept"))
    except InputError:
        return [link.text("text"), LOSS, None]
    return [link.text("text"), CONCEPT, concept]


def read_view(run: OpenRun, limits: Limits, opening: Opening) -> ReadView:
    """Lay out the tab and connect its components."""
    reading, concept, link = gr.State(None), gr.State(None), gr.Textbox(visible=False)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            text = gr.Textbox(
                opening.prompt,
                label="Text",
                lines=5,
                max_lines=12,
                max_length=limits.characters,
                placeholder="Any text",
            )
            start = gr.Button("Read", variant="primary", elem_id="read-start")
        with gr.Column(scale=6, min_width=320):
            color = gr.Radio([LOSS, CONCEPT], value=LOSS, label="Color the tokens by")
            concepts = picker(run, "Concept to color by", COLOR)
            strongest = chooser()
    message = html(elem_id="read-message")
    with gr.Row():
        with gr.Column(scale=6, min_width=320):
            tokens = chooser(NO_TEXT, elem_id="tokens", elem_classes="panel")
            legend = html()
        with gr.Column(scale=5, min_width=320):
            bars = chooser(NO_TOKEN, elem_id="bars", elem_classes="panel")

    def read(text: str, color: str, concept: int | None) -> list[Any]:
        return _read(run, limits, text, color, concept)

    fields, outputs = [text, color, concept], [message, reading, tokens, legend, bars, strongest, link]
    gr.on([start.click, text.submit], read, fields, outputs, show_progress="minimal", show_progress_on=tokens).then(
        None, link, None, js=links.WRITE, show_progress="hidden"
    )
    color.input(
        lambda reading, color, concept: colored(run, reading, color, concept),
        [reading, color, concept],
        [tokens, legend],
        show_progress="hidden",
    )

    def color_by(written: object, reading: Reading | None) -> list[Any]:
        try:
            concept = concept_number(run, written)
        except InputError as problem:
            return [markup.error(problem), *[gr.skip()] * 4]
        return ["", concept, CONCEPT, *colored(run, reading, CONCEPT, concept)]

    def choose_concept(event: gr.EventData, reading: Reading | None) -> list[Any]:
        return [*concepts.cleared, *color_by(chosen(event, "concept"), reading)]

    painted = [message, concept, color, tokens, legend]
    for listed in (concepts.found, strongest):
        listed.choose(choose_concept, reading, [concepts.query, concepts.found, *painted], show_progress="hidden")

    def explain(event: gr.EventData, reading: Reading | None) -> tuple[Any, Any]:
        if reading is None:
            return gr.skip(), gr.skip()
        try:
            token = token_concepts(run, reading, chosen(event, "position"))
            return "", markup.bars(token, float(reading.losses[token.position]))
        except InputError as problem:
            return markup.error(problem), gr.skip()

    tokens.choose(explain, reading, [message, bars], show_progress="minimal", show_progress_on=bars)
    return ReadView(bars, read, color_by, fields, reading, outputs, painted, link, lambda link: restored(run, link))
