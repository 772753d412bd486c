"""A search box with a list of concepts, and the events of clickable lists."""

from __future__ import annotations

from typing import Any, NamedTuple

import gradio as gr

from cocomix.app import markup
from cocomix.app.finding import find_concepts
from cocomix.common.errors import InputError
from cocomix.inspection.runs import OpenRun

HITS = 8
"""Maximum number of concepts in a list."""

# A click on a button selects its concept, token, or context. The tokens of a text form a single tab stop: the arrow
# keys move between them, and the chosen one stays marked.
CHOOSE = """
const enter = (button) => {
  for (const other of element.querySelectorAll('.token')) other.tabIndex = other === button ? 0 : -1;
};
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-concept], button[data-position], button[data-context]');
  if (!button) return;
  if (button.matches('.token')) {
    element.querySelectorAll('.token[aria-pressed]').forEach((other) => other.removeAttribute('aria-pressed'));
    button.setAttribute('aria-pressed', 'true');
    enter(button);
  }
  trigger('choose', {...button.dataset});
});
element.addEventListener('keydown', (event) => {
  const tokens = [...element.querySelectorAll('.token')], at = tokens.indexOf(event.target);
  const step = {ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -tokens.length, End: tokens.length};
  if (at < 0 || !(event.key in step)) return;
  event.preventDefault();
  const next = tokens[Math.min(tokens.length - 1, Math.max(0, at + step[event.key]))];
  enter(next);
  next.focus();
});
"""


def html(value: str = "", **options: Any) -> gr.HTML:
    """Create an HTML component that is styled only by the style sheet of the page."""
    return gr.HTML(value, **{"apply_default_css": False, "js_on_load": None, **options})


def chooser(value: str = "", **options: Any) -> gr.HTML:
    """Create an HTML component with buttons, whose event `choose` carries the data of the clicked button."""
    return html(value, js_on_load=CHOOSE, **options)


def chosen(event: gr.EventData, key: str) -> object:
    """Return the attribute `data-KEY` of the clicked button; None if it has none."""
    return event._data.get(key) if isinstance(event._data, dict) else None


class Picker(NamedTuple):
    """A search box and its list of results."""

    query: gr.Textbox
    found: gr.HTML

    @property
    def cleared(self) -> list[str]:
        """Values of both that close the list."""
        return ["", ""]


def search_box(run: OpenRun, label: str) -> gr.Textbox:
    """Create a box for words or the number of a concept."""
    placeholder = "words, or a number" if run.catalog is not None else "a number"
    return gr.Textbox(label=label, placeholder=placeholder, lines=1, max_lines=1)


def picker(run: OpenRun, label: str, action: str) -> Picker:
    """Create a search box that searches while the user types, and lists the results over what is below it.

    Args:
        run: run with the concepts.
        label: label of the box.
        action: what a click on a concept does, for screen readers.
    """

    def search(query: str) -> str:
        try:
            return markup.hits(find_concepts(run, query, HITS), action) if query.strip() else ""
        except InputError as problem:
            return markup.error(problem)

    with gr.Column(elem_classes="picker", min_width=200):
        box = search_box(run, label)
        found = chooser(elem_classes="results")
    # Each change starts a search; of changes during a search, only the last does. (The event `input` misses pastes.)
    box.change(search, box, found, trigger_mode="always_last", show_progress="hidden")
    return Picker(box, found)
