"""Decode single tokens without breaking characters that span several tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_CHARACTER = 4
"""Maximum number of UTF-8 bytes of a character, and thus of tokens that it can span."""
UNFINISHED = "\ufffd"
"""Decoding of an incomplete character."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decode tokens, including special ones, without removing spaces."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode each token; a token that is part of a character shows the complete character.

    A character that the tokens do not complete is shown as a replacement character.
    """

    def piece(at: int) -> str:
        alone = decoded(tokenizer, [ids[at]])
        if UNFINISHED not in alone:
            return alone
        start = max(0, at - LONGEST_CHARACTER + 1)
        around = list(ids[start : at + LONGEST_CHARACTER])
        return decode_around(lambda part: decoded(tokenizer, part), around, at - start)[1]

    return [piece(at) for at in range(len(ids))]


def decode_around(decode: Callable[[list[int]], str], ids: list[int], index: int) -> tuple[str, str, str]:
    """Split the text of `ids` into the parts before, at, and after token `index`.

    A character that spans several tokens is not broken: it belongs to token `index` if that contains a part of it.
    Incomplete characters at both ends are dropped.
    """
    for _ in range(LONGEST_CHARACTER - 1):
        if index > 0 and decode(ids).startswith(UNFINISHED):
            ids, index = ids[1:], index - 1
    for _ in range(LONGEST_CHARACTER - 1):
        if index < len(ids) - 1 and decode(ids).endswith(UNFINISHED):
            ids = ids[:-1]
    text = decode(ids)
    # An incomplete character decodes to a replacement character, which does not match the text: extend the prefix.
    end = next(len(lead) for stop in range(index + 1, len(ids) + 1) if text.startswith(lead := decode(ids[:stop])))
    lead = decode(ids[:index])
    start = next((at for at, (one, other) in enumerate(zip(lead, text, strict=False)) if one != other), len(lead))
    if start >= end:  # both end within one character, which the text does not complete either
        start = len(text[:end].rstrip(UNFINISHED))
    return text[:start], text[start:end], text[end:]
