"""CoCoMix as a causal language model: a token head on `CoCoMixModel`, and the losses.

    tokens ─► CoCoMixModel ─► token head ─► next token
      (B, T)       h (B, T, D)         (B, T, V)

Losses need neither (B, T, V) nor (B, T, C) in memory (`linear_loss.py`). `from_backbone` starts from a pretrained
decoder without changing its predictions (`retrofit.py`).

Dimensions: B sequences, T tokens, D width, C concepts, K concepts mixed per token, A labels per token, V vocabulary,
d teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.utils import ModelOutput, can_return_tuple

from .base_model import CoCoMixModel
from .configuration import CoCoMixConfig
from .divergence import TeacherTokens
from .experts import idle_weights
from .losses import IGNORE, Gate, concept_loss, hidden_state_loss, mean_loss
from .mixer import MixedWithLoss
from .next_token_loss import distilled_token_loss
from .retrofit import Retrofit
from .stacked import adds_to_signature
from .token_head import StackedForCausalLM


@dataclass
class CoCoMixOutput(ModelOutput):
    """Output of `CoCoMixForCausalLM`."""

    loss: Tensor | None = None
    """token_loss + concept_loss_weight · (concept_loss or hidden_loss) + weight of the teacher · kd_loss, of the losses
    whose targets are given."""
    logits: Tensor | None = None
    """(B, T, V) next-token logits, or of fewer positions with `logits_to_keep`."""
    past_key_values: Cache | None = None
    """Cache of both halves, whose length is in tokens."""
    token_loss: Tensor | None = None
    """Mean next-token cross-entropy in nats, with `labels`. With `teacher_tokens`, it has the gradient of token_loss +
    weight · kd_loss."""
    kd_loss: Tensor | None = None
    """Mean divergence from the teacher in nats, weighted by the gate only and without a gradient, with
    `teacher_tokens`."""
    concept_loss: Tensor | None = None
    """Concept cross-entropy in nats, weighted by the gate only, with `concept_ids`."""
    mean_gate: Tensor | None = None
    """Mean weight of the tokens, with `gate`."""
    hidden_loss: Tensor | None = None
    """Distance to the teacher's hidden states, unweighted, with `teacher_hidden_states`."""
    concept_logits: Tensor | None = None
    """(B, T, C) predicted concepts, with `output_concepts=True`, including steering before the choice."""
    hidden_states: tuple[Tensor, ...] | None = None
    """With `output_hidden_states=True`: embeddings and the output of each block below the mixer, (B, T, D), then the
    output of the mixer and of each block above it, (B, slots·T, D), the last one after the final norm."""
    attentions: tuple[Tensor, ...] | None = None
    """Attention weights of each block, over T positions below the mixer and slots·T above, with
    `output_attentions=True`."""
    last_hidden_state: Tensor | None = None
    """(B, T, D), after the final norm, with the logits."""


