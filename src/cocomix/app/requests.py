"""Check the body of a request before Gradio reads it: nothing but what the page's own components send."""

from __future__ import annotations

import json
import math
from typing import Any

import gradio as gr

from cocomix.app.limits import Limits
from cocomix.common.errors import InputError

MAX_BYTES = 12 * Limits.characters + 16_384
"""Largest body. JSON may write a character as two escaped surrogates, of 6 bytes each."""
EVENT_KEYS = {"data", "event_data", "fn_index", "trigger_id", "session_hash"}
CANCEL_KEYS, RESET_KEYS = {"event_id", "fn_index", "session_hash"}, {"event_id"}
LONGEST_ID = 64
"""Maximum number of characters of a session or an event, which the browser or Gradio chooses."""


def check_event(page: gr.Blocks, body: bytes) -> None:
    """Check a request that runs a function of the page.

    Gradio itself would fetch a file or an address that is given as a value, accept keys of other interfaces, and fail
    with a traceback on values of the wrong type.

    Raises:
        InputError: the body has other keys than the page sends, names no function that the page queues, or has a value
            that the component could not have.
    """
    request = _parsed(body, EVENT_KEYS)
    number = request.get("fn_index")
    function = page.fns.get(number) if _is_number(number) else None
    if function is None or function.fn is None or not function.queue:
        raise InputError("fn_index is not a function of this page")
    _check_id("session_hash", request.get("session_hash"))
    if not isinstance(request.get("trigger_id", 0), int | None):
        raise InputError("trigger_id is not a number")
    _check_event_data(request.get("event_data"))
    data = request.get("data")
    if not isinstance(data, list) or len(data) != len(function.inputs):
        raise InputError(f"data is not a list of the {len(function.inputs)} values that this function takes")
    for position, (component, value) in enumerate(zip(function.inputs, data, strict=True)):
        if not _fits(component, value):
            raise InputError(f"value {position} does not fit its {component.get_block_name()}")


def check_end(keys: set[str], body: bytes) -> None:
    """Check a request that ends an event. Raises InputError unless it has exactly these keys, with valid values."""
    request = _parsed(body, keys)
    for key in keys & {"session_hash", "event_id"}:
        _check_id(key, request.get(key))
    if "fn_index" in keys and not _is_number(request.get("fn_index")):
        raise InputError("fn_index is not a number")


def _parsed(body: bytes, keys: set[str]) -> dict[str, Any]:
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError("the request is not JSON") from None
    if not isinstance(request, dict) or not request.keys() <= keys:
        raise InputError(f"the request is not an object with the keys {', '.join(sorted(keys))}")
    return request


def _check_id(key: str, value: object) -> None:
    if not (isinstance(value, str) and 0 < len(value) <= LONGEST_ID and value.isascii() and value.isprintable()):
        raise InputError(f"{key} is not a name of 1 to {LONGEST_ID} characters")


def _check_event_data(value: object) -> None:
    """Accept what the page's events carry: nothing, the text of a field, or the data of a clicked button."""
    values = list(value.values()) if isinstance(value, dict) else [value]
    if not all(each is None or _is_text(each) or _is_number(each) for each in values):
        raise InputError("event_data is neither text nor an object of texts")


def _fits(component: gr.components.Component, value: object) -> bool:
    """Whether the browser could send this value of a component."""
    if isinstance(component, gr.State):  # stays on the server
        return value is None
    if isinstance(component, gr.Slider):
        return _is_number(value) and component.minimum <= value <= component.maximum
    if isinstance(component, gr.Number):
        return value is None or _is_number(value)
    if isinstance(component, gr.Radio | gr.Dropdown) and not getattr(component, "allow_custom_value", False):
        return _is_text(value) and value in [choice for _, choice in component.choices]
    assert isinstance(component, gr.Textbox | gr.Dropdown), "each kind of component is checked here"
    return _is_text(value)


def _is_number(value: object) -> bool:
    """Whether this is a finite number that a float can hold."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_text(value: object) -> bool:
    """Whether this is text that UTF-8 can encode; JSON can escape half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False
