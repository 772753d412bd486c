"""The controls of the steered concepts: for each its operation, and a slider for the strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from cocomix.app import markup
from cocomix.app.finding import concept_number
from cocomix.app.limits import STEERED_CONCEPTS, STRONGEST
from cocomix.app.opening import Opening
from cocomix.app.picking import html
from cocomix.common.errors import InputError
from cocomix.inspection.notation import parse_positions, parse_steering
from cocomix.inspection.runs import OpenRun
from cocomix.models.steering import ALL, GENERATED, Operation, Steering

KINDS = {"add": "Add", "scale": "Multiply", "set": "Set", "suppress": "Suppress"}
POSITIONS = {ALL: "every token", GENERATED: "generated tokens only"}
NOTHING_STEERED = '<p class="empty">No concept is steered. Search for one and select it.</p>'


class SteeringControls:
    """The steered concepts of a session: their numbers in a state, and a row of controls for each.

    All rows are created once and shown as needed. Their values are sent with each request.

    Args:
        run: run with the concepts.
        opening: what is steered at first, and which logits are typical.
    """

    def __init__(self, run: OpenRun, opening: Opening) -> None:
        self.run, self.opening = run, opening
        first = [Operation("add", concept, opening.strength) for concept in opening.concepts]
        self.concepts = gr.State([operation.concept for operation in first])
        self.empty = html(NOTHING_STEERED, visible=not first)
        self.rows, self.sliders, self.kinds = [], [], []
        removers = []
        for number in range(STEERED_CONCEPTS):
            shown = first[number] if number < len(first) else Operation("add", 0)
            with gr.Row(visible=number < len(first), elem_classes="steered") as row:
                slider = gr.Slider(
                    -STRONGEST, STRONGEST, step=0.5, buttons=[], scale=6, min_width=200, **self._strength(shown)
                )
                kind = gr.Dropdown(
                    [(label, name) for name, label in KINDS.items()],
                    value=shown.kind,
                    label="Operation",
                    scale=2,
                    min_width=110,
                )
                removers.append(gr.Button("Remove", size="sm", scale=1, min_width=80))
            kind.input(self._unit, kind, slider, show_progress="hidden")
            self.rows.append(row)
            self.sliders.append(slider)
            self.kinds.append(kind)
        for number, remover in enumerate(removers):
            remover.click(
                lambda *given, number=number: self._without(number, *given),
                self.inputs,
                self.outputs,
                show_progress="hidden",
            )
        self.positions = gr.Dropdown(
            [(label, name) for name, label in POSITIONS.items()],
            value=ALL,
            label="Steer at",
            info="or positions in the text, such as 0,3,5-9,12-",
            allow_custom_value=True,
        )

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `operations` takes."""
        return [self.concepts, *self.sliders, *self.kinds]

    @property
    def outputs(self) -> list[Any]:
        """The components that `updates` updates."""
        return [self.concepts, self.empty, *self.rows, *self.sliders, *self.kinds]

    def operations(self, concepts: list[int], *controls: Any) -> list[Operation]:
        """Return the operations of a session, given the values of `inputs`."""
        values, kinds = controls[:STEERED_CONCEPTS], controls[STEERED_CONCEPTS:]
        return [
            Operation(kind, concept, 0.0 if kind == "suppress" else value)
            for concept, value, kind in zip(concepts, values, kinds, strict=False)
        ]

    def add(self, written: object, operations: list[Operation]) -> list[Any]:
        """Return the updates that add a concept.

        Raises:
            InputError: there is no such concept, it is already steered, or there are too many.
        """
        concept = concept_number(self.run, written)
        if any(operation.concept == concept for operation in operations):
            raise InputError(f"concept {concept} is already steered; move its slider")
        if len(operations) == STEERED_CONCEPTS:
            raise InputError(f"{STEERED_CONCEPTS} concepts are already steered; remove one first")
        return self.updates([*operations, Operation("add", concept, self.opening.strength)])

    def _without(self, number: int, *given: Any) -> list[Any]:
        return self.updates([each for at, each in enumerate(self.operations(*given)) if at != number])

    def updates(self, operations: list[Operation]) -> list[Any]:
        """Return the updates of `outputs` that show these operations."""
        unused = STEERED_CONCEPTS - len(operations)
        rows = [gr.update(visible=number < len(operations)) for number in range(STEERED_CONCEPTS)]
        sliders = [gr.update(**self._strength(operation)) for operation in operations]
        return [
            [operation.concept for operation in operations],
            gr.update(visible=not operations),
            *rows,
            *sliders,
            *[gr.update(value=0.0)] * unused,
            *[operation.kind for operation in operations],
            *["add"] * unused,
        ]

    def _strength(self, operation: Operation) -> dict[str, Any]:
        label = markup.title_of(operation.concept, self.run.names.get(operation.concept, ""))
        return {"label": label, "value": operation.value, **self._unit_of(operation.kind)}

    def _unit(self, kind: str) -> dict[str, Any]:
        return gr.update(**self._unit_of(kind))

    def _unit_of(self, kind: str) -> dict[str, Any]:
        typical = f"; typical logits here: {self.opening.typical}" if self.opening.typical else ""
        info = {
            "add": f"added to the concept's logit{typical}",
            "scale": "factor of the concept's logit; 1 changes nothing",
            "set": f"the concept's new logit{typical}",
            "suppress": "the concept is not mixed in; the strength has no effect",
        }[kind]
        return {"info": info, "interactive": kind != "suppress"}


def steering_of(operations: Sequence[Operation], positions: str) -> Steering:
    """Return the steering by these operations at positions in the notation of `parse_positions`.

    Raises:
        InputError: the positions are invalid.
    """
    spans = parse_positions(positions)
    return Steering(tuple(replace(operation, positions=span) for operation in operations for span in spans))


def steered_concepts(run: OpenRun, written: Sequence[str]) -> list[Operation]:
    """Parse operations in the notation of `parse_steering`, so that the controls can show them.

    Raises:
        InputError: one is invalid, its concept does not exist or is steered twice, it is too strong, or there are too
            many.
    """
    operations = list(parse_steering(written, None, source="steer").operations)
    concepts = {concept_number(run, operation.concept) for operation in operations}
    if len(concepts) < len(operations) or len(operations) > STEERED_CONCEPTS:
        raise InputError(f"the link steers a concept twice, or more than {STEERED_CONCEPTS} concepts")
    if any(abs(operation.value) > STRONGEST for operation in operations):
        raise InputError(f"the link steers by more than {STRONGEST:g}")
    return operations
