"""Build the page of a run from its three tabs.

There is no global state: the choices of a user are in `gr.State`, which is separate for each session, and are passed
to the model as arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from cocomix.app import markup
from cocomix.app.concepts_view import concepts_view
from cocomix.app.generate_view import generate_view
from cocomix.app.limits import Limits
from cocomix.app.picking import chosen, html
from cocomix.app.read_view import read_view
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun

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
    limits = limits.for_run(run)
    with gr.Blocks(title=f"CoCoMix · {run.folder.name}", analytics_enabled=False) as page:
        html(_header(run, limits))
        with gr.Tabs() as tabs:
            with gr.Tab("Generate", id="generate"):
                generating = generate_view(run, limits)
            with gr.Tab("Read", id="read"):
                reading = read_view(run, limits)
            with gr.Tab("Concepts", id="concepts"):
                concepts = concepts_view(run)

        def open_card(event: gr.EventData) -> Iterator[list[Any]]:
            for updates in concepts.show(chosen(event, "concept")):
                yield [gr.Tabs(selected="concepts"), *updates]

        def steer(concept: int, steered: list[int], *strengths: float) -> list[Any]:
            try:
                updates = ["", *generating.steered.add(concept, steered, strengths)]
            except InputError as problem:
                updates = [markup.error(problem), *[gr.skip()] * len(generating.steered.outputs)]
            return [gr.Tabs(selected="generate"), *updates]

        def color(concept: int, read: Any) -> list[Any]:
            return [gr.Tabs(selected="read"), *reading.color_by(concept, read)]

        reading.bars.choose(open_card, None, [tabs, *concepts.outputs], show_progress="hidden")
        concepts.steer.click(
            steer,
            [concepts.shown, generating.steered.concepts, *generating.steered.sliders],
            [tabs, generating.message, *generating.steered.outputs],
            show_progress="hidden",
        )
        concepts.color.click(color, [concepts.shown, reading.reading], [tabs, *reading.outputs], show_progress="hidden")
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)


def _header(run: OpenRun, limits: Limits) -> str:
    config = run.model.config
    named = "" if run.catalog is not None else f'<p class="note">{markup.shown(run.no_catalog)}</p>'
    return (
        f'<header><h1>CoCoMix <span class="run">{markup.shown(run.folder.name)}</span></h1>'
        f"<p>The model mixes in {config.num_active_concepts} of {config.num_concepts:,} concepts at each token. Limits "
        f"of a request: {limits.characters:,} characters, {limits.read_tokens:,} tokens to read, "
        f"{limits.new_tokens} new tokens, {limits.seconds:g} seconds.</p>{named}</header>"
    )
