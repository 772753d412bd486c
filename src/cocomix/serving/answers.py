"""Answers in the form of OpenAI's interface: complete ones, and the chunks of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from cocomix.data.pieces import decoded
from cocomix.serving.rows import Delta, ScoredToken


def error(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Return the token counts of a response."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


@dataclass
class ResponseFormat:
    """The form of the answers to one request.

    Attributes:
        model: name of the model.
        tokenizer: its tokenizer.
        chat: whether the answers are messages.
        logprobs: whether log-probabilities are part of the answers.
    """

    model: str
    tokenizer: PreTrainedTokenizerBase
    chat: bool
    logprobs: bool
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def first_chunks(self, texts: int) -> list[dict[str, Any]]:
        """Return the chunks before any text."""
        if not self.chat:
            return []
        choice = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self._answer([{"index": index, **choice}], stream=True) for index in range(texts)]

    def chunk(self, delta: Delta, concepts: Any, at: int) -> dict[str, Any]:
        """Return the chunk for what is new of a text, from its character `at` on."""
        content: dict[str, Any] = {"text": delta.text}
        if self.chat:
            content = {"delta": {"content": delta.text} if delta.text or not delta.end else {}}
        return self._answer([self._choice(delta, content, concepts, at)], stream=True)

    def last_chunk(self, tokens: Mapping[str, int]) -> dict[str, Any]:
        """Return the chunk with the numbers of tokens."""
        return self._answer([], stream=True) | {"usage": tokens}

    def complete(self, texts: Sequence[Delta], concepts: Sequence[Any], tokens: Mapping[str, int]) -> dict[str, Any]:
        """Return the complete answer of texts, each in one piece."""
        choices = []
        for text, shown in zip(texts, concepts, strict=True):
            message = {"role": "assistant", "content": text.text}
            choices.append(self._choice(text, {"message": message} if self.chat else {"text": text.text}, shown, 0))
        return self._answer(choices, stream=False) | {"usage": tokens}

    def _answer(self, choices: list[Any], stream: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else "chat.completion.chunk" if stream else "chat.completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        about = {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}
        return {**about, "choices": choices}

    def _choice(self, delta: Delta, content: Mapping[str, Any], concepts: Any, at: int) -> dict[str, Any]:
        scores = None
        if self.logprobs:
            scores = self._chat_scores(delta.tokens) if self.chat else self._scores(delta.tokens, at)
        shown = {} if concepts is None else {"concepts": concepts}
        return {"index": delta.choice, **content, "logprobs": scores, "finish_reason": delta.end, **shown}

    def _scores(self, tokens: Sequence[ScoredToken], at: int) -> dict[str, Any]:
        """Return log-probabilities in the form of completions; `text_offset` counts characters of the answer."""
        pieces = [self._piece(token.token_id) for token in tokens]
        offsets = []
        for piece in pieces:
            offsets.append(at)
            at += len(piece)
        top = [
            None if token.logprob is None else {self._piece(each): value for each, value in token.top}
            for token in tokens
        ]
        logprobs = [token.logprob for token in tokens]
        return {"tokens": pieces, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _chat_scores(self, tokens: Sequence[ScoredToken]) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            piece = self._piece(token)
            return {"token": piece, "logprob": logprob, "bytes": list(piece.encode())}

        return {
            "content": [
                entry(token.token_id, token.logprob) | {"top_logprobs": [entry(*each) for each in token.top]}
                for token in tokens
            ]
        }

    def _piece(self, token: int) -> str:
        return decoded(self.tokenizer, [token])
