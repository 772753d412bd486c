"""Build the page of a run from its three tabs.

There is no global state: the choices of a user are in `gr.State`, which is separate for each session, and are passed
to the model as arguments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from cocomix.app import markup
from cocomix.app.concepts_view import ConceptsView, concepts_view
from cocomix.app.finding import context_text
from cocomix.app.generate_view import GenerateView, generate_view
from cocomix.app.limits import Limits
from cocomix.app.links import PRESS, READ, WRITE, Link
from cocomix.app.opening import facts, opening, title
from cocomix.app.picking import chosen, html
from cocomix.app.read_view import CONCEPT, ReadView, read_view
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun

PAPER = "https://arxiv.org/abs/2502.08524"
STYLE = Path(__file__).with_name("playground.css")
AT_ONCE = 2
"""Number of requests per kind that are processed concurrently; others wait."""
WAITING = 32
"""Maximum number of waiting requests; further ones are refused."""
# Only system fonts, because Gradio's themes would download fonts or bring their own.
FONT = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]
FONT_MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]


def theme() -> gr.themes.Base:
    """Return a plain theme that loads nothing from other sites."""
    return gr.themes.Base(
        primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=FONT, font_mono=FONT_MONO
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_radius="*radius_lg",
        block_label_text_weight="600",
        block_title_text_weight="600",
    )


def build_playground(run: OpenRun, limits: Limits) -> gr.Blocks:
    """Build the page of a run."""
    limits, first = limits.for_run(run), opening(run)
    with gr.Blocks(title=f"{title(run)} · CoCoMix", analytics_enabled=False) as page:
        html(_header(run))
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generating = generate_view(run, limits, first)
            with gr.Tab("Read", id="read"):
                reading = read_view(run, limits, first)
            with gr.Tab("Concepts", id="concepts"):
                concepts = concepts_view(run, first)
        _connect_tabs(run, tabs, generating, reading, concepts)
        _open_links(page, tabs, generating, reading, concepts)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)


def _connect_tabs(
    run: OpenRun, tabs: gr.Tabs, generating: GenerateView, reading: ReadView, concepts: ConceptsView
) -> None:
    """Connect what opens another tab: concepts of a token, and buttons and contexts of a card."""

    def open_card(event: gr.EventData) -> Iterator[list[Any]]:
        for updates in concepts.show(chosen(event, "concept")):
            yield [gr.Tabs(selected="concepts"), *updates]

    def steer(concept: int, *given: Any) -> list[Any]:
        try:
            updates = ["", *generating.steered.add(concept, generating.steered.operations(*given))]
        except InputError as problem:
            updates = [markup.error(problem), *[gr.skip()] * len(generating.steered.outputs)]
        return [gr.Tabs(selected="generate"), *updates]

    def color(concept: int, read: Any) -> list[Any]:
        return [gr.Tabs(selected="read"), *reading.color_by(concept, read)]

    def open_context(event: gr.EventData, concept: int | None) -> list[Any]:
        text = context_text(run, concept, chosen(event, "context"))
        if text is None:
            return [gr.skip()] * (1 + len(reading.fields) + len(reading.outputs))
        return [gr.Tabs(selected="read"), text, CONCEPT, concept, *reading.read(text, CONCEPT, concept)]

    address: dict[str, Any] = {"fn": None, "js": WRITE, "show_progress": "hidden"}
    reading.bars.choose(open_card, None, [tabs, *concepts.outputs], show_progress="hidden").then(
        inputs=concepts.link, outputs=None, **address
    )
    concepts.steer.click(
        steer,
        [concepts.shown, *generating.steered.inputs],
        [tabs, generating.message, *generating.steered.outputs],
        show_progress="hidden",
    )
    concepts.color.click(color, [concepts.shown, reading.reading], [tabs, *reading.colored], show_progress="hidden")
    concepts.card.choose(
        open_context, concepts.shown, [tabs, *reading.fields, *reading.outputs], show_progress="hidden"
    ).then(inputs=reading.link, outputs=None, **address)


def _open_links(
    page: gr.Blocks, tabs: gr.Tabs, generating: GenerateView, reading: ReadView, concepts: ConceptsView
) -> None:
    """Restore the state that the address holds when the page is loaded."""
    parts = {"generate": generating.outputs, "read": reading.fields, "concepts": concepts.outputs}

    def restore(fragment: str) -> Iterator[list[Any]]:
        updates: dict[str, list[Any]] = {tab: [gr.skip()] * len(outputs) for tab, outputs in parts.items()}
        try:
            link = Link(fragment)
        except InputError as problem:
            updates["generate"][generating.outputs.index(generating.message)] = markup.error(problem)
            link = Link("")
        if (tab := link.text("tab")) not in parts:
            yield [gr.skip(), *itertools.chain.from_iterable(updates.values())]
            return
        if tab == "concepts":
            for shown in concepts.show(link.text("concept")):
                yield [gr.Tabs(selected=tab), *itertools.chain.from_iterable((updates | {tab: shown}).values())]
            return
        shown = generating.restored(link) if tab == "generate" else reading.restored(link)
        yield [gr.Tabs(selected=tab), *itertools.chain.from_iterable((updates | {tab: shown}).values())]

    fragment = gr.Textbox(visible=False)
    outputs = [tabs, *itertools.chain.from_iterable(parts.values())]
    page.load(restore, fragment, outputs, js=READ, show_progress="hidden").then(None, None, None, js=PRESS)


def _header(run: OpenRun) -> str:
    config = run.model.config
    named = "" if run.catalog is not None else f'<p class="note">{markup.shown(run.no_catalog)}</p>'
    return (
        f'<header><h1>CoCoMix <span class="run">{markup.shown(title(run))}</span></h1>'
        "<p>A concept is a pattern that another model, the teacher, recognizes in text. At each token, this model "
        f"predicts {config.num_active_concepts} of {config.num_concepts:,} concepts and mixes them into its hidden "
        "state. Turn them up or down, and see where they are active. "
        f'<a href="{PAPER}" target="_blank" rel="noreferrer">Paper</a> · Manual: <code>docs/app.md</code>, '
        "<code>docs/steering.md</code></p>"
        f'<p class="facts">{" · ".join(map(markup.shown, facts(run)))}</p>{named}</header>'
    )