class CoCoMixForCausalLM(Retrofit, CoCoMixModel, StackedForCausalLM):
    """A causal language model with continuous concept mixing."""

    def num_activated_parameters(self) -> int:
        """Count the weights that one token uses: all but the C − K other compress rows and its idle experts."""
        unused = idle_weights(self, self.config)
        if self.config.mixes_concepts:
            unused += (self.config.num_concepts - self.config.num_active_concepts) * self.config.hidden_size
        return self.num_parameters() - unused

    @can_return_tuple
    @adds_to_signature(StackedForCausalLM.prepare)
    def forward(
        self,
        *args: Any,
        concept_ids: Tensor | None = None,
        concept_weights: Tensor | None = None,
        teacher_hidden_states: Tensor | None = None,
        teacher_tokens: TeacherTokens | None = None,
        gate: Gate | None = None,
        steering: Any = None,
        output_concepts: bool = False,
        num_concept_items_in_batch: Tensor | int | None = None,
        num_hidden_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CoCoMixOutput:
        """Predict the next token and the mixer's content; compute the losses whose targets are given.

        Args:
            args: arguments of `StackedForCausalLM.prepare`: `input_ids`, `attention_mask`, `labels`, …
            concept_ids: (B, T, A) concept labels, −100 for none. Unless `output_concepts` is set, (B, T, C) is never
                materialized.
            concept_weights: (B, T, A) relative weights > 0 of the labels in the concept loss; by default equal.
            teacher_hidden_states: (B, T, d) targets of predicted hidden states; padding is ignored.
            teacher_tokens: distributions of a teacher at tokens (B, T), to learn in addition to `labels`.
            gate: the teacher's losses at tokens (B, T): weights the concept loss and the divergence of each token by
                how much better than this model the teacher predicts the next one (`gate_weights`); needs `labels`.
            steering: {concept: strength} to add to concept logits before the choice, a `Steering`, or a list with one
                of either, or None, for each row.
            output_concepts: return the concept logits, (B, T, C).
            num_concept_items_in_batch: number of tokens with a concept label in the full batch. By default
                `num_items_in_batch`, so that the loss of a batch does not depend on how it is split; without that,
                their number here.
            num_hidden_in_batch: number of tokens with a hidden state in the full batch, with the same defaults.
            kwargs: arguments of `StackedForCausalLM.prepare`.

        Raises:
            TypeError: as `StackedForCausalLM.prepare`.
            ValueError: the same; targets of something that this model does not predict; steering that does not fit
                this model or comes with `concept_ids`.
        """
        self._check_content("concepts", concept_ids=concept_ids, output_concepts=output_concepts or None)
        self._check_content("hidden_states", teacher_hidden_states=teacher_hidden_states)
        if steering is not None and concept_ids is not None:
            raise ValueError("concept_ids score what the model itself predicts; leave out steering or them")
        inputs, head = self.prepare(*args, **kwargs)
        targets = None if output_concepts else concept_ids
        read = self._read(inputs, steering, targets, concept_weights, defers_loss=gate is not None)
        h, mixed = read.h, read.mixed
        predicted: Any = None if isinstance(mixed, MixedWithLoss) else mixed.predicted  # (B, T, C) or (B, T, d)

        logits = self._logits(h, head)
        concept = hidden = found = None
        if teacher_tokens is None and gate is None:
            distilled = token = self._token_loss(h, logits, head)
        elif head.labels is None:
            name = "gate" if teacher_tokens is None else "teacher_tokens"
            raise ValueError(f"{name} was given without labels, whose loss it needs; give both")
        else:
            found = distilled_token_loss(self.lm_head, h, head.labels, teacher_tokens, head.num_items, gate)
            token = found.token_loss
            distilled = token if teacher_tokens is None else token + teacher_tokens.weight * found.kd_loss
        token_weights = None if found is None else found.token_weights
        if concept_ids is not None:
            if not isinstance(mixed, MixedWithLoss):
                total = concept_loss(predicted, concept_ids, 1, concept_weights, token_weights)
            elif mixed.concept_loss is not None:
                total = mixed.concept_loss
            else:
                total = self.mixer.concept_loss(read.below, concept_ids, concept_weights, token_weights)
            items = head.num_items if num_concept_items_in_batch is None else num_concept_items_in_batch
            concept = mean_loss(total, (concept_ids != IGNORE).any(-1), items)
        if teacher_hidden_states is not None:
            items = head.num_items if num_hidden_in_batch is None else num_hidden_in_batch
            mask, kind = inputs.attention_mask, self.config.regression_loss
            is_token = None if mask is None else mask[:, -h.shape[1] :].bool()
            hidden = hidden_state_loss(predicted, teacher_hidden_states, kind, items, is_token)
        return CoCoMixOutput(
            loss=self._total_loss(distilled, concept if hidden is None else hidden),
            token_loss=token,
            kd_loss=None if found is None or teacher_tokens is None else found.kd_loss,
            mean_gate=None if found is None else found.mean_gate,
            concept_loss=concept,
            hidden_loss=hidden,
            logits=logits,
            concept_logits=predicted if output_concepts else None,
            past_key_values=inputs.cache if inputs.use_cache else None,
            last_hidden_state=h if head.output_logits else None,
            **read.recorded,
        )

    def _total_loss(self, token: Tensor | None, prediction: Tensor | None) -> Tensor | None:
        """Token loss + λ · prediction loss, of those that are given."""
        if prediction is None:
            return token
        weighted = self.config.concept_loss_weight * prediction
        return weighted if token is None else token + weighted.to(token.device)


CoCoMixConfig.register_for_auto_class()
CoCoMixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
