"""Generate plain and steered text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from transformers import set_seed

from cocomix.common.errors import InputError
from cocomix.common.settings import Batch, Count, Range, Seed, require
from cocomix.inspection.runs import OpenRun
from cocomix.inspection.sampling import continuation
from cocomix.inspection.tracing import text_ids
from cocomix.models.steering import Steering

MIN_TEMPERATURE = 1e-3
"""Smallest temperature of sampling; logits divided by less may overflow."""


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of generation.

    Attributes:
        max_new_tokens: maximum number of generated tokens.
        temperature: sampling temperature; 0 for greedy decoding.
        top_p: probability mass of the most probable tokens to sample from.
        seed: seed of sampling.
        num_beams: number of beams; 1 for no beam search.
        num_samples: number of texts.

    Raises:
        InputError: a value is out of its range or has no effect.
    """

    max_new_tokens: Count = 40
    temperature: Annotated[float, Range(0, 10**6)] = 0.0
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    seed: Seed = 0
    num_beams: Batch = 1
    num_samples: Batch = 1

    def __post_init__(self) -> None:
        require(self)
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise InputError(f"temperature is {self.temperature}; expected 0 (greedy), or {MIN_TEMPERATURE} or more")
        if self.temperature == 0 and self.top_p < 1:
            raise InputError(f"top_p is {self.top_p} without sampling, where it has no effect; set a temperature")
        if self.temperature == 0 and self.num_samples > self.num_beams:
            raise InputError(
                f"{self.num_samples} samples would be the same at temperature 0; set a temperature, or as many beams"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of Transformers' `generate`."""
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        return {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": bool(self.temperature),
            "num_beams": self.num_beams,
            "num_return_sequences": self.num_samples,
            **sampling,
        }


def prompt_ids(run: OpenRun, prompt: str, max_new_tokens: int) -> Tensor:
    """Encode a prompt to (1, T) token ids on the model's device.

    Raises:
        InputError: the prompt is empty, or leaves no room for the new tokens in the model's context.
    """
    context = run.model.config.max_position_embeddings
    ids = text_ids(run.tokenizer, prompt, context)
    if len(ids) + max_new_tokens > context:
        raise InputError(
            f"{len(ids)} prompt tokens and {max_new_tokens} new ones exceed this model's context of {context}; ask for "
            f"at most {context - len(ids)} new ones"
        )
    return ids[None].to(run.model.device)


def continuations(run: OpenRun, prompt: str, settings: GenerationSettings, steering: Steering) -> list[str]:
    """Generate steered continuations of the prompt.

    Raises:
        InputError: the prompt is empty, or leaves no room in the model's context.
        ValueError: the steering does not fit this model.
    """
    inputs = prompt_ids(run, prompt, settings.max_new_tokens)
    set_seed(settings.seed)
    found = run.model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        steering=steering,
        pad_token_id=run.tokenizer.eos_token_id,
        **settings.arguments(),
    )
    ids = inputs[0].tolist()
    return [continuation(run.tokenizer, ids, new) for new in found[:, inputs.shape[1] :].tolist()]
