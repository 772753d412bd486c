"""The concept mixer: predict concepts from the hidden state, keep the strongest, compress them, mix them in.

B sequences, T tokens, D width, C concepts, K concepts mixed per token. Formulas: DESIGN section 2,
"Student"; the published form is `mixing="interleave"`, `concept_slot="concept"`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration import CoCoMixConfig

EPSILON = 1e-5
"""Added to the standard deviation where the hidden state is divided by it."""


class Moments(NamedTuple):
    """Mean and unbiased standard deviation of a hidden state over its width, each (B, T, 1)."""

    mean: Tensor
    std: Tensor


def moments(h: Tensor) -> Moments:
    """Moments of h (..., D) over its last dimension."""
    return Moments(mean=h.mean(-1, keepdim=True), std=h.std(-1, keepdim=True))


def compress(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Σ over the kept concepts of value · row of `weight`: K rows are read per token, never all C.

    Args:
        values: (B, T, K) kept concept logits.
        indices: (B, T, K) their concepts.
        weight: (C, D).

    Returns:
        (B, T, D)
    """
    *shape, k = indices.shape
    mixed = F.embedding_bag(
        indices.reshape(-1, k), weight, per_sample_weights=values.reshape(-1, k).to(weight.dtype), mode="sum"
    )
    return mixed.view(*shape, -1)


def interleave(h: Tensor, slots: Tensor) -> Tensor:
    """(h_1, s_1, h_2, s_2, …): two (B, T, D) sequences as one (B, 2T, D)."""
    return torch.stack((h, slots), dim=2).flatten(1, 2)


class MixerOutput(NamedTuple):
    """What the mixer hands to the upper blocks and to the concept loss."""

    hidden_states: Tensor
    """(B, slots·T, D), input of the upper blocks."""
    concept_logits: Tensor
    """z, (B, T, C)."""


class ConceptMixer(nn.Module):
    """Predicts concepts and mixes them back into the hidden states.

    `predict` is W_pred, b_pred; `compress_weight` holds W_comp with one row per concept;
    `pre_bias` is subtracted before the prediction and added back after the compression.
    """

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.mixing = config.mixing
        self.concept_slot = config.concept_slot
        self.num_active_concepts = config.num_active_concepts
        self.pre_bias = nn.Parameter(torch.zeros(width))
        self.predict = nn.Linear(width, config.num_concepts)
        if self.mixing != "none":
            self.compress_weight = nn.Parameter(torch.empty(config.num_concepts, width))
            self.compress_bias = nn.Parameter(torch.zeros(width))

    def reset_parameters(self, std: float) -> None:
        """Published initialisation: weights N(0, std²), biases 0."""
        init.normal_(self.predict.weight, mean=0.0, std=std)
        for bias in (self.predict.bias, self.pre_bias):
            init.zeros_(bias)
        if self.mixing != "none":
            init.normal_(self.compress_weight, mean=0.0, std=std)
            init.zeros_(self.compress_bias)

    def forward(self, h: Tensor) -> MixerOutput:
        """Mix the concepts predicted from h (B, T, D) into it."""
        of_h = moments(h)
        z = self.predict((h - of_h.mean) / (of_h.std + EPSILON) - self.pre_bias)
        if self.mixing == "none":
            return MixerOutput(h, z)
        kept = z.topk(self.num_active_concepts, dim=-1)
        mixed = compress(kept.values, kept.indices, self.compress_weight)
        c = (mixed + self.compress_bias + self.pre_bias) * of_h.std + of_h.mean
        return MixerOutput(self._mix(h, c, of_h), z)

    def _mix(self, h: Tensor, c: Tensor, of_h: Moments) -> Tensor:
        if self.mixing == "add":
            return h + c
        return interleave(h, c if self.concept_slot == "concept" else c + h - of_h.mean)
