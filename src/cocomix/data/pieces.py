"""The text of single tokens, in which a character that is spread over several tokens stays whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_CHARACTER = 4
"""Bytes of a character in UTF-8, and so the tokens that it can be spread over."""
UNFINISHED = "\ufffd"
"""What part of a character decodes to."""


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of some tokens, special ones included, with no blank taken out."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def token_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; a token that holds part of a character shows the whole character.

    A character that the tokens do not finish stays a replacement sign.
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
    """The text of `ids` before, at and after token `index`; together they are the text of all.

    A character spread over several tokens is not broken: it counts to the token asked for if that holds a part
    of it. At either end, the tokens of a character that is cut there are left out.
    """
    for _ in range(LONGEST_CHARACTER - 1):
        if index > 0 and decode(ids).startswith(UNFINISHED):
            ids, index = ids[1:], index - 1
    for _ in range(LONGEST_CHARACTER - 1):
        if index < len(ids) - 1 and decode(ids).endswith(UNFINISHED):
            ids = ids[:-1]
    text = decode(ids)
    # An unfinished character decodes to a replacement sign, which is not how the text goes on: take what follows.
    end = next(len(lead) for stop in range(index + 1, len(ids) + 1) if text.startswith(lead := decode(ids[:stop])))
    lead = decode(ids[:index])
    start = next((at for at, (one, other) in enumerate(zip(lead, text, strict=False)) if one != other), len(lead))
    if start >= end:  # both end within one character, which the text does not finish either
        start = len(text[:end].rstrip(UNFINISHED))
    return text[:start], text[start:end], text[end:]
