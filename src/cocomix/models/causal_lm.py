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
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import has_windows, pair_mask, split_decoder, widen_windows
from .cache import StackedCache
from .configuration import CoCoMixConfig
from .experts import idle_weights
from .losses import IGNORE, concept_loss, hidden_state_loss, mean_loss
from .mixer import MIXERS, MixedWithLoss, Mixer
from .retrofit import Retrofit
from .stacked import Reading, StackedForCausalLM, kept_positions, recorded
from .steerable import Steerable


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
    hidden_states: tuple[Tensor, ...] | None = None
    """With `output_hidden_states=True`: embeddings and the output of each block below the mixer, (B, T, D), then the
    output of the mixer and of each block above it, (B, slots·T, D), the last one after the final norm."""
    attentions: tuple[Tensor, ...] | None = None
    """With `output_attentions=True`: the weights of each block, over T positions below the mixer and slots·T above."""


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
        """Weights that one token uses: without the C − K compress rows that it does not read, and its idle experts."""
        unused = idle_weights(self, self.config)
        if self.config.mixes_concepts:
            unused += (self.config.num_concepts - self.config.num_active_concepts) * self.config.hidden_size
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
        num_concept_items_in_batch: Tensor | int | None = None,
        num_hidden_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CoCoMixOutput:
        """Prediction of the next token and of the mixer's content, with their losses where targets are given.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds`, (B, T, D).
            attention_mask: (B, past + T), 0 at padding, on either side.
            position_ids: (B, T); by default counted over the tokens that the mask keeps. Where they start again within
                a row, the row holds several texts, each of which is read alone.
            past_key_values: a dynamic cache; extended in place.
            labels: (B, T) token ids (they are shifted here), −100 for no target.
            concept_ids: (B, T, A) concept labels, −100 for none.
            teacher_hidden_states: (B, T, d) targets of predicted hidden states; those at padding are ignored.
            use_cache: return a cache; by default outside training.
            steering: {concept: strength} to add to concept logits before the choice, a `Steering`, or a list with one
                of either, or None, for each row.
            output_concepts: also return the concept logits, (B, T, C).
            output_logits: return the logits. Without them a loss costs less memory and time, as do concept labels
                without `output_concepts`: neither (B, T, V) nor (B, T, C) lives whole.
            logits_to_keep: as in Transformers: the last so many positions, or their indices; 0 for all.
            num_items_in_batch: number of token targets of the whole batch of which this is a part. Given by
                Transformers' Trainer.
            num_concept_items_in_batch: number of tokens with a concept label of that batch. By default
                `num_items_in_batch`, so that a batch has the same loss in however many parts it is computed; without
                that, the number of them here.
            num_hidden_in_batch: number of tokens with a hidden state of that batch; by default the same.
            kwargs: `output_hidden_states`, `output_attentions`, and `IGNORED_ARGUMENTS`.

        Raises:
            ValueError: a mask of another shape, a cache of fixed size or of another model, several texts in a row with
                a mask or a cache, targets of something that is not predicted here, a number of targets without labels,
                attention weights of a kernel that has none, or steering that is not for this model or comes with
                concept labels.
            TypeError: an argument that no Hugging Face decoder knows.
        """
        record = self._check_arguments(kwargs, labels, num_items_in_batch)
        self._check_asked("concepts", concept_ids=concept_ids, output_concepts=output_concepts or None)
        self._check_asked("hidden_states", teacher_hidden_states=teacher_hidden_states)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        read = self._reading(inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)
        lower_cache, upper_cache = (None, None) if read.cache is None else (read.cache.lower, read.cache.upper)
        steered = self._steered_batch(steering, read.position_ids, len(inputs_embeds))
        if steered is not None and concept_ids is not None:
            raise ValueError("concept_ids score what the model itself predicts; leave out steering or them")

        lower = self.lower(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=read.position_ids,
            past_key_values=lower_cache,
            use_cache=read.use_cache,
            **record,
        )
        mixed = self.mixer(lower.last_hidden_state, None if output_concepts else concept_ids, steered)
        predicted: Any = None if isinstance(mixed, MixedWithLoss) else mixed.predicted
        upper = self.upper(
            inputs_embeds=mixed.hidden_states,
            attention_mask=self._slot_mask(attention_mask, mixed.hidden_states, read),
            position_ids=self._slot_positions(read.position_ids, self.config.slot_positions),
            past_key_values=upper_cache,
            use_cache=read.use_cache,
            **record,
        )
        slots = self.config.slots_per_token
        h = upper.last_hidden_state[:, slots - 1 :: slots]  # the token is predicted from its last slot

        kept, whole = kept_positions(logits_to_keep)
        logits = self.lm_head(h[:, kept]) if output_logits else None
        token = concept = hidden = None
        if labels is not None:
            token = self._token_loss(h, logits if whole else None, labels, num_items_in_batch)
        if concept_ids is not None:
            total = mixed.concept_loss if isinstance(mixed, MixedWithLoss) else concept_loss(predicted, concept_ids, 1)
            items = num_items_in_batch if num_concept_items_in_batch is None else num_concept_items_in_batch
            concept = mean_loss(total, (concept_ids != IGNORE).any(-1), items)
        if teacher_hidden_states is not None:
            items = num_items_in_batch if num_hidden_in_batch is None else num_hidden_in_batch
            is_token = None if attention_mask is None else attention_mask[:, -h.shape[1] :].bool()
            kind = self.config.regression_loss
            hidden = hidden_state_loss(predicted, teacher_hidden_states, kind, items, is_token)
        return CoCoMixOutput(
            loss=self._total(token, concept if hidden is None else hidden),
            token_loss=token,
            concept_loss=concept,
            hidden_loss=hidden,
            logits=logits,
            concept_logits=predicted if output_concepts else None,
            past_key_values=read.cache if read.use_cache else None,
            **recorded((lower, upper)),
        )

    def _check_asked(self, content: str, **asked: object) -> None:
        """Raise ValueError if something is asked for that belongs to another content than this model's."""
        for name, value in asked.items():
            if value is not None and self.config.content != content:
                raise ValueError(f"{name} was given, but this model mixes in {self.config.content}; leave it out")

    def _total(self, token: Tensor | None, prediction: Tensor | None) -> Tensor | None:
        if prediction is None:
            return token
        weighted = self.config.concept_loss_weight * prediction
        return weighted if token is None else token + weighted.to(token.device)

    def _stacked_cache(self, given: Cache | None) -> StackedCache:
        """The cache of both halves."""
        return StackedCache.of(given, self.lower.config, self.upper.config, self.config.slots_per_token)

    def _slot_positions(self, position_ids: Tensor, kind: str) -> Tensor:
        """(B, slots·T) positions in the upper stack, `interleaved` or `repeat`."""
        slots = self.config.slots_per_token
        if slots == 1 or kind == "repeat":
            return position_ids.repeat_interleave(slots, dim=-1)
        return torch.stack([slots * position_ids + slot for slot in range(slots)], dim=-1).flatten(-2)

    def _slot_mask(self, mask: Tensor | None, slots_in: Tensor, read: Reading) -> Any:
        """The attention mask of the upper stack, in a form that the stack takes; None for a plain causal one."""
        slots, kernel = self.config.slots_per_token, self.upper.config._attn_implementation
        if slots == 1:
            return mask
        if self.config.slot_attention == "pair":
            if kernel not in ("sdpa", "eager"):
                raise ValueError(
                    f"slot_attention is 'pair', whose mask the attention implementation {kernel!r} does not take; "
                    "use sdpa or eager, or slot_attention 'causal'"
                )
            return pair_mask(mask, slots_in, slots, read.past, read.texts)
        if self.config.slot_positions == "repeat" and "flash" in kernel:
            raise ValueError(
                f"slot_positions is 'repeat', which the attention implementation {kernel!r} reads as several texts; "
                "use sdpa, eager or flex_attention"
            )
        if mask is not None:
            return mask.repeat_interleave(slots, dim=-1)
        if self.config.slot_positions != "repeat":
            return None
        # Transformers would read repeated positions as the seams of packed texts.
        if read.texts is not None:
            seams = self._slot_positions(read.position_ids, "interleaved")
            return create_masks_for_generate(self.upper.config, slots_in, None, None, position_ids=seams)
        length = slots * read.past + slots_in.shape[1]
        return slots_in.new_ones((slots_in.shape[0], length), dtype=torch.long)


CoCoMixConfig.register_for_auto_class()
CoCoMixForCausalLM.register_for_auto_class("AutoModelForCausalLM")
