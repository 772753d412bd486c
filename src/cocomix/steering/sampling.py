"""Continuations of prompts, sampled with the same random numbers whoever writes and however it is steered.

R rows of a batch, P prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from cocomix.data.tokenizer import encode_documents


def gumbel_noise(*shape: int, generator: torch.Generator) -> Tensor:
    """Independent draws of the standard Gumbel distribution, −log E with E exponential.

    On top of logits, it makes their argmax a sample of their softmax (Gumbel, 1954).
    """
    return -torch.empty(shape).exponential_(generator=generator).log()


class SharedNoise(LogitsProcessor):
    """Gumbel noise on the logits, step after step.

    Rows of one prompt get the same noise, so that two texts differ only as far as their models do. It depends on the
    seed, the step and the prompt, not on what else is in the batch.

    Args:
        prompt_of: (R,) the prompt of each row.
        prompts: P, of all batches.
        seed: of the noise.
    """

    def __init__(self, prompt_of: Sequence[int], prompts: int, seed: int) -> None:
        self.prompt_of = torch.tensor(prompt_of)
        self.prompts = prompts
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (R, V) of the next step with its noise."""
        noise = gumbel_noise(self.prompts, scores.shape[-1], generator=self.generator)
        return scores.float() + noise[self.prompt_of].to(scores.device)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    beginnings: Sequence[Sequence[int]],
    noise: SharedNoise,
    tokens: int,
    **options: Any,
) -> list[str]:
    """How `model` goes on after each beginning, R of them, by exactly so many tokens: end-of-text is not sampled.

    Args:
        model: any causal language model, in evaluation mode.
        tokenizer: its own.
        beginnings: token ids, one or more of each.
        noise: of these rows.
        tokens: to sample.
        options: for the model, `steering` say.
    """
    length = max(map(len, beginnings))
    ids = torch.full((len(beginnings), length), tokenizer.eos_token_id)
    mask = torch.zeros_like(ids)
    for row, beginning in enumerate(beginnings):  # padded on the left
        ids[row, length - len(beginning) :] = torch.tensor(beginning)
        mask[row, length - len(beginning) :] = 1
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
        continuation(tokenizer, list(beginning), new)
        for beginning, new in zip(beginnings, found[:, length:].tolist(), strict=True)
    ]


def continuation(tokenizer: PreTrainedTokenizerBase, beginning: list[int], new: list[int]) -> str:
    """The text of `new` tokens after a beginning, without special tokens.

    Decoded after the beginning, since a tokenizer may drop the blank before a text that stands alone.
    """

    def text(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    whole, lead = text(beginning + new), text(beginning)
    return whole.removeprefix(lead) if whole.startswith(lead) else text(new)


def in_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], beginning: Sequence[int] = ()
) -> list[list[int]]:
    """The tokens of texts, each after those that the model reads before every text."""
    return [[*beginning, *ids] for ids in encode_documents(tokenizer, list(texts))]
