"""CoCoMix: a decoder that predicts concepts in mid-depth and goes on from its own prediction.

    tokens ─► lower blocks ─► mixer (predict C concepts, keep K, compress) ─► upper blocks ─► next token

Two ordinary Hugging Face decoders with the mixer between them: whatever the backbone brings (attention
kernels, gradient checkpointing, sharding) works here. One cache serves both halves (`cache.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import has_windows, pair_mask, split_decoder, widen_windows
from .cache import StackedCache
from .configuration import CoCoMixConfig
from .losses import IGNORE, concept_loss, hidden_state_loss, token_loss
from .mixer import MIXERS, MixedWithLoss, Mixer
from .retrofit import Retrofit
from .stacked import StackedForCausalLM
from .steerable import Steerable

IGNORED_ARGUMENTS = {"cache_position", "output_attentions", "output_hidden_states", "token_type_ids"}
"""Passed by callers that treat all Hugging Face decoders alike; without effect here."""


@dataclass
class CoCoMixOutput(ModelOutput):
    """What `CoCoMixForCausalLM` returns. B sequences, T tokens, V vocabulary, C concepts."""

    loss: Tensor | None = None
    """token_loss + concept_loss_weight · (concept_loss or hidden_loss), of those that were asked for."""
    logits: Tensor | None = None
    """(B, T, V) next-token logits, or fewer positions with `logits_to_keep`."""
    past_key_values: Cache | None = None
    """Cache of both halves, whose length is in tokens."""
    token_loss: Tensor | None = None
    """Mean next-token cross-entropy, nats; needs `labels`."""
    concept_loss: Tensor | None = None
    """Concept cross-entropy, nats, not weighted; needs `concept_ids`."""
    hidden_loss: Tensor | None = None
    """Distance to the teacher's hidden states, not weighted; needs `teacher_hidden_states`."""
    concept_logits: Tensor | None = None
    """(B, T, C) predicted concepts, with `output_concepts=True`; as steered, where that is before the choice."""


