"""The judge of steered text: a teacher and its SAE read the text, whichever model wrote it.

Dimensions: R texts, T teacher tokens of a text with its prompt, C concepts (SAE latents), W watched concepts, k active
latents per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.teacher import read_text
from cocomix.data.tokenizer import encode_with_ends


class Readings(NamedTuple):
    """Readings of texts, each over the tokens of its continuation; the prompt is context only."""

    activation: np.ndarray
    """(R, W) mean activation of each watched concept."""
    active: np.ndarray
    """(R, W) fraction of tokens at which it is active."""
    nll: np.ndarray
    """(R,) mean negative log-probability per token, nats: the logarithm of the perplexity."""
    distinct_1: np.ndarray
    """(R,) fraction of distinct tokens."""
    distinct_2: np.ndarray
    """(R,) fraction of distinct pairs of neighbors."""

    @classmethod
    def concatenate(cls, parts: Sequence[Readings]) -> Readings:
        """Concatenate the readings of several batches."""
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Judge:
    """A teacher and its SAE.

    Args:
        teacher: frozen teacher.
        tokenizer: the teacher's tokenizer, a fast one, which encodes the texts of all models.
        sae: SAE of the residual stream after block `layer`.
        layer: 0-based number of the block.
        watched: ids of the concepts to watch.
        prefix: token ids that the teacher reads before each text.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SparseAutoencoder,
        layer: int,
        watched: Sequence[int],
        prefix: Sequence[int] = (),
    ) -> None:
        self.teacher, self.tokenizer, self.sae, self.layer = teacher, tokenizer, sae, layer
        self.watched = torch.tensor(watched, device=teacher.device)
        self.prefix = list(prefix)
        self.context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> Readings:
        """Read each prompt with its continuation in one batch, truncated at the start to fit the context."""
        ids, mask, judged = (each.to(self.teacher.device) for each in self._encode(prompts, continuations))
        residual, logits = read_text(self.teacher, ids, self.layer, mask)
        latents = self.sae.encode(residual)
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        tokens = judged.sum(-1)
        texts = [row[where].tolist() for row, where in zip(ids.cpu(), judged.cpu(), strict=True)]
        activation, active = mean_activations(latents, judged, self.sae.d_sae)
        return Readings(
            activation=activation[:, self.watched].cpu().numpy(),
            active=active[:, self.watched].cpu().numpy(),
            nll=((losses.view_as(ids[:, 1:]) * judged[:, 1:]).sum(-1) / tokens).cpu().numpy(),
            distinct_1=np.array([distinct(each, 1) for each in texts]),
            distinct_2=np.array([distinct(each, 2) for each in texts]),
        )

    def _encode(self, prompts: Sequence[str], continuations: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Encode to (R, T) token ids, padded on the right, their mask, and a mask of the continuation's tokens."""
        texts = [prompt + rest for prompt, rest in zip(prompts, continuations, strict=True)]
        rows, judged = [], []
        for text, prompt in zip(encode_with_ends(self.tokenizer, texts), prompts, strict=True):
            room = None if self.context is None else -(self.context - len(self.prefix))
            rows.append(torch.tensor(self.prefix + text.ids.tolist()[room:]))
            inside = (text.ends > len(prompt)).tolist()[room:]
            judged.append(torch.tensor([False] * len(self.prefix) + inside))
            judged[-1][0] = False  # no prediction precedes the first token
            assert judged[-1].any(), "a continuation needs a token after the first of the text"
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids, where = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (rows, judged))
        return ids, mask, where


def mean_activations(latents: Latents, judged: Tensor, concepts: int) -> tuple[Tensor, Tensor]:
    """Compute mean activation and fraction of active tokens of each concept, each (R, C) float32.

    Args:
        latents: (R, T, k) latents of the texts.
        judged: (R, T) bool, tokens that count, at least one per text.
        concepts: C.
    """
    values = latents.values.float() * judged[..., None]
    total = values.new_zeros(len(values), concepts)
    active = torch.zeros_like(total)
    flat = latents.indices.flatten(1)
    total.scatter_add_(1, flat, values.flatten(1))
    active.scatter_add_(1, flat, (values > 0).float().flatten(1))
    tokens = judged.sum(-1, keepdim=True)
    return total / tokens, active / tokens


def distinct(tokens: Sequence[int], n: int) -> float:
    """distinct-n (Li et al., 2016): fraction of distinct n-grams; 1 for a text without any."""
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
