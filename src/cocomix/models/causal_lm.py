"""CoCoMix: a decoder that predicts concepts in mid-depth and continues from its own prediction (arXiv 2502.08524).

    tokens ─► lower blocks ─► mixer (predict C concepts, keep K, compress) ─► upper blocks ─► next token
      (B, T)        h (B, T, D)                           (B, slots·T, D)        h (B, T, D)      (B, T, V)

What is special about it:

- Both halves are ordinary Hugging Face decoders (`backbones.py`), so attention kernels, gradient checkpointing and
  sharding of the backbone work.
- The mixer (`mixer.py`) predicts C concepts from h, compresses the K strongest into a vector c, and inserts c after
  each token (`mixing="interleave"`, 2 slots per token above) or adds it to h (`mixing="add"`, 1 slot).
- The next token is predicted from the last slot of each token.
- Masks and positions of the upper blocks count slots (`_slot_mask`, `_slot_positions`). One cache serves both halves
  and counts tokens (`cache.py`).
- Steering edits the concept logits before or after the K strongest are chosen (`steering.py`, `steerable.py`).
- Losses need neither (B, T, V) nor (B, T, C) in memory (`linear_loss.py`).
- `from_backbone` starts from a pretrained decoder without changing its predictions (`retrofit.py`).

Dimensions: B sequences, T tokens, D width, C concepts, K concepts mixed per token, A labels per token, V vocabulary,
d teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import has_windows, pair_mask, split_decoder, widen_windows
from .configuration import CoCoMixConfig
from .divergence import TeacherTokens
from .experts import idle_weights
from .linear_loss import distilled_token_loss
from .losses import IGNORE, Gate, concept_loss, hidden_state_loss, mean_loss
from .mixer import MIXERS, MixedWithLoss, Mixer
from .retrofit import Retrofit
from .stacked import StackedForCausalLM, StackInputs, adds_to_signature, recorded
from .steerable import Steerable


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


class CoCoMixForCausalLM(Retrofit, Steerable, StackedForCausalLM):
    """A causal language model with continuous concept mixing."""

    config_class = CoCoMixConfig
    bottom = "lower"

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        if config.slot_attention == "pair" and has_windows(config.backbone_config):
            raise ValueError(
                f"slot_attention is 'pair', whose mask supports no sliding window, and the backbone "
                f"{config.backbone_config.model_type!r} has one; use slot_attention 'causal' or mixing 'add'"
            )
        self.lower, self.upper = split_decoder(self._decoder(config), config.insert_layer)
        widen_windows(self.upper, config.slots_per_token)
        self.mixer = MIXERS[config.content](config)
        self._add_head()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Mixer):
            module.reset_parameters(std=getattr(self.config.backbone_config, "initializer_range", 0.02))

    def num_activated_parameters(self) -> int:
        """Count the weights that one token uses: all but the C − K other compress rows and its idle experts."""
        unused = idle_weights(self, self.config)
        if self.config.mixes_concepts:
            unused += (self.config.num_concepts - self.config.num_active_concepts) * self.config.hidden_size
        return self.num_parameters() - unused

    @can_return_tuple
    @adds_to_signature(StackedForCausalLM.prepare_inputs)
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
            args: arguments of `StackedForCausalLM.prepare_inputs`: `input_ids`, `attention_mask`, `labels`, …
            concept_ids: (B, T, A) concept labels, −100 for none. Unless `output_concepts` is set, (B, T, C) is never
                materialized.
            concept_weights: (B, T, A) relative weights > 0 of the labels in the concept loss; by default equal.
            teacher_hidden_states: (B, T, d) targets of predicted hidden states; padding is ignored.
            teacher_tokens: distributions of a teacher at tokens (B, T), to learn in addition to `labels`.
            gate: the teacher's losses at tokens (B, T): weighs the concept loss and the divergence of each token by how
                much better than this model the teacher predicts the next one (`gate_weights`); needs `labels`.
            steering: {concept: strength} to add to concept logits before the choice, a `Steering`, or a list with one
                of either, or None, for each row.
            output_concepts: return the concept logits, (B, T, C).
            num_concept_items_in_batch: number of tokens with a concept label in the full batch. By default
                `num_items_in_batch`, so that the loss of a batch does not depend on how it is split; without that,
                their number here.
            num_hidden_in_batch: number of tokens with a hidden state in the full batch, with the same defaults.
            kwargs: arguments of `StackedForCausalLM.prepare_inputs`.

        Raises:
            TypeError: as `StackedForCausalLM.prepare_inputs`.
            ValueError: the same; targets of something that this model does not predict; steering that does not fit
                this model or comes with `concept_ids`.
        """
        config, slots = self.config, self.config.slots_per_token
        self._check_content("concepts", concept_ids=concept_ids, output_concepts=output_concepts or None)
        self._check_content("hidden_states", teacher_hidden_states=teacher_hidden_states)
        inputs = self.prepare_inputs(*args, **kwargs)
        steered = self._steered_batch(steering, inputs.position_ids, len(inputs.embeds))
        if steered is not None and concept_ids is not None:
            raise ValueError("concept_ids score what the model itself predicts; leave out steering or them")

        lower = self.lower(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            past_key_values=inputs.lower_cache,
            use_cache=inputs.use_cache,
            **inputs.record,
        )  # last_hidden_state (B, T, D)
        targets = None if output_concepts else concept_ids
        mixed = self.mixer(lower.last_hidden_state, targets, steered, concept_weights, defers_loss=gate is not None)
        predicted: Any = None if isinstance(mixed, MixedWithLoss) else mixed.predicted  # (B, T, C) or (B, T, d)
        upper = self.upper(
            inputs_embeds=mixed.hidden_states,
            attention_mask=self._slot_mask(mixed.hidden_states, inputs),
            position_ids=self._slot_positions(inputs.position_ids, config.slot_positions),
            past_key_values=inputs.upper_cache,
            use_cache=inputs.use_cache,
            **inputs.record,
        )  # last_hidden_state (B, slots·T, D)
        h = upper.last_hidden_state[:, slots - 1 :: slots]  # (B, T, D), the last slot of each token

        logits = self._logits(h, inputs)
        concept = hidden = found = None
        if teacher_tokens is None and gate is None:
            distilled = token = self._token_loss(h, logits, inputs)
        elif inputs.labels is None:
            name = "gate" if teacher_tokens is None else "teacher_tokens"
            raise ValueError(f"{name} was given without labels, whose loss it needs; give both")
        else:
            found = distilled_token_loss(self.lm_head, h, inputs.labels, teacher_tokens, inputs.num_items, gate)
            token = found.token_loss
            distilled = token if teacher_tokens is None else token + teacher_tokens.weight * found.kd_loss
        token_weights = None if found is None else found.token_weights
        if concept_ids is not None:
            if not isinstance(mixed, MixedWithLoss):
                total = concept_loss(predicted, concept_ids, 1, concept_weights, token_weights)
            elif mixed.concept_loss is not None:
                total = mixed.concept_loss
            else:
                total = self.mixer.concept_loss(lower.last_hidden_state, concept_ids, concept_weights, token_weights)
            items = inputs.num_items if num_concept_items_in_batch is None else num_concept_items_in_batch
            concept = mean_loss(total, (concept_ids != IGNORE).any(-1), items)
        if teacher_hidden_states is not None:
            items = inputs.num_items if num_hidden_in_batch is None else num_hidden_in_batch
            mask = inputs.attention_mask
            is_token = None if mask is None else mask[:, -h.shape[1] :].bool()
            hidden = hidden_state_loss(predicted, teacher_hidden_states, config.regression_loss, items, is_token)
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
            **recorded((lower, upper)),
        )

    def _check_content(self, content: str, **arguments: object) -> None:
        """Raise ValueError if an argument is given that needs another `content` than this model has."""
        for name, value in arguments.items():
            if value is not None and self.config.content != content:
                raise ValueError(f"{name} was given, but this model mixes in {self.config.content}; leave it out")

    def _total_loss(self, token: Tensor | None, prediction: Tensor | None) -> Tensor | None:
        """Token loss + λ · prediction loss, of those that are given."""
        if prediction is None:
            return token
        weighted = self.config.concept_loss_weight * prediction
        return weighted if token is None else token + weighted.to(token.device)

    def _stacks(self) -> tuple[PretrainedConfig, PretrainedConfig, int]:
        return self.lower.config, self.upper.config, self.config.slots_per_token

    def _slot_positions(self, position_ids: Tensor, kind: str) -> Tensor:
        """(B, T) positions of tokens to (B, slots·T) positions in the upper stack, `interleaved` or `repeat`."""
        slots = self.config.slots_per_token
        if slots == 1 or kind == "repeat":
            return position_ids.repeat_interleave(slots, dim=-1)
        return torch.stack([slots * position_ids + slot for slot in range(slots)], dim=-1).flatten(-2)

    def _slot_mask(self, slots_in: Tensor, inputs: StackInputs) -> Any:
        """Attention mask of the upper stack for its input (B, slots·T, D), in a form that it takes; None for causal."""
        mask, slots, kernel = inputs.attention_mask, self.config.slots_per_token, self.upper.config._attn_implementation
        if slots == 1:
            return mask
        if self.config.slot_attention == "pair":
            if kernel not in ("sdpa", "eager"):
                raise ValueError(
                    f"slot_attention is 'pair', whose mask the attention implementation {kernel!r} does not take; "
                    "use sdpa or eager, or slot_attention 'causal'"
                )
            return pair_mask(mask, slots_in, slots, inputs.past, inputs.texts, inputs.max_tokens)
        if self.config.slot_positions == "repeat" and "flash" in kernel:
            raise ValueError(
                f"slot_positions is 'repeat', which the attention implementation {kernel!r} reads as several texts; "
                "use sdpa, eager or flex_attention"
            )
        if mask is not None:
            return mask.repeat_interleave(slots, dim=-1)  # (B, slots·(past + T))
        if self.config.slot_positions != "repeat" or inputs.cache is not None:
            return None
        # Without an explicit mask, Transformers would take repeated positions for boundaries of packed texts.
        if inputs.texts is not None:
            boundaries = self._slot_positions(inputs.position_ids, "interleaved")
            return create_masks_for_generate(self.upper.config, slots_in, None, None, position_ids=boundaries)
        return slots_in.new_ones(slots_in.shape[:2], dtype=torch.long)


CoCoMixConfig.register_for_auto_class()
CoCoMixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
