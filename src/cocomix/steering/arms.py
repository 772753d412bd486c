"""Three ways of turning a concept up in a text, which are compared: the method's own, and two that need no CoCoMix.

R requests of a batch, d teacher width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.concepts.teacher import tap
from cocomix.models.steering import Steering
from cocomix.steering.sampling import SharedNoise, in_tokens, sample


class Request(NamedTuple):
    """A text that is wanted."""

    prompt: int
    """Its number among the prompts."""
    concept: int
    """What is to be turned up."""
    strength: float
    """How much, in the arm's own unit; 0 is a text of the unsteered model."""


class Arm(Protocol):
    """One of the three ways."""

    name: str
    unit: str
    """What a strength of 1 is."""

    @property
    def strengths(self) -> Sequence[float]:
        """To try."""
        ...

    def write(self, requests: Sequence[Request]) -> list[str]:
        """How the texts go on after their prompts."""
        ...


class Writer(NamedTuple):
    """A model that goes on after prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    tokens: int
    """To be written."""
    seed: int
    beginning: Sequence[int] = ()
    """Tokens that the model reads before each text."""

    def write(self, requests: Sequence[Request], prefixes: Sequence[str] | None = None, **options: Any) -> list[str]:
        """Continuations, with something before the prompts if wanted; what the context has no room for is cut off in
        front of the prompt."""
        prompts = in_tokens(self.tokenizer, [self.prompts[request.prompt] for request in requests])
        before = [[]] * len(prompts) if prefixes is None else in_tokens(self.tokenizer, prefixes)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        beginnings = []
        for prefix, prompt in zip(before, prompts, strict=True):
            room = None if context is None else max(0, context - self.tokens - len(self.beginning) - len(prompt))
            beginnings.append([*self.beginning, *prefix[:room], *prompt])
        noise = SharedNoise([request.prompt for request in requests], len(self.prompts), self.seed)
        return sample(self.model, self.tokenizer, beginnings, noise, self.tokens, **options)


class SteeredStudent:
    """Concept logits of a CoCoMix model, before the choice, at every token.

    Args:
        writer: the model.
        strengths: to try.
        operation: `add`, strengths being standard deviations of its concept logits, or `scale`, being factors.
        deviation: the standard deviation.
    """

    def __init__(self, writer: Writer, strengths: Sequence[float], operation: str, deviation: float) -> None:
        self.writer, self.strengths, self.operation, self.deviation = writer, strengths, operation, deviation
        self.name = f"concept logit, {operation}"
        self.unit = "factor" if operation == "scale" else f"{deviation:.2f} (standard deviation of the concept logits)"

    def write(self, requests: Sequence[Request]) -> list[str]:
        return self.writer.write(requests, steering=[self._steering(request) for request in requests])

    def _steering(self, request: Request) -> Steering | None:
        if request.strength == 0:
            return None
        if self.operation == "scale":
            return Steering.scale({request.concept: request.strength})
        return Steering.add({request.concept: request.strength * self.deviation})


class SteeredTeacher:
    """The concept's decoder direction added to the teacher's residual stream at the tapped block, at every token.

    Args:
        writer: the teacher.
        strengths: to try, as shares of `norm`.
        layer: the tapped block.
        directions: W_dec (C, d); each is scaled to length 1.
        norm: of the residual stream there.
    """

    name = "decoder direction in the teacher"

    def __init__(self, writer: Writer, strengths: Sequence[float], layer: int, directions: Tensor, norm: float) -> None:
        self.writer, self.strengths, self.layer, self.directions, self.norm = writer, strengths, layer, directions, norm
        self.unit = f"{norm:.1f} (median length of the residual stream)"

    def write(self, requests: Sequence[Request]) -> list[str]:
        chosen = self.directions[[request.concept for request in requests]].float()  # (R, d)
        strengths = torch.tensor([request.strength for request in requests], device=chosen.device)
        shift = (torch.nn.functional.normalize(chosen, dim=-1) * (self.norm * strengths)[:, None])[:, None]
        with tap(self.writer.model, self.layer, lambda x: x + shift.to(x)):
            return self.writer.write(requests)


class NamingPrompt:
    """The tokens that a concept promotes, named before the prompt of the unsteered student.

    Args:
        writer: the student.
        strengths: to try: how many tokens are named.
        promoted: of each concept, the strongest first.
    """

    name = "prompt that names its tokens"
    unit = "token named"

    def __init__(self, writer: Writer, strengths: Sequence[int], promoted: Mapping[int, Sequence[str]]) -> None:
        self.writer, self.promoted = writer, promoted
        self.strengths: Sequence[float] = strengths

    def write(self, requests: Sequence[Request]) -> list[str]:
        return self.writer.write(requests, prefixes=[self._prefix(request) for request in requests])

    def _prefix(self, request: Request) -> str:
        named = self.promoted.get(request.concept, ())[: int(request.strength)]
        return ", ".join(token.strip() for token in named) + "\n" if named else ""
