"""The text of a row while its tokens arrive: complete characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast

CONTEXT = 8
"""Number of tokens before the text that decide how it begins: a tokenizer may drop the space of its first token."""


class GrowingText:
    """Decode tokens as they arrive.

    Args:
        tokenizer: the tokenizer.
        before: token ids that precede the text.
        stops: strings at which the text ends; they are left out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.stream = DecodeStream(ids=list(before[-CONTEXT:]), skip_special_tokens=True)
        self.backend, self.stops = tokenizer.backend_tokenizer, stops
        self.text, self.sent = "", 0
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token, and return the text that is certain now.

        The beginning of a stop string is held back until the next tokens decide. `stopped` is set once one is complete.
        """
        new = self.stream.step(self.backend, token) or ""
        searched = max(0, len(self.text) - max(map(len, self.stops), default=0))
        self.text += new
        found = [at for stop in self.stops if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return self._send(len(self.text) - (0 if self.stopped else self._undecided()))

    def end(self) -> str:
        """Return what was held back."""
        return self._send(len(self.text))

    def _undecided(self) -> int:
        """Return the length of the longest end of the text that begins a stop string."""
        longest = min(max(map(len, self.stops), default=1) - 1, len(self.text))
        return next(
            (length for length in range(longest, 0, -1) if any(s.startswith(self.text[-length:]) for s in self.stops)),
            0,
        )

    def _send(self, end: int) -> str:
        sent, self.sent = self.sent, max(self.sent, end)
        return self.text[sent : self.sent]
