"""The three compared ways of turning a concept up in a text: CoCoMix steering, and two that need no CoCoMix.

Dimensions: R requests per batch, d teacher width, C concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.concepts.teacher import tap
from cocomix.inspection.sampling import SharedNoise, in_tokens, sample
from cocomix.models.steering import Steering


class Request(NamedTuple):
    """A text to generate."""

    prompt: int
    """Index of the prompt."""
    concept: int
    """Concept to turn up."""
    strength: float
    """Strength in the arm's unit; 0 for a text of the unsteered model."""


class Arm(Protocol):
    """One of the compared ways."""

    name: str
    unit: str
    """Meaning of a strength of 1."""

    @property
    def strengths(self) -> Sequence[float]:
        """Strengths to try."""
        ...

    def write(self, requests: Sequence[Request]) -> list[str]:
        """Generate the continuation of each request's prompt."""
        ...


class Writer(NamedTuple):
    """A model that continues prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[str]
    tokens: int
    """Number of tokens to generate."""
    seed: int
    prefix: Sequence[int] = ()
    """Token ids that the model reads before each text."""

    def write(self, requests: Sequence[Request], prefixes: Sequence[str] | None = None, **options: Any) -> list[str]:
        """Generate continuations, optionally with a text before each prompt, which is truncated to fit the context."""
        prompts = in_tokens(self.tokenizer, [self.prompts[request.prompt] for request in requests])
        before = [[]] * len(prompts) if prefixes is None else in_tokens(self.tokenizer, prefixes)
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        inputs = []
        for text, prompt in zip(before, prompts, strict=True):
            room = None if context is None else max(0, context - self.tokens - len(self.prefix) - len(prompt))
            inputs.append([*self.prefix, *text[:room], *prompt])
        noise = SharedNoise([request.prompt for request in requests], len(self.prompts), self.seed)
        return sample(self.model, self.tokenizer, inputs, noise, self.tokens, **options)


class SteeredStudent:
    """Steer the concept logits of a CoCoMix model, before the choice, at every token.

    Args:
        writer: writer with the CoCoMix model.
        strengths: strengths to try.
        operation: `add`, with strengths in standard deviations of the concept logits, or `scale`, with factors.
        deviation: standard deviation of the concept logits.
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
    """Add the concept's decoder direction to the teacher's residual stream at the tapped block, at every token.

    Args:
        writer: writer with the teacher.
        strengths: strengths to try, as fractions of `norm`.
        layer: number of the tapped block.
        directions: W_dec (C, d); each row is scaled to length 1.
        norm: length of the residual stream there.
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
    """Name the tokens that a concept promotes before the prompt of the unsteered student.

    Args:
        writer: writer with the student.
        strengths: numbers of named tokens to try.
        promoted: tokens that each concept promotes, strongest first.
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
