"""The Generate tab: plain and steered text side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import gradio as gr

from cocomix.app import links, markup, snippets
from cocomix.app.generating import Continuations, generate_both
from cocomix.app.limits import Limits
from cocomix.app.opening import Opening
from cocomix.app.picking import chosen, html, picker
from cocomix.app.steering_controls import SteeringControls, steered_concepts, steering_of
from cocomix.common.errors import InputError
from cocomix.inspection.effects import most_probable, next_token_probabilities
from cocomix.inspection.generation import GenerationSettings, prompt_ids
from cocomix.inspection.notation import write_operation
from cocomix.inspection.runs import OpenRun
from cocomix.models.steering import ALL, Operation

NO_TEXT = '<p class="empty">Press Generate.</p>'
# On a narrow screen the texts are below the fold; the padding leaves room to scroll before they have grown.
STARTED = """() => {
  const below = document.getElementById('plain').getBoundingClientRect().top > innerHeight / 2;
  if (below && innerWidth <= 640) {
    document.body.style.paddingBottom = '60vh';
    document.getElementById('generate-start').scrollIntoView();
  }
  return %s;
}"""
FACTORS = {1.0: "", 0.5: " at half the strength", 2.0: " at twice the strength"}
"""Factors of what the steering adds for which the next tokens are shown, in words."""
FIELDS = {"max_new_tokens": "New tokens", "temperature": "Temperature", "top_p": "Top p", "seed": "Seed"}
"""Labels of the settings."""


class GenerateView(NamedTuple):
    """The parts of this tab that other tabs use."""

    steered: SteeringControls
    message: gr.HTML
    restored: Any
    """Function (link) whose result updates `outputs`."""
    outputs: list[Any]


class Request(NamedTuple):
    """A request for two texts."""

    prompt: str
    settings: GenerationSettings
    operations: list[Operation]
    positions: str
    """As in `parse_positions`."""

    @property
    def link(self) -> str:
        """Fragment of the address that repeats this request."""
        values = {"prompt": self.prompt, **vars(self.settings)} | {"positions": self.positions}
        values = {name: value for name, value in values.items() if name not in ("num_beams", "num_samples")}
        return links.write_link("generate", **values, steer=[write_operation(each) for each in self.operations])


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


def generate_view(run: OpenRun, limits: Limits, opening: Opening) -> GenerateView:
    """Lay out the tab and connect its components."""
    link = gr.Textbox(visible=False)
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            prompt = gr.Textbox(
                opening.prompt,
                label="Prompt",
                lines=3,
                max_lines=12,
                max_length=limits.characters,
                placeholder="The beginning of a text",
            )
            with gr.Accordion("Length, temperature and seed", open=False):
                sampling = _sampling(limits)
        with gr.Column(scale=6, min_width=320):
            concepts = picker(run, "Steer a concept", "steer")
            steered = SteeringControls(run, opening)
    with gr.Row():
        start = gr.Button("Generate", variant="primary", min_width=120, elem_id="generate-start")
        stop = gr.Button("Stop", min_width=80)
    message = html(elem_id="generate-message")
    panels = []
    with gr.Row():
        for name, empty in zip(("plain", "steered"), _panels(NO_TEXT, NO_TEXT), strict=True):
            with gr.Column(min_width=320):
                panels.append(html(empty, elem_id=name, elem_classes="panel"))
    copies = _copies()

    def add(event: gr.EventData, *given: Any) -> list[Any]:
        try:
            return [*concepts.cleared, "", *steered.add(chosen(event, "concept"), steered.operations(*given))]
        except InputError as problem:
            return [*concepts.cleared, markup.error(problem), *[gr.skip()] * len(steered.outputs)]

    concepts.found.choose(
        add, steered.inputs, [concepts.query, concepts.found, message, *steered.outputs], show_progress="hidden"
    )

    def generate(
        prompt: str,
        new_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
        seed: float | None,
        positions: str,
        *controls: Any,
    ) -> Iterator[list[Any]]:
        try:
            limits.check_characters(prompt)
            settings = sampling_settings(new_tokens, temperature, top_p, seed, limits)
            request = Request(prompt, settings, steered.operations(*controls), positions)
            first = _next_tokens(run, request)
            for state, texts in _generated(run, limits, request):
                bodies = (text + tokens for text, tokens in zip(markup.both(prompt, texts), first, strict=True))
                yield [markup.note(state), *_panels(*bodies), *[gr.skip()] * 3]
            how = (run.folder, *request)
            yield [*[gr.skip()] * 3, request.link, snippets.as_command(*how), snippets.as_python(*how)]
        except ValueError as problem:  # InputError is one
            yield [markup.error(problem), *[gr.skip()] * 5]

    triggers = [start.click, prompt.submit]
    # Runs in the browser immediately, so that the message of an earlier request disappears.
    gr.on(triggers, None, None, message, js=STARTED % json.dumps(markup.note("Generating …")), show_progress="hidden")
    running = gr.on(
        triggers,
        generate,
        [prompt, *sampling, steered.positions, *steered.inputs],
        [message, *panels, link, *copies[1:]],
        show_progress="hidden",
        concurrency_id="generate",
    )
    running.then(None, link, copies[0], js=links.WRITE, show_progress="hidden")
    stopped = f"() => {json.dumps(markup.note('Stopped.'))}"
    stop.click(None, None, message, js=stopped, cancels=[running], show_progress="hidden")

    def restored(link: links.Link) -> list[Any]:
        try:
            operations = steered_concepts(run, link.values.get("steer", []))
            problem = ""
        except InputError as error:
            operations, problem = [], markup.error(error)
        numbers = [gr.skip() if (number := link.number(name)) is None else number for name in FIELDS]
        return [link.text("prompt"), *numbers, link.text("positions", ALL), problem, *steered.updates(operations)]

    return GenerateView(steered, message, restored, [prompt, *sampling, steered.positions, message, *steered.outputs])


def _generated(run: OpenRun, limits: Limits, request: Request) -> Iterator[tuple[str, Continuations]]:
    """Generate the texts of a request, with a line on the progress."""
    steering = steering_of(request.operations, request.positions)
    why_same = "The steering changes no token here" if request.operations else "No concept is steered"
    for texts in generate_both(run, request.prompt, request.settings, steering, limits.seconds):
        same = f" {why_same}, so both texts are the same." if texts.plain == texts.steered else ""
        yield f"Done: {texts.end}.{same}" if texts.end else f"{texts.tokens} tokens …", texts


def _next_tokens(run: OpenRun, request: Request) -> list[str]:
    """Render the most probable tokens after the prompt, without and with steering.

    If the steering adds to logits, the tokens with half and with twice of what it adds follow.
    """
    ids = prompt_ids(run, request.prompt, request.settings.max_new_tokens)[0]
    adds = any(operation.kind == "add" for operation in request.operations)
    factors = list(FACTORS) if adds else [1.0]
    steerings = [
        steering_of([_scaled(each, factor) for each in request.operations], request.positions).after_prompt(len(ids))
        for factor in factors
    ]
    plain, *steered = next_token_probabilities(run.model, ids, [None, *steerings])
    rendered = [
        markup.next_tokens(most_probable(run.tokenizer, each), FACTORS[factor])
        for each, factor in zip(steered, factors, strict=True)
    ]
    return [markup.next_tokens(most_probable(run.tokenizer, plain)), "".join(rendered)]


def _scaled(operation: Operation, factor: float) -> Operation:
    """Multiply what an operation adds; others stay as they are."""
    return replace(operation, value=factor * operation.value) if operation.kind == "add" else operation


def _sampling(limits: Limits) -> list[Any]:
    """Create fields without limits; `sampling_settings` validates their values."""
    with gr.Row(elem_classes="sampling"):
        return [
            gr.Number(value, label=label, step=step, min_width=80)
            for label, value, step in zip(
                FIELDS.values(), (min(40, limits.new_tokens), 0.7, 1.0, 0), (1, 0.1, 0.05, 1), strict=True
            )
        ]


def _copies() -> list[Any]:
    """Create the fields from which the last request is copied: a link, a command, and Python."""
    with gr.Accordion("Copy as a link, a command, or Python", open=False, elem_classes="copies"):
        html('<p class="note">With a temperature above 0, the command and Python draw other random numbers.</p>')
        return [
            gr.Textbox(label=label, buttons=["copy"], interactive=False, lines=1, max_lines=14, elem_id=label.lower())
            for label in ("Link", "Command", "Python")
        ]


def _panels(plain: str, steered: str) -> tuple[str, str]:
    return (
        markup.panel("Plain", "the model's own continuation", plain),
        markup.panel("Steered", "marked where it starts to differ", steered),
    )
