"""The mixer: predict concepts from the hidden state, keep the strongest, compress them, mix them in.

With h a token's hidden state, mean and std over its width, and n = (h − mean) / (std + ε) − b_pre:

    z = W_pred n + b_pred                                      concept logits
    c = (Σ over the K largest z_i of z_i · W_comp[i] + b_comp + b_pre) · std + mean

`concept_slot="concept"` mixes in c; `"residual"` mixes in c + h − mean (interleaved) or c − mean (added). The published
form (arXiv 2502.08524) is `content="concepts"`, `mixing="interleave"`, `concept_slot="concept"`.

Dimensions: B sequences, T tokens, D width, C concepts, K concepts mixed per token, A labels per token, d teacher width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .configuration import CoCoMixConfig
from .linear_loss import LinearLoss, linear_loss
from .losses import at_least_float32
from .steering import SteeredBatch, steer_active, steer_logits_

EPSILON = 1e-5
"""ε, added to the standard deviation that a hidden state is divided by."""


class Moments(NamedTuple):
    """Mean and unbiased standard deviation of a hidden state over its width, each (B, T, 1)."""

    mean: Tensor
    std: Tensor


def moments(h: Tensor) -> Moments:
    """Compute the moments of h (..., D) over its last dimension."""
    return Moments(mean=h.mean(-1, keepdim=True), std=h.std(-1, keepdim=True))


def compress(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """Sum value · row of `weight` over the active concepts, reading K rows per token instead of C.

    Where a gradient is needed, half precision is cast to float32: the gradient of a row is a sum over many tokens, and
    CUDA's kernel for the gradient of the values lacks bfloat16.

    Args:
        values: (B, T, K) logits of the active concepts.
        indices: (B, T, K) their ids.
        weight: (C, D).

    Returns:
        (B, T, D).
    """
    *shape, k = indices.shape
    dtype = weight.dtype
    if torch.is_grad_enabled() and (weight.requires_grad or values.requires_grad):
        weight = at_least_float32(weight)
    mixed = F.embedding_bag(
        indices.reshape(-1, k), weight, per_sample_weights=values.reshape(-1, k).to(weight.dtype), mode="sum"
    )
    return mixed.to(dtype).view(*shape, -1)


def interleave(h: Tensor, slots: Tensor) -> Tensor:
    """Interleave two (B, T, D) sequences to (B, 2T, D): h_1, s_1, h_2, s_2, …"""
    return torch.stack((h, slots), dim=2).flatten(1, 2)  # (B, T, 2, D) to (B, 2T, D)


class ActiveConcepts(NamedTuple):
    """The concepts that are mixed in."""

    values: Tensor
    """(B, T, K) logits, after steering."""
    indices: Tensor
    """(B, T, K) concept ids."""


class Prediction(NamedTuple):
    """What a mixer predicts, and the continuous vector that it computes."""

    predicted: Tensor | None
    """Concept logits z (B, T, C), including steering before the choice, or hidden states of the teacher (B, T, d);
    None if nothing is predicted."""
    c: Tensor | None
    """(B, T, D) continuous vector; None with mixing `none`."""
    active: ActiveConcepts | None = None
    """Concepts in c; None if c holds something else."""


class MixerOutput(NamedTuple):
    """Output of a mixer: the input of the upper blocks, and its `Prediction`."""

    hidden_states: Tensor
    """(B, slots·T, D) input of the upper blocks."""
    predicted: Tensor | None
    """As in `Prediction`."""
    c: Tensor | None
    """As in `Prediction`."""
    active: ActiveConcepts | None
    """As in `Prediction`."""


class MixedWithLoss(NamedTuple):
    """Output of a mixer that computes the loss of its prediction instead of returning the prediction."""

    hidden_states: Tensor
    """(B, slots·T, D) input of the upper blocks."""
    concept_loss: Tensor | None
    """Loss summed over labeled tokens, in nats; None if it is deferred."""


class Mixer(nn.Module):
    """Base of the mixers: where and how c enters the hidden states. Subclasses define c."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__()
        self.mixing = config.mixing
        self.concept_slot = config.concept_slot

    def reset_parameters(self, std: float) -> None:
        """Draw weights from N(0, std²) and set biases to 0."""
        # The predictor is drawn first: the order decides which weights a seed produces.
        for name, parameter in sorted(self.named_parameters(), key=lambda item: not item[0].startswith("predict")):
            if "bias" in name:
                init.zeros_(parameter)
            else:
                init.normal_(parameter, mean=0.0, std=std)

    def predict_and_compress(self, h: Tensor, stats: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """Predict from h (B, T, D) with its moments, and compute c. Only concept mixers can be steered."""
        raise NotImplementedError

    def loss_and_compress(
        self, h: Tensor, stats: Moments, concept_ids: Tensor | None, concept_weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the summed loss on labels (B, T, A) with weights (B, T, A), and c. Only for concept mixers."""
        raise NotImplementedError

    def concept_loss(
        self, h: Tensor, concept_ids: Tensor, concept_weights: Tensor | None, token_weights: Tensor | None
    ) -> Tensor:
        """Compute a deferred loss, with a weight for each token (B, T). Only for concept mixers."""
        raise NotImplementedError

    def forward(
        self,
        h: Tensor,
        concept_ids: Tensor | None = None,
        steered: SteeredBatch | None = None,
        concept_weights: Tensor | None = None,
        defers_loss: bool = False,
    ) -> MixerOutput | MixedWithLoss:
        """Mix into h (B, T, D) what is predicted from it.

        With concept_ids (B, T, A), and perhaps concept_weights (B, T, A), return the loss of the prediction, without
        materializing (B, T, C). Weights of tokens that depend on the blocks above the mixer are not known yet; then
        `defers_loss` leaves the loss to `concept_loss`, for one more product of h with the C concepts.
        """
        stats = moments(h)
        if concept_ids is not None:
            labels = None if defers_loss else concept_ids
            concept_loss, c = self.loss_and_compress(h, stats, labels, concept_weights)
            return MixedWithLoss(h if c is None else self._mix(h, c, stats), concept_loss)
        prediction = self.predict_and_compress(h, stats, steered)
        return MixerOutput(h if prediction.c is None else self._mix(h, prediction.c, stats), *prediction)

    def _mix(self, h: Tensor, c: Tensor, stats: Moments) -> Tensor:
        residual = self.concept_slot == "residual"
        if self.mixing == "add":
            return h + (c - stats.mean if residual else c)
        return interleave(h, c + h - stats.mean if residual else c)


class ConceptMixer(Mixer):
    """Predict concepts and mix them into the hidden states.

    `predict` holds W_pred and b_pred, `compress_weight` W_comp with one row per concept, `compress_bias` b_comp,
    `pre_bias` b_pre.
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

    def extra_repr(self) -> str:
        """Return the settings, which `print(model)` shows."""
        where = f"mixing={self.mixing}, concept_slot={self.concept_slot}"
        return f"num_concepts={self.predict.out_features}, num_active_concepts={self.num_active_concepts}, {where}"

    def predict_and_compress(self, h: Tensor, stats: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """Predict z (B, T, C), and compute c from its K largest entries."""
        z = self.predict(self._normalize(h, stats))
        if self.mixing == "none":
            return Prediction(z, None)
        if steered is not None:
            steer_logits_(z, steered)
        values, indices = z.topk(self.num_active_concepts, dim=-1)
        if steered is not None:
            values = steer_active(values, indices, steered)
        return Prediction(z, self._compress(values, indices, stats), ActiveConcepts(values, indices))

    def loss_and_compress(
        self, h: Tensor, stats: Moments, concept_ids: Tensor | None, concept_weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute `concept_loss` of z, None without labels, and c, without materializing z (B, T, C)."""
        keep, shape = 0 if self.mixing == "none" else self.num_active_concepts, h.shape[:-1]
        if concept_ids is None and keep == 0:
            return None, None
        found = self._linear_loss(h, stats, concept_ids, concept_weights, keep=keep)
        total = None if concept_ids is None else found.total
        if keep == 0:
            return total, None
        return total, self._compress(found.values.view(*shape, -1), found.indices.view(*shape, -1), stats)

    def concept_loss(
        self, h: Tensor, concept_ids: Tensor, concept_weights: Tensor | None, token_weights: Tensor | None
    ) -> Tensor:
        """Compute `concept_loss` of z, summed over tokens with their weights (B, T), without materializing z."""
        return self._linear_loss(h, moments(h), concept_ids, concept_weights, token_weights).total

    def _linear_loss(
        self,
        h: Tensor,
        stats: Moments,
        concept_ids: Tensor | None,
        concept_weights: Tensor | None,
        token_weights: Tensor | None = None,
        keep: int = 0,
    ) -> LinearLoss:
        return linear_loss(
            self.predict,
            self._normalize(h, stats).flatten(0, -2),
            None if concept_ids is None else concept_ids.flatten(0, -2).to(h.device, torch.long),
            keep=keep,
            weights=None if concept_weights is None else concept_weights.flatten(0, -2),
            row_weights=None if token_weights is None else token_weights.flatten().to(h.device),
        )

    def _normalize(self, h: Tensor, stats: Moments) -> Tensor:
        """n (B, T, D), which concepts are predicted from."""
        return (h - stats.mean) / (stats.std + EPSILON) - self.pre_bias

    def _compress(self, values: Tensor, indices: Tensor, stats: Moments) -> Tensor:
        """c (B, T, D) of the active concepts' logits and ids (B, T, K)."""
        mixed = compress(values, indices, self.compress_weight)
        return (mixed + self.compress_bias + self.pre_bias) * stats.std + stats.mean


class HiddenStateMixer(Mixer):
    """Predict the teacher's hidden states with a two-layer MLP and mix them in (arXiv 2502.08524, figure 6b)."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        width, teacher_width = config.hidden_size, config.teacher_hidden_size
        assert teacher_width is not None, "the configuration checks it"
        self.predict = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, teacher_width))
        if self.mixing != "none":
            self.compress = nn.Linear(teacher_width, width)

    def predict_and_compress(self, h: Tensor, stats: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """Predict the teacher's hidden states (B, T, d), and compute c from them."""
        predicted = self.predict((h - stats.mean) / (stats.std + EPSILON))
        if self.mixing == "none":
            return Prediction(predicted, None)
        return Prediction(predicted, self.compress(predicted) * stats.std + stats.mean)


class PauseMixer(Mixer):
    """Insert one learned vector at every position: equal computation without a prediction (Goyal et al., 2023)."""

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        self.vector = nn.Parameter(torch.zeros(config.hidden_size))

    def predict_and_compress(self, h: Tensor, stats: Moments, steered: SteeredBatch | None = None) -> Prediction:
        """Predict nothing; return the vector at every position."""
        return Prediction(None, self.vector.expand_as(h))


MIXERS: dict[str, type[Mixer]] = {
    "concepts": ConceptMixer,
    "hidden_states": HiddenStateMixer,
    "pause": PauseMixer,
}
