"""The judge of steered text: a teacher and its SAE read what was written, and see no model that wrote it.

R texts, T teacher tokens of a text with its prompt, C concepts (SAE latents), W concepts that are watched, k active
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
    """What the judge says of texts, of each over the tokens of its continuation; the prompt is context only."""

    activation: np.ndarray
    """(R, W) mean activation of each watched concept."""
    active: np.ndarray
    """(R, W) share of the tokens at which it is active."""
    nll: np.ndarray
    """(R,) mean negative log-probability of a token, nats: the logarithm of the perplexity."""
    distinct_1: np.ndarray
    """(R,) different tokens as a share of the tokens."""
    distinct_2: np.ndarray
    """(R,) the same of pairs of neighbours."""

    @classmethod
    def joined(cls, parts: Sequence[Readings]) -> Readings:
        """Readings of batches, one after the other."""
        return cls(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Judge:
    """A teacher and its SAE.

    Args:
        teacher: frozen.
        tokenizer: the teacher's, a fast one; text is encoded with it, whatever tokens it was written in.
        sae: over the residual stream after block `layer`.
        layer: 0-based.
        watched: the concepts that are looked at.
        beginning: tokens that the teacher reads before each text.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sae: SparseAutoencoder,
        layer: int,
        watched: Sequence[int],
        beginning: Sequence[int] = (),
    ) -> None:
        self.teacher, self.tokenizer, self.sae, self.layer = teacher, tokenizer, sae, layer
        self.watched = torch.tensor(watched, device=teacher.device)
        self.beginning = list(beginning)
        self.context = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)

    def __call__(self, prompts: Sequence[str], continuations: Sequence[str]) -> Readings:
        """Read each prompt with its continuation, all in one batch; what exceeds the context is cut off in front."""
        ids, mask, judged = (each.to(self.teacher.device) for each in self._encode(prompts, continuations))
        residual, logits = read_text(self.teacher, ids, self.layer, mask)
        latents = self.sae.encode(residual)
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        tokens = judged.sum(-1)
        of_text = [row[where].tolist() for row, where in zip(ids.cpu(), judged.cpu(), strict=True)]
        activation, active = mean_activations(latents, judged, self.sae.d_sae)
        return Readings(
            activation=activation[:, self.watched].cpu().numpy(),
            active=active[:, self.watched].cpu().numpy(),
            nll=((losses.view_as(ids[:, 1:]) * judged[:, 1:]).sum(-1) / tokens).cpu().numpy(),
            distinct_1=np.array([distinct(each, 1) for each in of_text]),
            distinct_2=np.array([distinct(each, 2) for each in of_text]),
        )

    def _encode(self, prompts: Sequence[str], continuations: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """(R, T) tokens, padded on the right, their mask, and the tokens that end in the continuation."""
        texts = [prompt + rest for prompt, rest in zip(prompts, continuations, strict=True)]
        rows, judged = [], []
        for text, prompt in zip(encode_with_ends(self.tokenizer, texts), prompts, strict=True):
            room = None if self.context is None else -(self.context - len(self.beginning))
            rows.append(torch.tensor(self.beginning + text.ids.tolist()[room:]))
            inside = (text.ends > len(prompt)).tolist()[room:]
            judged.append(torch.tensor([False] * len(self.beginning) + inside))
            judged[-1][0] = False  # nothing predicts the first token
            assert judged[-1].any(), "a continuation of two tokens or more, or one after a prompt"
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        ids, where = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (rows, judged))
        return ids, mask, where


def mean_activations(latents: Latents, judged: Tensor, concepts: int) -> tuple[Tensor, Tensor]:
    """Mean activation and share of active tokens of each concept, (R, C) float32.

    Args:
        latents: of texts, (R, T, k).
        judged: (R, T) bool, the tokens that count; one or more of each text.
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
    """distinct-n (Li et al., 2016): different n-grams as a share of the n-grams; 1 of a text too short to have any."""
    grams = list(zip(*(tokens[start:] for start in range(n)), strict=False))
    return len(set(grams)) / len(grams) if grams else 1.0
