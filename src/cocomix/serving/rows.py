"""One text that is generated: its tokens, how the next one is chosen, and what is sent to its client."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from cocomix.inspection.sampling import GumbelSampling
from cocomix.models.steering import Steering
from cocomix.serving.text import GrowingText

STOP, LENGTH = "stop", "length"
"""Why a text ends, in the words of OpenAI's interface."""


class ScoredToken(NamedTuple):
    """A token with its log-probability, before temperature and top p, in nats."""

    token_id: int
    logprob: float | None
    """None for the first token of a prompt."""
    top: list[tuple[int, float]]
    """The most probable tokens at this place."""


class Delta(NamedTuple):
    """New output of a row."""

    choice: int
    """Number of its text in the answer."""
    text: str
    tokens: list[ScoredToken]
    """The new tokens, if their log-probabilities are wanted."""
    end: str | None
    """Why the text ended; None while it is generated."""


@dataclass(frozen=True)
class SamplingParams:
    """How the texts of a request are to be generated.

    Attributes:
        max_tokens: maximum number of new tokens.
        temperature: sampling temperature; 0 for greedy decoding.
        top_p: probability mass of the most probable tokens to sample from.
        stops: strings at which a text ends.
        logprobs: number of most probable tokens to report at each place; None for no log-probabilities.
        echo: whether the answer begins with the prompt.
        steering: changes of the concepts; None for none.
    """

    max_tokens: int
    temperature: float
    top_p: float
    stops: tuple[str, ...]
    logprobs: int | None
    echo: bool
    steering: Steering | None


class Row:
    """A text that is generated.

    Args:
        index: number of the text in its answer.
        ids: token ids of the prompt.
        params: how to continue it.
        seed: seed of sampling.
        tokenizer: the model's tokenizer.
        ends: ids of the tokens that end a text.
        send: function that receives what is new; called in the thread of the engine.
    """

    def __init__(
        self,
        index: int,
        ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        tokenizer: PreTrainedTokenizerFast,
        ends: frozenset[int],
        send: Callable[[Delta | Exception], None],
    ) -> None:
        self.index, self.ids, self.params, self.ends, self.send = index, list(ids), params, ends, send
        self.prompt_length = len(ids)
        self.steering = None if params.steering is None else params.steering.after_prompt(len(ids))
        self.text = GrowingText(tokenizer, ids, params.stops)
        self.sampling = GumbelSampling(params.temperature, params.top_p, seed) if params.temperature else None
        self.cancelled = Event()

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether the answer scores the prompt's tokens."""
        return self.params.echo and self.params.logprobs is not None

    @property
    def new_tokens(self) -> int:
        """Number of generated tokens."""
        return len(self.ids) - self.prompt_length

    def start(self, logits: Tensor, prompt: str) -> bool:
        """Report the prompt if wanted, and choose the first token.

        Args:
            logits: (T, V) logits after each token of the prompt, or (1, V) after the last one.
            prompt: text of the prompt.

        Returns:
            Whether the text has ended.
        """
        if self.params.echo:
            scored = self._scored(self.ids, logits[: len(self.ids) - 1]) if self.needs_prompt_logits else []
            ended = self.params.max_tokens == 0
            self.send(Delta(self.index, prompt, scored, LENGTH if ended else None))
            if ended:
                return True
        return self.advance(logits[-1], int(logits[-1].argmax()))

    def advance(self, logits: Tensor, best: int) -> bool:
        """Choose the next token from logits (V,), of which `best` has the largest; return whether the text ended."""
        token = best
        if self.sampling is not None:
            token = int(self.sampling(torch.empty(1, 0), logits[None].float().cpu())[0].argmax())
        self.ids.append(token)
        ended, new = token in self.ends, ""
        if not ended:
            new = self.text.add(token)
        end = STOP if ended or self.text.stopped else LENGTH if self.new_tokens >= self.params.max_tokens else None
        if end is not None:
            new += self.text.end()
        scored = [] if self.params.logprobs is None else self._scored([token], logits[None])
        if new or scored or end:
            self.send(Delta(self.index, new, scored, end))
        return end is not None

    def _scored(self, ids: Sequence[int], logits: Tensor) -> list[ScoredToken]:
        """Score the last tokens of ids by the logits (T, V) before each; tokens without logits come first."""
        logprobs = logits.float().log_softmax(-1)
        scored = ids[len(ids) - len(logits) :]
        chosen = logprobs.gather(-1, torch.tensor(scored, device=logits.device).reshape(-1, 1))[:, 0].tolist()
        values, tokens = (part.tolist() for part in logprobs.topk(self.params.logprobs or 0))
        unscored = [ScoredToken(token, None, []) for token in ids[: len(ids) - len(logits)]]
        return unscored + [
            ScoredToken(token, logprob, list(zip(tokens[at], values[at], strict=True)))
            for at, (token, logprob) in enumerate(zip(scored, chosen, strict=True))
        ]
