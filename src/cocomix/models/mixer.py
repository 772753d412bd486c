"""The mixer: predict concepts from the hidden state, keep the strongest, compress them, mix them in.

B sequences, T tokens, D width, C concepts, K concepts mixed per token, d teacher width. Formulas: DESIGN section 2,
"Student"; the published form is `content="concepts"`, `mixing="interleave"`, `concept_slot="concept"`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration import CoCoMixConfig
from .linear_loss import linear_loss
from .losses import at_least_float32
from .steering import SteeredBatch, steer_kept, steer_logits_

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
    dtype = weight.dtype
    if torch.is_grad_enabled() and weight.requires_grad:
        weight = at_least_float32(weight)  # the gradient of a row is a sum over many tokens
    mixed = F.embedding_bag(
        indices.reshape(-1, k), weight, per_sample_weights=values.reshape(-1, k).to(weight.dtype), mode="sum"
    )
    return mixed.to(dtype).view(*shape, -1)


def interleave(h: Tensor, slots: Tensor) -> Tensor:
    """(h_1, s_1, h_2, s_2, …): two (B, T, D) sequences as one (B, 2T, D)."""
    return torch.stack((h, slots), dim=2).flatten(1, 2)


class Kept(NamedTuple):
    """The concepts that are mixed in."""

    values: Tensor
    """(B, T, K) their logits, as steered."""
    indices: Tensor
    """(B, T, K) which they are."""


class Prediction(NamedTuple):
    """What a mixer predicts, and the vector that it makes of it."""

    predicted: Tensor | None
    """Concept logits z (B, T, C), steered where that is before the choice, or hidden states of the teacher (B, T, d);
    None where nothing is predicted."""
    c: Tensor | None
    """(B, T, D) the continuous vector; None with mixing `none`."""
    kept: Kept | None = None
    """The concepts in c; None where c is made of something else."""


class MixerOutput(NamedTuple):
    """What the mixer hands to the upper blocks and to the loss of its prediction."""

    hidden_states: Tensor
    """(B, slots·T, D), input of the upper blocks."""
    predicted: Tensor | None
    """As in `Prediction`."""
    c: Tensor | None
    """The same."""
    kept: Kept | None
    """The same."""


class MixedWithLoss(NamedTuple):
    """The same, with the loss of the prediction in its place."""

    hidden_states: Tensor
    """(B, slots·T, D), input of the upper blocks."""
    concept_loss: Tensor
    """Sum over labelled tokens of the loss of their prediction, nats."""


class Mixer(nn.Module):
    """Where and how a vector c enters the hidden states; what c is, the subclasses say."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__()
        self.mixing = config.mixing
        self.concept_slot = config.concept_slot

    def reset_parameters(self, std: float) -> None:
        """Weights N(0, std²), biases 0."""
        # What predicts is drawn first: the order decides what a seed stands for.
        for name, parameter in sorted(self.named_parameters(), key=lambda item: not item[0].startswith("predict")):
            if "bias" in name:
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def predict_and_compress(self, h: Tensor, of_h: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """What is predicted from h (B, T, D), and c; steered only where concepts are mixed in."""
        raise NotImplementedError

    def loss_and_compress(self, h: Tensor, of_h: Moments, concept_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """The summed loss of the prediction on labels (B, T, A), and c, of a mixer that predicts concepts."""
        raise NotImplementedError

    def forward(
        self, h: Tensor, concept_ids: Tensor | None = None, steered: SteeredBatch | None = None
    ) -> MixerOutput | MixedWithLoss:
        """Mix into h (B, T, D) what is predicted from it, as steered.

        With concept_ids (B, T, A) the prediction is not returned but its loss, and (B, T, C) never lives whole.
        """
        of_h = moments(h)
        if concept_ids is not None:
            concept_loss, c = self.loss_and_compress(h, of_h, concept_ids)
            return MixedWithLoss(h if c is None else self._mix(h, c, of_h), concept_loss)
        prediction = self.predict_and_compress(h, of_h, steered)
        return MixerOutput(h if prediction.c is None else self._mix(h, prediction.c, of_h), *prediction)

    def _mix(self, h: Tensor, c: Tensor, of_h: Moments) -> Tensor:
        residual = self.concept_slot == "residual"
        if self.mixing == "add":
            return h + (c - of_h.mean if residual else c)
        return interleave(h, c + h - of_h.mean if residual else c)


class ConceptMixer(Mixer):
    """Predicts concepts and mixes them back into the hidden states.

    `predict` is W_pred, b_pred; `compress_weight` holds W_comp with one row per concept;
    `pre_bias` is subtracted before the prediction and added back after the compression.
    """

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.num_active_concepts = config.num_active_concepts
        self.pre_bias = nn.Parameter(torch.zeros(width))
        self.predict = nn.Linear(width, config.num_concepts)
        if self.mixing != "none":
            self.compress_weight = nn.Parameter(torch.empty(config.num_concepts, width))
            self.compress_bias = nn.Parameter(torch.zeros(width))

    def predict_and_compress(self, h: Tensor, of_h: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """z (B, T, C), and c of its K largest."""
        z = self.predict(self._normalised(h, of_h))
        if self.mixing == "none":
            return Prediction(z, None)
        if steered is not None:
            steer_logits_(z, steered)
        values, indices = z.topk(self.num_active_concepts, dim=-1)
        if steered is not None:
            values = steer_kept(values, indices, steered)
        return Prediction(z, self._compressed(values, indices, of_h), Kept(values, indices))

    def loss_and_compress(self, h: Tensor, of_h: Moments, concept_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Loss and c, as from z (B, T, C) and `concept_loss`."""
        shape = h.shape[:-1]
        found = linear_loss(
            self.predict,
            self._normalised(h, of_h).flatten(0, -2),
            concept_ids.flatten(0, -2).to(h.device, torch.long),
            keep=0 if self.mixing == "none" else self.num_active_concepts,
        )
        if self.mixing == "none":
            return found.total, None
        return found.total, self._compressed(found.values.view(*shape, -1), found.indices.view(*shape, -1), of_h)

    def _normalised(self, h: Tensor, of_h: Moments) -> Tensor:
        """n, what concepts are predicted from."""
        return (h - of_h.mean) / (of_h.std + EPSILON) - self.pre_bias

    def _compressed(self, values: Tensor, indices: Tensor, of_h: Moments) -> Tensor:
        """c of kept logits and their concepts (B, T, K)."""
        mixed = compress(values, indices, self.compress_weight)
        return (mixed + self.compress_bias + self.pre_bias) * of_h.std + of_h.mean


class HiddenStateMixer(Mixer):
    """Predicts the teacher's hidden states with an MLP of two layers and mixes them in (paper, figure 6b)."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        width, of_teacher = config.hidden_size, config.teacher_hidden_size
        assert of_teacher is not None, "the configuration checks it"
        self.predict = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, of_teacher))
        if self.mixing != "none":
            self.compress = nn.Linear(of_teacher, width)

    def predict_and_compress(self, h: Tensor, of_h: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """The teacher's hidden states (B, T, d), and c."""
        predicted = self.predict((h - of_h.mean) / (of_h.std + EPSILON))
        if self.mixing == "none":
            return Prediction(predicted, None)
        return Prediction(predicted, self.compress(predicted) * of_h.std + of_h.mean)


class PauseMixer(Mixer):
    """One learned vector at every position: as much computation above, and nothing to say (Goyal et al., 2023)."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        self.vector = nn.Parameter(torch.zeros(config.hidden_size))

    def predict_and_compress(self, h: Tensor, of_h: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """No prediction, and the vector at every position."""
        return Prediction(None, self.vector.expand_as(h))


MIXERS: dict[str, type[Mixer]] = {
    "concepts": ConceptMixer,
    "hidden_states": HiddenStateMixer,
    "pause": PauseMixer,
}
