"""Wait for the result of an event of the page, as its browser does."""

from __future__ import annotations

import json
from typing import Any

import httpx


def completed(client: httpx.Client, session: str) -> dict[str, Any]:
    """Return the last message of the only event of a session: its `success` and its `output`."""
    with client.stream("GET", "/gradio_api/queue/data", params={"session_hash": session}) as stream:
        assert stream.status_code == 200
        for line in stream.iter_lines():
            message = json.loads(line.removeprefix("data: ")) if line else {}
            if message.get("msg") == "process_completed":
                return message
    raise AssertionError("the page ended the stream before the event")
