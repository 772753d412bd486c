"""Select the concepts of each token among its active latents, by attribution or activation (arXiv 2502.08524, 2.1).

B sequences, T tokens, d teacher width, k active latents per token, A labels per token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common.errors import InputError
from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.teacher import check_teacher_layer, freeze, next_token_targets, residual_stream, tapped_residual
from cocomix.models.backbones import decoder_blocks
from cocomix.models.linear_loss import linear_cross_entropy
from cocomix.models.losses import IGNORE
from cocomix.models.plain import plain_head

SELECTIONS = ("attribution", "attribution_abs", "attribution_negative", "activation")
GATHER_BUFFER_BYTES = 128 * 2**20
"""Upper bound for the gathered decoder directions, (chunk, k, d)."""


class ConceptLabels(NamedTuple):
    """The concepts of each token, most influential first."""

    ids: Tensor
    """(B, T, A) latent ids, int64; −100 in slots without a label."""
    scores: Tensor
    """(B, T, A) the criterion by which they were selected; 0 in slots without a label. Attributions are in nats of
    the mean loss over the predicted tokens of the batch."""
    cut: Tensor
    """(B, T) bool, True where the SAE had more active latents than `max_active`."""
    activations: Tensor
    """(B, T, A) activations of the concepts; 0 in slots without a label."""


def attribution_scores(latents: Latents, gradient: Tensor, W_dec: Tensor) -> Tensor:
    """Return s_i = a_i · ⟨g, W_dec[i]⟩ for the k active latents of each token, (..., k).

    This is the linear estimate of what latent i added to the loss. `gradient` is (..., d) and W_dec is (d_sae, d).
    Only k rows of W_dec are gathered per token.
    """
    indices, g = latents.indices.flatten(0, -2), gradient.flatten(0, -2)
    chunk = max(1, GATHER_BUFFER_BYTES // (indices.shape[-1] * W_dec.shape[-1] * W_dec.element_size()))
    along = [
        torch.einsum("nkd,nd->nk", W_dec[ids], part)
        for ids, part in zip(indices.split(chunk), g.split(chunk), strict=True)
    ]
    return latents.values * torch.cat(along).view(latents.values.shape)


def select_labels(
    latents: Latents, attribution: Tensor, has_target: Tensor, labels_per_token: int, selection: str
) -> ConceptLabels:
    """Select the A active latents with the largest criterion.

    Args:
        latents: (B, T, k); a latent is active where its value is above 0.
        attribution: (B, T, k) scores s; ignored by `activation`.
        has_target: (B, T) bool; tokens without a target have no gradient and get no label.
        labels_per_token: A.
        selection: `attribution` (largest s, as published: concepts whose increase raises the loss),
            `attribution_negative` (smallest s), `attribution_abs` (largest |s|), `activation` (largest a).
    """
    criterion = {
        "attribution": attribution,
        "attribution_negative": -attribution,
        "attribution_abs": attribution.abs(),
        "activation": latents.values,
    }[selection]
    eligible = (latents.values > 0) & has_target.unsqueeze(-1)
    kept = criterion.masked_fill(~eligible, -torch.inf).topk(min(labels_per_token, criterion.shape[-1]), dim=-1)
    found = kept.values > -torch.inf
    ids = latents.indices.gather(-1, kept.indices).masked_fill(~found, IGNORE)
    scores = kept.values.masked_fill(~found, 0.0)
    activations = latents.values.gather(-1, kept.indices).masked_fill(~found, 0.0)
    missing = (0, labels_per_token - ids.shape[-1])
    cut = torch.zeros_like(has_target) if latents.cut is None else latents.cut
    return ConceptLabels(F.pad(ids, missing, value=IGNORE), F.pad(scores, missing), cut, F.pad(activations, missing))


def check_tap(teacher: PreTrainedModel, teacher_layer: int, sae: SparseAutoencoder | None) -> None:
    """Raise InputError unless `sae` can read this teacher's residual stream after block `teacher_layer`.

    If `sae` is None (it is yet to be trained), only the teacher is checked. No weights are read.
    """
    try:
        check_teacher_layer(teacher_layer, len(decoder_blocks(teacher)))
    except InputError:
        raise
    except ValueError as error:  # not a supported decoder
        raise InputError(f"this teacher cannot be tapped: {error}") from None
    if sae is None:
        return
    width = teacher.config.get_text_config().hidden_size
    if sae.d_in != width:
        raise InputError(
            f"the SAE reads activations of width {sae.d_in}, but the teacher's width is {width}; use an SAE of this "
            "teacher"
        )
    if sae.teacher_layer not in (None, teacher_layer):
        raise InputError(
            f"teacher_layer is {teacher_layer}, but according to its configuration the SAE was trained on block "
            f"{sae.teacher_layer}; set teacher_layer to {sae.teacher_layer}"
        )


class ConceptExtractor:
    """Label text with the concepts that a teacher uses (arXiv 2502.08524, section 2).

    Args:
        teacher: any Hugging Face causal language model; it is frozen.
        sae: sparse autoencoder of its residual stream.
        teacher_layer: 0-based block after which the SAE reads.
        labels_per_token: A ≥ 1.
        selection: one of `SELECTIONS`. The paper uses attribution.
        compiled: compile the SAE's encoder and the teacher's loss; `compile_blocks` compiles the rest of the teacher.

    Raises:
        InputError: the layer does not exist, the SAE's width differs from the teacher's, or a setting is invalid.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        sae: SparseAutoencoder,
        teacher_layer: int,
        labels_per_token: int = 4,
        selection: str = "attribution",
        compiled: bool = False,
    ) -> None:
        check_tap(teacher, teacher_layer, sae)
        if selection not in SELECTIONS:
            raise InputError(f"selection is {selection!r}; expected one of {', '.join(SELECTIONS)}")
        if labels_per_token < 1:
            raise InputError(f"labels_per_token is {labels_per_token}; expected 1 or more")
        self.teacher = freeze(teacher)
        self.head = plain_head(teacher)
        self.sae = sae.to(teacher.device)
        self.cross_entropy = torch.compile(linear_cross_entropy) if compiled else linear_cross_entropy
        if compiled:
            self.sae.compile_encoder()
        self.teacher_layer = teacher_layer
        self.labels_per_token = labels_per_token
        self.selection = selection

    def __repr__(self) -> str:
        teacher = f"{type(self.teacher).__name__}, teacher_layer={self.teacher_layer}"
        chosen = f"labels_per_token={self.labels_per_token}, selection={self.selection!r}"
        return f"ConceptExtractor({teacher}, {self.sae}, {chosen})"

    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ConceptLabels:
        """Label input_ids (B, T). Padding, where attention_mask (B, T) is 0, gets no labels."""
        with torch.autocast(input_ids.device.type, enabled=False):  # the same labels inside a training step
            if self.selection == "activation":
                return self._most_active(input_ids, attention_mask)
            tapped = tapped_residual(
                self.teacher, input_ids, self.teacher_layer, attention_mask, self.head, self.cross_entropy
            )
            latents = self.sae.encode(tapped.residual)
            # Selected by the gradient of the summed loss, so that labels do not depend on the rest of the batch.
            scores = attribution_scores(latents, tapped.gradient.to(self.sae.W_dec.dtype), self.sae.W_dec)
        labels = select_labels(latents, scores, tapped.has_target, self.labels_per_token, self.selection)
        return labels._replace(scores=labels.scores / tapped.has_target.sum().clamp(min=1))

    @torch.no_grad()
    def _most_active(self, input_ids: Tensor, attention_mask: Tensor | None) -> ConceptLabels:
        """Label by activation: the blocks above the tap do not run, and there is no backward pass."""
        latents = self.sae.encode(residual_stream(self.teacher, input_ids, self.teacher_layer, attention_mask))
        has_target = next_token_targets(input_ids, attention_mask) != IGNORE
        return select_labels(latents, latents.values, has_target, self.labels_per_token, self.selection)
