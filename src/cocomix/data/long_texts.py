"""Cut long texts into pieces that are tokenized as in the complete text: tokenizers need much memory per token."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice, pairwise

PIECE = 1 << 18
"""Characters per piece, about."""
_CONTEXT = 64
"""Characters on each side of a cut that are encoded to check it."""
_ATTEMPTS = 16
_SINGLE_SPACE = re.compile(r"(?<=\S)(?=[ \n]\S)")


def pieces(text: str, encode: Callable[[str], list[int]] | None = None) -> list[str]:
    """Cut a text about every `PIECE` characters, before single spaces and line breaks.

    Most tokenizers split text into words before they encode it, so they tokenize the pieces as the text. Some do not,
    such as those that put a space before every text: if `encode` is given, the text is cut only where the tokens
    nearby do not change, which may be nowhere.
    """
    cuts = [0]
    for target in range(PIECE, len(text) - _CONTEXT, PIECE):
        breaks = (found.start() for found in _SINGLE_SPACE.finditer(text, target, target + PIECE - _CONTEXT))
        fitting = (at for at in islice(breaks, _ATTEMPTS) if encode is None or _keeps_tokens(text, at, encode))
        cuts += islice(fitting, 1)
    return [text[start:end] for start, end in pairwise([*cuts, len(text)])]


def _keeps_tokens(text: str, at: int, encode: Callable[[str], list[int]]) -> bool:
    before, after = text[at - _CONTEXT : at], text[at : at + _CONTEXT]
    return encode(before) + encode(after) == encode(before + after)
