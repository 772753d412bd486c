"""A decoder whose last blocks are heads that each predict another future token (Gloeckle et al., 2024).

    tokens ─► trunk (blocks − n) ─► head 1 ─► norm, token head ─► token t + 1
                                 ├► head 2 ─► norm, token head ─► token t + 2
                                 └► …

Each head is one block, and norm and token head are shared, so a model with n heads has exactly the weights of its
backbone. Generation uses the trunk and head 1, which is a decoder of blocks − n + 1.
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
from .linear_loss import linear_token_loss
from .losses import IGNORE, mean_loss
from .stacked import StackedForCausalLM, kept_positions, recorded


class MultiTokenConfig(StackedConfig):
    """Configuration of `MultiTokenForCausalLM`.

    Args:
        backbone_config: configuration of the decoder whose blocks become trunk and heads.
        num_future_tokens: n, heads, 1 ≤ n < blocks.

    Raises:
        ValueError: as many heads as blocks, or more.
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
    """What `MultiTokenForCausalLM` returns. B sequences, T tokens, V vocabulary."""

    loss: Tensor | None = None
    """Mean next-token cross-entropy, nats; needs `labels`. The other heads are the objective's business."""
    logits: Tensor | None = None
    """(B, T, V) next-token logits, or fewer positions with `logits_to_keep`."""
    past_key_values: Cache | None = None
    """Cache of the trunk and head 1."""
    head_logits: tuple[Tensor, ...] | None = None
    """Logits of all n heads, with `output_all_heads=True`."""
    head_losses: tuple[Tensor, ...] | None = None
    """(n,) summed cross-entropy of each head, nats; with `labels` and `output_all_heads=True`."""
    hidden_states: tuple[Tensor, ...] | None = None
    """With `output_hidden_states=True`: of the trunk and then of each head that runs, input first, (B, T, D), without
    the final norm."""
    attentions: tuple[Tensor, ...] | None = None
    """With `output_attentions=True`: the weights of each block of the trunk and of each head that runs."""


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
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_all_heads: bool = False,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> MultiTokenOutput:
        """Next-token prediction, and with `output_all_heads` that of the following tokens.

        Args:
            input_ids: (B, T) token ids; or `inputs_embeds`, (B, T, D).
            attention_mask: (B, past + T), 0 at padding, on either side.
            position_ids: (B, T); by default counted over the tokens that the mask keeps. Where they start again within
                a row, the row holds several texts, each of which is read alone.
            past_key_values: a dynamic cache; extended in place.
            labels: (B, T) token ids (they are shifted here), −100 for no target.
            use_cache: return a cache; by default outside training. Of no effect with `output_all_heads`.
            output_all_heads: run all heads, not only the first.
            output_logits: return logits. Without them the losses take less memory and time.
            logits_to_keep: as in Transformers: the last so many positions, or their indices; 0 for all.
            num_items_in_batch: number of token targets of the whole batch of which this is a part.
            kwargs: `output_hidden_states`, `output_attentions`, and `IGNORED_ARGUMENTS`.

        Raises:
            TypeError: an argument that no Hugging Face decoder has.
            ValueError: a number of targets without labels, attention weights of a kernel that has none, a mask of
                another shape, a cache of fixed size or of another model or with `output_all_heads`, or several texts
                in a row with a mask or a cache.
        """
        record = self._check_arguments(kwargs, labels, num_items_in_batch)
        if output_all_heads and past_key_values is not None:
            raise ValueError("output_all_heads runs heads that past_key_values does not hold; leave out one of them")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if output_all_heads:
            use_cache = False
        read = self._reading(inputs_embeds, attention_mask, position_ids, past_key_values, use_cache)
        of_trunk, of_head = (None, None) if read.cache is None else (read.cache.lower, read.cache.upper)
        shared = {"attention_mask": attention_mask, "position_ids": read.position_ids, "use_cache": read.use_cache}
        trunk = self.trunk(inputs_embeds=inputs_embeds, past_key_values=of_trunk, **shared, **record)
        heads = [
            head(inputs_embeds=trunk.last_hidden_state, past_key_values=of_head, **shared, **record)
            for head in (self.heads if output_all_heads else self.heads[:1])
        ]
        kept, whole = kept_positions(logits_to_keep)
        normed = [self.norm(head.last_hidden_state) for head in heads]
        logits = [self.lm_head(h[:, kept]) for h in normed] if output_logits else None
        loss = losses = None
        if labels is not None and output_all_heads:
            losses = [linear_token_loss(self.lm_head, h, labels, 1, ahead) for ahead, h in enumerate(normed, 1)]
            loss = mean_loss(losses[0], labels[:, 1:] != IGNORE, num_items_in_batch)
        elif labels is not None:
            loss = self._token_loss(normed[0], logits[0] if logits and whole else None, labels, num_items_in_batch)
        return MultiTokenOutput(
            loss=loss,
            logits=logits[0] if logits else None,
            past_key_values=read.cache if read.use_cache else None,
            head_logits=tuple(logits) if logits and output_all_heads else None,
            head_losses=tuple(losses) if losses else None,
            **recorded((trunk, *heads)),
        )

    def _stacked_cache(self, given: Cache | None) -> StackedCache:
        """The cache of the trunk and head 1."""
        trunk, head = self.trunk.config, self.heads[0].config
        if given is not None and len(given) == self.config.num_hidden_layers:  # made for the blocks of all heads
            del given.layers[trunk.num_hidden_layers + 1 :]
        return StackedCache.of(given, trunk, head)


MultiTokenConfig.register_for_auto_class()
MultiTokenForCausalLM.register_for_auto_class("AutoModelForCausalLM")
