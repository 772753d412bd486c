"""Multi-token prediction: the last n blocks are heads, each for another future token (Gloeckle et al., 2024).

    tokens ─► trunk (blocks − n) ─► head 1 ─► norm, token head ─► token t + 1
                                 ├► head 2 ─► norm, token head ─► token t + 2
                                 └► …

Each head is one block, and all heads share the final norm and the token head, so the model has exactly the weights of
its backbone. Generation runs the trunk and head 1, a decoder of blocks − n + 1.

Dimensions: B sequences, T tokens, D width, V vocabulary, n heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import Cache, PretrainedConfig
from transformers.utils import ModelOutput, can_return_tuple

from .backbones import final_norm_name, split_decoder
from .cache import StackedCache
from .configuration import StackedConfig
from .losses import IGNORE, mean_loss
from .next_token_loss import linear_token_loss
from .stacked import adds_to_signature, recorded
from .token_head import StackedForCausalLM


class MultiTokenConfig(StackedConfig):
    """Configuration of `MultiTokenForCausalLM`.

    Args:
        backbone_config: configuration of the decoder whose blocks become trunk and heads.
        num_future_tokens: n, number of heads, 1 ≤ n < blocks.
        kwargs: arguments of `StackedConfig`.

    Raises:
        ValueError: `num_future_tokens` is out of its range.
    """

    model_type = "cocomix_multi_token"

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        num_future_tokens: int = 2,
        **kwargs: Any,
    ) -> None:
        self.num_future_tokens = num_future_tokens
        super().__init__(backbone_config, **kwargs)

    def _check(self) -> None:
        blocks = self.backbone_config.num_hidden_layers
        if not 1 <= self.num_future_tokens < blocks:
            raise ValueError(
                f"num_future_tokens is {self.num_future_tokens}; each takes one block as its head and the trunk at "
                f"least one, so a backbone of {blocks} blocks takes 1 to {blocks - 1}"
            )


@dataclass
class MultiTokenOutput(ModelOutput):
    """Output of `MultiTokenForCausalLM`."""

    loss: Tensor | None = None
    """Mean next-token cross-entropy in nats, of head 1 only; with `labels`. The objective adds the other heads."""
    logits: Tensor | None = None
    """(B, T, V) next-token logits, or of fewer positions with `logits_to_keep`."""
    past_key_values: Cache | None = None
    """Cache of the trunk and head 1."""
    head_logits: tuple[Tensor, ...] | None = None
    """n × (B, T, V), logits of all heads, with `output_all_heads=True`."""
    head_losses: tuple[Tensor, ...] | None = None
    """n scalars, summed cross-entropy of each head in nats, with `labels` and `output_all_heads=True`."""
    hidden_states: tuple[Tensor, ...] | None = None
    """(B, T, D) each, with `output_hidden_states=True`: states of the trunk and then of each head that runs, input
    first, before the final norm."""
    attentions: tuple[Tensor, ...] | None = None
    """Attention weights of each block of the trunk and of each head that runs, with `output_attentions=True`."""


class MultiTokenForCausalLM(StackedForCausalLM):
    """A causal language model with n heads for the next n tokens."""

    config_class = MultiTokenConfig
    bottom = "trunk"

    def __init__(self, config: MultiTokenConfig) -> None:
        super().__init__(config)
        self.trunk, last = split_decoder(self._decoder(config), config.num_hidden_layers - config.num_future_tokens)
        heads = []
        for _ in range(config.num_future_tokens - 1):
            head, last = split_decoder(last, 1)
            heads.append(head)
        self.heads = nn.ModuleList([*heads, last])
        self.norm = getattr(last, final_norm_name(last))
        setattr(last, final_norm_name(last), nn.Identity())
        self._add_head()
        self.post_init()

    @can_return_tuple
    @adds_to_signature(StackedForCausalLM.prepare)
    def forward(self, *args: Any, output_all_heads: bool = False, **kwargs: Any) -> MultiTokenOutput:
        """Predict the next token, and with `output_all_heads` the n next tokens.

        Args:
            args: arguments of `StackedForCausalLM.prepare`.
            output_all_heads: run all heads instead of the first, without a cache.
            kwargs: arguments of `StackedForCausalLM.prepare`.

        Raises:
            TypeError: as `StackedForCausalLM.prepare`.
            ValueError: the same, or a cache together with `output_all_heads`.
        """
        if output_all_heads:
            kwargs["use_cache"] = False
        inputs, head_inputs = self.prepare(*args, **kwargs)
        if output_all_heads and inputs.cache is not None:
            raise ValueError("output_all_heads runs heads that past_key_values does not hold; leave out one of them")
        shared = {
            "attention_mask": inputs.attention_mask,
            "position_ids": inputs.position_ids,
            "use_cache": inputs.use_cache,
            **inputs.passed_on,
        }
        trunk = self.trunk(inputs_embeds=inputs.embeds, past_key_values=inputs.lower_cache, **shared)
        heads = [
            head(inputs_embeds=trunk.last_hidden_state, past_key_values=inputs.upper_cache, **shared)
            for head in (self.heads if output_all_heads else self.heads[:1])
        ]
        hs = [self.norm(head.last_hidden_state) for head in heads]  # (B, T, D) of each head
        logits = [z for h in hs if (z := self._logits(h, head_inputs)) is not None]  # n × (B, T, V), or nothing
        first = logits[0] if logits else None
        loss = losses = None
        if head_inputs.labels is not None and output_all_heads:
            losses = tuple(
                linear_token_loss(self.lm_head, h, head_inputs.labels, 1, ahead) for ahead, h in enumerate(hs, 1)
            )
            loss = mean_loss(losses[0], head_inputs.labels[:, 1:] != IGNORE, head_inputs.num_items)
        else:
            loss = self._token_loss(hs[0], first, head_inputs)
        return MultiTokenOutput(
            loss=loss,
            logits=first,
            past_key_values=inputs.cache if inputs.use_cache else None,
            head_logits=tuple(logits) if logits and output_all_heads else None,
            head_losses=losses,
            **recorded((trunk, *heads)),
        )

    def _stacks(self) -> tuple[PretrainedConfig, PretrainedConfig, int]:
        return self.trunk.config, self.heads[0].config, 1  # generation runs head 1 only

    def _stacked_cache(self, given: Cache | None) -> StackedCache:
        if given is not None and len(given) == self.config.num_hidden_layers:  # it has a layer for each head
            del given.layers[self.trunk.config.num_hidden_layers + 1 :]
        return super()._stacked_cache(given)


MultiTokenConfig.register_for_auto_class()
MultiTokenForCausalLM.register_for_auto_class("AutoModelForCausalLM")