class CoCoMixForCausalLM(Retrofit, Steerable, StackedForCausalLM):
    """A causal language model with continuous concept mixing (arXiv 2502.08524)."""

    config_class = CoCoMixConfig
    bottom = "lower"

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        if config.slot_attention == "pair" and has_windows(config.backbone_config):
            raise ValueError(
                f"slot_attention is 'pair', whose mask knows no sliding window, and the backbone "
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
        """Weights that one token uses: all but the C − K compress rows that it does not read."""
        unused = 0
        if self.config.content == "concepts" and self.config.mixing != "none":
            unused = (self.config.num_concepts - self.config.num_active_concepts) * self.config.hidden_size
        return self.num_parameters() - unused

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        concept_ids: Tensor | None = None,
        teacher_hidden_states: Tensor | None = None,
        use_cache: bool | None = None,
        steering: Any = None,
        output_concepts: bool = False,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        num_labelled_in_batch: Tensor | int | None = None,
        num_hidden_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CoCoMixOutput:
        """Prediction of the next token and of the mixer's content, with their losses where targets are given.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds`, (B, T, D).
            attention_mask: (B, past + T), 0 at padding, on either side.
            position_ids: (B, T); by default counted over the tokens that the mask keeps.
            past_key_values: a dynamic cache; extended in place.
            labels: (B, T) token ids (they are shifted here), −100 for no target.
            concept_ids: (B, T, A) concept labels, −100 for none.
            teacher_hidden_states: (B, T, d) targets of predicted hidden states.
            use_cache: return a cache; by default outside training.
            steering: {concept: strength} to add to concept logits before the choice, a `Steering`, or a list with one
                of either, or None, for each row. By default what a `with model.steered(...)` around the call says.
            output_concepts: also return the concept logits, (B, T, C).
            output_logits: return the logits. Without them a loss costs less memory and time, as do concept labels
                without `output_concepts`: neither (B, T, V) nor (B, T, C) lives whole.
            logits_to_keep: as in Transformers: the last so many positions, or their indices; 0 for all.
            num_items_in_batch: number of token targets of the whole batch of which this is a part.
            num_labelled_in_batch: number of labelled tokens of that batch.
            num_hidden_in_batch: number of tokens with a hidden state of that batch.

        Raises:
            ValueError: a mask that is not 2-dimensional, a cache of fixed size, targets of something that is not
                predicted here, or steering that is not for this model or comes with concept labels.
            TypeError: an argument that no Hugging Face decoder knows.
        """
        if unknown := kwargs.keys() - IGNORED_ARGUMENTS:
            raise TypeError(f"forward() got unknown arguments: {', '.join(sorted(unknown))}")
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}; expected (batch, past + tokens)")
        self._check_asked("concepts", concept_ids=concept_ids, output_concepts=output_concepts or None)
        self._check_asked("hidden_states", teacher_hidden_states=teacher_hidden_states)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if use_cache is None:
            use_cache = not self.training and getattr(self.config.backbone_config, "use_cache", True)
        cache = None
        if use_cache or past_key_values is not None:
            cache = StackedCache.of(past_key_values, self.lower.config, self.upper.config, self.config.slots_per_token)
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, past)
        steered = self._steered_batch(steering, position_ids, len(inputs_embeds))
        if steered is not None and concept_ids is not None:
            raise ValueError("concept_ids score what the model itself predicts; leave out steering or them")

        h = self.lower(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=None if cache is None else cache.lower,
            use_cache=use_cache,
        ).last_hidden_state
        mixed = self.mixer(h, None if output_concepts else concept_ids, steered)
        predicted: Any = None if isinstance(mixed, MixedWithLoss) else mixed.predicted
        h = self.upper(
            inputs_embeds=mixed.hidden_states,
            attention_mask=self._slot_mask(attention_mask, mixed.hidden_states, past),
            position_ids=self._slot_positions(position_ids),
            past_key_values=None if cache is None else cache.upper,
            use_cache=use_cache,
        ).last_hidden_state
        slots = self.config.slots_per_token
        h = h[:, slots - 1 :: slots]  # the token is predicted from its last slot

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, kept]) if output_logits else None
        of_tokens = of_concepts = of_hidden = None
        if labels is not None:
            of_tokens = self._token_loss(h, logits, labels, num_items_in_batch)
        if isinstance(mixed, MixedWithLoss) and concept_ids is not None:
            labelled = (concept_ids != IGNORE).any(-1).sum().clamp(min=1)
            of_concepts = mixed.concept_loss / (labelled if num_labelled_in_batch is None else num_labelled_in_batch)
        elif concept_ids is not None:
            of_concepts = concept_loss(predicted, concept_ids, num_labelled_in_batch)
        if teacher_hidden_states is not None:
            of_hidden = hidden_state_loss(
                predicted, teacher_hidden_states, self.config.regression_loss, num_hidden_in_batch
            )
        return CoCoMixOutput(
            loss=self._total(of_tokens, of_concepts if of_hidden is None else of_hidden),
            token_loss=of_tokens,
            concept_loss=of_concepts,
            hidden_loss=of_hidden,
            logits=logits,
            concept_logits=predicted if output_concepts else None,
            past_key_values=cache if use_cache else None,
        )

    def _token_loss(self, h: Tensor, logits: Tensor | None, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Of the logits, or without them from h (B, T, D)."""
        if logits is not None:
            return token_loss(logits, labels, num_items)
        targets = labels[:, 1:]
        total = self.lm_head(h[:, :-1], targets)
        return total / (num_items if num_items is not None else (targets != IGNORE).sum().clamp(min=1))

    def _check_asked(self, content: str, **asked: object) -> None:
        """Raise ValueError if something is asked for that belongs to another content than this model's."""
        for name, value in asked.items():
            if value is not None and self.config.content != content:
                raise ValueError(f"{name} was given, but this model mixes in {self.config.content}; leave it out")

    def _total(self, of_tokens: Tensor | None, of_prediction: Tensor | None) -> Tensor | None:
        if of_prediction is None:
            return of_tokens
        weighted = self.config.concept_loss_weight * of_prediction
        return weighted if of_tokens is None else of_tokens + weighted

    def _slot_positions(self, position_ids: Tensor) -> Tensor:
        """(B, slots·T) positions in the upper stack."""
        slots = self.config.slots_per_token
        if slots == 1:
            return position_ids
        if self.config.slot_positions == "repeat":
            return position_ids.repeat_interleave(slots, dim=-1)
        return torch.stack([slots * position_ids + slot for slot in range(slots)], dim=-1).flatten(-2)

    def _slot_mask(self, mask: Tensor | None, slots_in: Tensor, past: int) -> Tensor | None:
        """(B, slots·(past + T)) mask of the upper stack, or (B, 1, slots·T, slots·(past + T)) for pairs."""
        slots = self.config.slots_per_token
        if slots > 1 and self.config.slot_attention == "pair":
            if (kernel := self.upper.config._attn_implementation) not in ("sdpa", "eager"):
                raise ValueError(
                    f"slot_attention is 'pair', whose mask the attention implementation {kernel!r} does not take; "
                    "use sdpa or eager, or slot_attention 'causal'"
                )
            return pair_mask(mask, slots_in, slots, past)
        if mask is not None:
            return mask.repeat_interleave(slots, dim=-1)
        if slots == 1 or self.config.slot_positions != "repeat":
            return None
        # Without a mask Transformers would read repeated positions as the seams of packed sequences.
        length = slots * past + slots_in.shape[1]
        return slots_in.new_ones((slots_in.shape[0], length), dtype=torch.long)


CoCoMixConfig.register_for_auto_class()
CoCoMixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
