"""Limits of a request to the page, so that several people can use it at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from cocomix.common.errors import InputError
from cocomix.common.settings import Range
from cocomix.inspection.runs import OpenRun

STEERED_CONCEPTS = 8
"""Maximum number of steered concepts, each with a slider."""
STRONGEST = 20.0
"""Range of a slider in either direction; logits are of the order of 10."""


@dataclass(frozen=True)
class Limits:
    """Limits of a request.

    Attributes:
        seconds: time limit of a generation.
        characters: maximum length of a prompt or of a text to read.
        read_tokens: number of tokens that are read of a text; the rest is left out.
        new_tokens: maximum number of generated tokens.
    """

    seconds: Annotated[float, Range(1, 3600)] = 60.0
    characters: int = 20_000
    read_tokens: int = 2048
    new_tokens: int = 256

    def for_run(self, run: OpenRun) -> Limits:
        """Restrict the limits to the model's context."""
        context = run.model.config.max_position_embeddings
        return replace(self, new_tokens=max(1, min(self.new_tokens, context - 1)))

    def check_characters(self, text: str) -> None:
        """Raise InputError if the text is empty, or too long to be tokenized."""
        if not text:
            raise InputError("enter a text first")
        if len(text) > self.characters:
            raise InputError(f"the text has {len(text):,} characters; the limit is {self.characters:,}")
