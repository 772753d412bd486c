"""The Generate tab: plain and steered text side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import gradio as gr

from cocomix.app import markup
from cocomix.app.finding import concept_number
from cocomix.app.generating import Continuations, generate_both
from cocomix.app.limits import STEERED_CONCEPTS, Limits
from cocomix.app.picking import chosen, html, picker
from cocomix.common.errors import InputError
from cocomix.inspection.generation import GenerationSettings
from cocomix.inspection.runs import OpenRun
from cocomix.models.steering import Steering

STRONGEST = 20.0
"""Range of a slider in either direction; logits are of the order of 10."""
FIRST_STRENGTH = 6.0
NOTHING_STEERED = '<p class="empty">No concept is steered yet. Search for one and choose it.</p>'
NO_TEXT = '<p class="empty">Press Generate.</p>'
FIELDS = {"max_new_tokens": "New tokens", "temperature": "Temperature", "top_p": "Top p", "seed": "Seed"}
"""Labels of the settings."""


class SteeredConcepts:
    """The steered concepts of a session: their numbers in a state, and a slider for each.

    All sliders are created once and shown as needed. Their values are sent with each request.
    """

    def __init__(self, run: OpenRun) -> None:
        self.run = run
        self.concepts = gr.State([])
        self.empty = html(NOTHING_STEERED)
        self.rows, self.sliders, self.removers = [], [], []
        for number in range(STEERED_CONCEPTS):
            with gr.Row(visible=False, elem_classes="steered") as row:
                slider = gr.Slider(
                    -STRONGEST, STRONGEST, value=0.0, step=0.5, label=f"concept {number}", scale=5, min_width=200
                )
                remover = gr.Button("Remove", size="sm", scale=1, min_width=80)
            self.rows.append(row)
            self.sliders.append(slider)
            self.removers.append(remover)
        for number, remover in enumerate(self.removers):
            remover.click(
                lambda concepts, *strengths, number=number: self._without(concepts, strengths, number),
                [self.concepts, *self.sliders],
                self.outputs,
                show_progress="hidden",
            )

    @property
    def outputs(self) -> list[Any]:
        """The components that `_updates` updates."""
        return [self.concepts, self.empty, *self.rows, *self.sliders]

    def add(self, written: object, concepts: list[int], strengths: tuple[float, ...]) -> list[Any]:
        """Return the updates that add a concept.

        Raises:
            InputError: there is no such concept, it is already steered, or there are too many.
        """
        concept = concept_number(self.run, written)
        if concept in concepts:
            raise InputError(f"concept {concept} is already steered; move its slider")
        if len(concepts) == STEERED_CONCEPTS:
            raise InputError(f"{STEERED_CONCEPTS} concepts are already steered; remove one first")
        return self._updates([*concepts, concept], [*strengths[: len(concepts)], FIRST_STRENGTH])

    def _without(self, concepts: list[int], strengths: tuple[float, ...], number: int) -> list[Any]:
        kept = [at for at in range(len(concepts)) if at != number]
        return self._updates([concepts[at] for at in kept], [strengths[at] for at in kept])

    def _updates(self, concepts: list[int], strengths: list[float]) -> list[Any]:
        unused = STEERED_CONCEPTS - len(concepts)
        rows = [gr.update(visible=number < len(concepts)) for number in range(STEERED_CONCEPTS)]
        sliders = [
            gr.update(value=strength, label=markup.title_of(concept, self.run.names.get(concept, "")))
            for concept, strength in zip(concepts, strengths, strict=True)
        ]
        empty = gr.update(value="" if concepts else NOTHING_STEERED, visible=not concepts)
        return [concepts, empty, *rows, *sliders, *[gr.update(value=0.0)] * unused]


class GenerateView(NamedTuple):
    """The parts of this tab that other tabs use."""

    steered: SteeredConcepts
    message: gr.HTML


def sampling_settings(
    new_tokens: float | None, temperature: float | None, top_p: float | None, seed: float | None, limits: Limits
) -> GenerationSettings:
    """Convert the fields of the page to settings.

    Raises:
        InputError: a field is empty or out of range; the message uses the labels of the page.
    """
    for name, value in zip(FIELDS, (new_tokens, temperature, top_p, seed), strict=True):
        if value is None:
            raise InputError(f"{FIELDS[name]} is empty; give a number")
        if name in ("max_new_tokens", "seed") and not float(value).is_integer():
            raise InputError(f"{FIELDS[name]} is {value}; expected a whole number")
    try:
        settings = GenerationSettings(int(new_tokens), float(temperature), float(top_p), int(seed))  # type: ignore[arg-type]
    except InputError as problem:
        words = [line.partition(" ") for line in str(problem).splitlines()]
        raise InputError("\n".join(f"{FIELDS.get(name, name)} {what}" for name, _, what in words)) from None
    if settings.max_new_tokens > limits.new_tokens:
        raise InputError(f"{FIELDS['max_new_tokens']} is {settings.max_new_tokens}; the limit is {limits.new_tokens}")
    return settings


def generate_view(run: OpenRun, limits: Limits) -> GenerateView:
    """Lay out the tab and connect its components."""
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                label="Prompt",
                lines=4,
                max_lines=12,
                max_length=limits.characters,
                placeholder="The beginning of the text",
            )
            fields = [prompt, *_sampling(limits)]
            with gr.Row():
                start = gr.Button("Generate", variant="primary", min_width=120)
                stop = gr.Button("Stop", min_width=80)
        with gr.Column(scale=6, min_width=320):
            concepts = picker(run, "Steer a concept", "steer", start=False)
            steered = SteeredConcepts(run)
    message = html(elem_id="generate-message")
    panels = []
    with gr.Row():
        for name, empty in zip(("plain", "steered"), _panels(NO_TEXT, NO_TEXT), strict=True):
            with gr.Column(min_width=320):
                panels.append(html(empty, elem_id=name, elem_classes="panel"))

    def add(event: gr.EventData, concepts: list[int], *strengths: float) -> list[Any]:
        try:
            return ["", "", "", *steered.add(chosen(event, "concept"), concepts, strengths)]
        except InputError as problem:
            return [gr.skip(), gr.skip(), markup.error(problem), *[gr.skip()] * len(steered.outputs)]

    concepts.found.choose(
        add,
        [steered.concepts, *steered.sliders],
        [concepts.query, concepts.found, message, *steered.outputs],
        show_progress="hidden",
    )

    def generate(prompt: str, *given: Any) -> Iterator[tuple[Any, Any, Any]]:
        try:
            for state, texts in _generated(run, limits, prompt, *given):
                yield markup.note(state), *_panels(*markup.both(prompt, texts))
        except ValueError as problem:  # InputError is one
            yield markup.error(problem), gr.skip(), gr.skip()

    triggers = [start.click, prompt.submit]
    # Runs in the browser immediately, so that the message of an earlier request disappears.
    gr.on(triggers, None, None, message, js=f"() => {json.dumps(markup.note('Generating …'))}", show_progress="hidden")
    running = gr.on(
        triggers,
        generate,
        [*fields, steered.concepts, *steered.sliders],
        [message, *panels],
        show_progress="hidden",
        concurrency_id="generate",
    )
    stop.click(lambda: markup.note("Stopped."), None, message, cancels=[running], show_progress="hidden")
    return GenerateView(steered, message)


def _generated(
    run: OpenRun,
    limits: Limits,
    prompt: str,
    new_tokens: float | None,
    temperature: float | None,
    top_p: float | None,
    seed: float | None,
    concepts: list[int],
    *strengths: float,
) -> Iterator[tuple[str, Continuations]]:
    """Generate the texts of a request, with a line on the progress."""
    limits.check_characters(prompt)
    settings = sampling_settings(new_tokens, temperature, top_p, seed, limits)
    steering = Steering.add(dict(zip(concepts, strengths, strict=False)))
    why_same = "The steering changes no token here" if concepts else "No concept is steered"
    for texts in generate_both(run, prompt, settings, steering, limits.seconds):
        same = f" {why_same}, so both texts are the same." if texts.plain == texts.steered else ""
        yield f"Ended: {texts.end}.{same}" if texts.end else f"{texts.tokens} tokens …", texts


def _sampling(limits: Limits) -> list[Any]:
    """Create fields without limits; `sampling_settings` validates their values."""
    with gr.Row(elem_classes="sampling"):
        return [
            gr.Number(value, label=label, step=step, min_width=80)
            for label, value, step in zip(
                FIELDS.values(), (min(40, limits.new_tokens), 0.7, 1.0, 0), (1, 0.1, 0.05, 1), strict=True
            )
        ]


def _panels(plain: str, steered: str) -> tuple[str, str]:
    return (
        markup.panel("Plain", "the model's own continuation", plain),
        markup.panel("Steered", "marked where it starts to differ", steered),
    )
