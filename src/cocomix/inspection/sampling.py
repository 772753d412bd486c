"""Sample continuations of prompts with common random numbers across models and steering.

Dimensions: R rows per batch, P prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from cocomix.data.tokenizer import encode_documents


def gumbel_noise(*shape: int, generator: torch.Generator) -> Tensor:
    """Draw from the standard Gumbel distribution: −log E with E exponential.

    The argmax of logits plus this noise is a sample of their softmax (Gumbel, 1954).
    """
    return -torch.empty(shape).exponential_(generator=generator).log()


class SharedNoise(LogitsProcessor):
    """Add Gumbel noise to the logits of each step.

    Rows with the same prompt get the same noise, so that their texts differ only because of their models. The noise
    depends on the seed, the step and the prompt, not on the other rows of the batch.

    Args:
        row_prompts: (R,) index of each row's prompt.
        prompts: P, number of prompts in all batches.
        seed: seed of the noise.
    """

    def __init__(self, row_prompts: Sequence[int], prompts: int, seed: int) -> None:
        self.row_prompts = torch.tensor(row_prompts)
        self.prompts = prompts
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Add the noise of the next step to logits (R, V)."""
        noise = gumbel_noise(self.prompts, scores.shape[-1], generator=self.generator)
        return scores.float() + noise[self.row_prompts].to(scores.device)


class GumbelSampling(LogitsProcessor):
    """Sample by greedy decoding of logits with Gumbel noise.

    All rows get the same noise, from a separate generator, so equal logits give equal tokens.
    """

    def __init__(self, temperature: float, top_p: float, seed: int) -> None:
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the warped scores (B, V) plus noise."""
        noise = gumbel_noise(scores.shape[-1], generator=self.generator)
        return self.warpers(input_ids, scores) + noise.to(scores)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    noise: SharedNoise,
    tokens: int,
    **options: Any,
) -> list[str]:
    """Sample continuations of R prompts with exactly `tokens` tokens each; end-of-text is never sampled.

    Args:
        model: any causal language model, in evaluation mode.
        tokenizer: tokenizer of the model.
        prompts: token ids, at least one per prompt.
        noise: noise of these rows.
        tokens: number of tokens to sample.
        options: further arguments of the model, such as `steering`.
    """
    length = max(map(len, prompts))
    ids = torch.full((len(prompts), length), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):  # padded on the left
        ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    found = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        logits_processor=LogitsProcessorList([noise]),
        **options,
    )
    return [
        continuation(tokenizer, list(prompt), new)
        for prompt, new in zip(prompts, found[:, length:].tolist(), strict=True)
    ]


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """Decode the tokens `new` that follow a prompt, without special tokens.

    Decodes them together with the prompt, since a tokenizer may drop a leading space.
    """

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    both, lead = text(prompt + new), text(prompt)
    return both.removeprefix(lead) if both.startswith(lead) else text(new)


def in_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prefix: Sequence[int] = ()) -> list[list[int]]:
    """Encode texts, each after the token ids `prefix`."""
    return [[*prefix, *ids] for ids in encode_documents(tokenizer, list(texts))]
