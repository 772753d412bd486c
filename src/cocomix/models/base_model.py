"""CoCoMix: a decoder that predicts concepts in mid-depth and continues from its own prediction (arXiv 2502.08524).

    tokens ─► lower blocks ─► mixer (predict C concepts, keep K, compress) ─► upper blocks ─► last hidden state
      (B, T)        h (B, T, D)                           (B, slots·T, D)                       h (B, T, D)

What is special about it:

- Both halves are ordinary Hugging Face decoders (`backbones.py`), so attention kernels, gradient checkpointing and
  sharding of the backbone work.
- The mixer (`mixer.py`) predicts C concepts from h, compresses the K strongest into a vector c, and inserts c after
  each token (`mixing="interleave"`, 2 slots per token above) or adds it to h (`mixing="add"`, 1 slot).
- The last hidden state of a token is that of its last slot.
- Masks and positions of the upper blocks count slots (`_slot_mask`, `_slot_positions`). One cache serves both halves
  and counts tokens (`cache.py`).
- Steering edits the concept logits before or after the K strongest are chosen (`steering.py`, `steerable.py`).
- With one slot per token, serving engines that run models of Transformers take it: they replace the attention
  implementation, and read and write one cache entry per token and block.

Dimensions: B sequences, T tokens, D width, C concepts, K concepts mixed per token, A labels per token, d teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import has_windows, pair_mask, split_decoder, widen_windows
from .configuration import CoCoMixConfig
from .mixer import MIXERS, MixedWithLoss, Mixer, MixerOutput
from .stacked import ENGINES, StackedModel, StackInputs, adds_to_signature, recorded
from .steerable import Steerable


@dataclass
class CoCoMixModelOutput(ModelOutput):
    """Output of `CoCoMixModel`."""

    last_hidden_state: Tensor | None = None
    """(B, T, D), after the final norm."""
    past_key_values: Cache | None = None
    """Cache of both halves, whose length is in tokens."""
    concept_logits: Tensor | None = None
    """(B, T, C) predicted concepts, with `output_concepts=True`, including steering before the choice."""
    hidden_states: tuple[Tensor, ...] | None = None
    """With `output_hidden_states=True`: embeddings and the output of each block below the mixer, (B, T, D), then the
    output of the mixer and of each block above it, (B, slots·T, D), the last one after the final norm."""
    attentions: tuple[Tensor, ...] | None = None
    """Attention weights of each block, over T positions below the mixer and slots·T above, with
    `output_attentions=True`."""


class Read(NamedTuple):
    """What the blocks and the mixer compute."""

    h: Tensor
    """(B, T, D) last hidden state."""
    mixed: MixerOutput | MixedWithLoss
    """Output of the mixer."""
    below: Tensor
    """(B, T, D) hidden state below the mixer."""
    recorded: dict[str, tuple[Tensor, ...] | None]
    """`hidden_states` and `attentions`."""


class CoCoMixModel(Steerable, StackedModel):
    """A decoder with continuous concept mixing, without a token head."""

    config_class = CoCoMixConfig
    bottom = "lower"

    def __init__(self, config: CoCoMixConfig) -> None:
        super().__init__(config)
        if config.slot_attention == "pair" and has_windows(config.backbone_config):
            raise ValueError(
                f"slot_attention is 'pair', whose mask supports no sliding window, and the backbone "
                f"{config.backbone_config.model_type!r} has one; use slot_attention 'causal' or mixing 'add'"
            )
        if config.slots_per_token > 1 and (engine := config._attn_implementation) in ENGINES:
            raise ValueError(
                f"mixing is 'interleave', which keeps two cache entries per token above the mixer, and {engine} keeps "
                "one; serve a student with mixing 'add' or 'none'"
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

    @can_return_tuple
    @adds_to_signature(StackedModel.prepare_inputs)
    def forward(
        self, *args: Any, steering: Any = None, output_concepts: bool = False, **kwargs: Any
    ) -> CoCoMixModelOutput:
        """Compute the last hidden state.

        Args:
            args: arguments of `StackedModel.prepare_inputs`: `input_ids`, `attention_mask`, …
            steering: {concept: strength} to add to concept logits before the choice, a `Steering`, or a list with one
                of either, or None, for each row.
            output_concepts: return the concept logits, (B, T, C).
            kwargs: arguments of `StackedModel.prepare_inputs`.

        Raises:
            TypeError: as `StackedModel.prepare_inputs`.
            ValueError: the same, `output_concepts` without concepts, or steering that does not fit this model.
        """
        self._check_content("concepts", output_concepts=output_concepts or None)
        inputs = self.prepare_inputs(*args, **kwargs)
        read = self._read(inputs, steering)
        predicted = read.mixed.predicted if output_concepts and isinstance(read.mixed, MixerOutput) else None
        return CoCoMixModelOutput(
            last_hidden_state=read.h,
            past_key_values=inputs.cache if inputs.use_cache else None,
            concept_logits=predicted,
            **read.recorded,
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the model so that `AutoModel` loads it as this class, with or without a token head."""
        known = getattr(self.config, "auto_map", None) or {}
        self.config.auto_map = {**known, "AutoModel": f"{__name__.rpartition('.')[2]}.{CoCoMixModel.__name__}"}
        super().save_pretrained(*args, **kwargs)

    def _read(
        self,
        inputs: StackInputs,
        steering: Any,
        concept_ids: Tensor | None = None,
        concept_weights: Tensor | None = None,
        defers_loss: bool = False,
    ) -> Read:
        """Run the blocks and the mixer; with concept_ids (B, T, A), the mixer computes their loss, or defers it."""
        slots = self.config.slots_per_token
        steered = self._steered_batch(steering, inputs.position_ids, len(inputs.embeds))
        lower = self.lower(
            inputs_embeds=inputs.embeds,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            past_key_values=inputs.lower_cache,
            use_cache=inputs.use_cache,
            **inputs.passed_on,
        )  # last_hidden_state (B, T, D)
        mixed = self.mixer(lower.last_hidden_state, concept_ids, steered, concept_weights, defers_loss=defers_loss)
        if type(mixed) is tuple:  # hooks of other tools return their output without its names
            mixed = MixerOutput(*mixed) if concept_ids is None else MixedWithLoss(*mixed)
        upper = self.upper(
            inputs_embeds=mixed.hidden_states,
            attention_mask=self._slot_mask(mixed.hidden_states, inputs),
            position_ids=self._slot_positions(inputs.position_ids, self.config.slot_positions),
            past_key_values=inputs.upper_cache,
            use_cache=inputs.use_cache,
            **inputs.passed_on,
        )  # last_hidden_state (B, slots·T, D)
        h = upper.last_hidden_state[:, slots - 1 :: slots]  # (B, T, D), the last slot of each token
        return Read(h, mixed, lower.last_hidden_state, recorded((lower, upper)))

    def _check_content(self, content: str, **arguments: object) -> None:
        """Raise ValueError if an argument is given that needs another `content` than this model has."""
        for name, value in arguments.items():
            if value is not None and self.config.content != content:
                raise ValueError(f"{name} was given, but this model mixes in {self.config.content}; leave it out")

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


CoCoMixModel.register_for_auto_class()
