"""What all models share that are made of the stacks of one decoder: embedding at the bottom, one token head."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import fuse_activations, packed_texts, positions_of
from .cache import StackedCache
from .configuration import StackedConfig
from .linear_loss import linear_token_loss
from .losses import token_loss

IGNORED_ARGUMENTS = frozenset({"cache_position", "token_type_ids"})
"""Passed by callers that treat all Hugging Face decoders alike; without effect here."""


class Reading(NamedTuple):
    """How a model of stacks reads an input of T tokens."""

    position_ids: Tensor
    """(B, T) or (1, T)."""
    texts: Tensor | None
    """(B, T) or (1, T), as `packed_texts` returns them."""
    past: int
    """Tokens in the cache, before this input."""
    cache: StackedCache | None
    """What the stacks extend."""
    use_cache: bool
    """Whether to return the cache."""


class StackedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of stacks; the first of them is the attribute named by `bottom`."""

    bottom: str
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # generation keeps to dynamic caches

    @staticmethod
    def _decoder(config: StackedConfig) -> PreTrainedModel:
        """The backbone's decoder, freshly made, to be taken apart."""
        backbone = copy.deepcopy(config.backbone_config)  # the stacks change theirs
        return fuse_activations(AutoModel.from_config(backbone, attn_implementation=backbone._attn_implementation))

    def _add_head(self) -> None:
        """Make the token head; it is the token embedding where the configuration ties them."""
        self.lm_head: nn.Module = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}

    @property
    def _bottom(self) -> PreTrainedModel:
        return getattr(self, self.bottom)

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, at the bottom of the first stack."""
        return self._bottom.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self._bottom.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The token head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the token head."""
        self.lm_head = new_embeddings

    def _check_arguments(self, arguments: dict[str, Any], labels: Tensor | None, num_items: object) -> dict[str, bool]:
        """Refuse what a forward pass cannot honor.

        Args:
            arguments: those that `forward` does not name.
            labels: token targets.
            num_items: number of token targets that the caller divides by.

        Returns:
            Which of `output_hidden_states` and `output_attentions` the stacks shall record; the configuration decides
            where the caller does not.

        Raises:
            TypeError: an argument that no Hugging Face decoder has.
            ValueError: attention weights of a kernel that has none, some hidden states by index, or a number of
                targets without targets.
        """
        recorded = ("output_hidden_states", "output_attentions")
        if unknown := arguments.keys() - IGNORED_ARGUMENTS - set(recorded):
            raise TypeError(f"forward() got unknown arguments: {', '.join(sorted(unknown))}")
        if labels is None and num_items is not None:
            raise ValueError(
                "num_items_in_batch was given without labels. Transformers' Trainer removes them for "
                "label_smoothing_factor, which this model does not support (set it to 0), and for compute_loss_func "
                "(set model.accepts_loss_kwargs = False)"
            )
        asked = {name: arguments.get(name) for name in recorded}
        asked = {name: getattr(self.config, name, False) if on is None else on for name, on in asked.items()}
        if not all(isinstance(on, bool) for on in asked.values()):
            raise ValueError(f"output_hidden_states is {asked['output_hidden_states']!r}; expected True or False")
        if asked["output_attentions"] and (kernel := self._bottom.config._attn_implementation) != "eager":
            raise ValueError(
                f"output_attentions is not available with the attention implementation {kernel!r}; "
                'use attn_implementation="eager"'
            )
        return {name: True for name, on in asked.items() if on}

    def _uses_cache(self) -> bool:
        """Whether a pass returns a cache by default: outside training, unless a configuration says no."""
        configs = (self.config, self.config.backbone_config)
        return not self.training and all(getattr(config, "use_cache", True) for config in configs)

    def _token_loss(self, h: Tensor, logits: Tensor | None, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        """Next-token loss of the logits, or of h (B, T, D) without materializing them."""
        if logits is not None:
            return token_loss(logits, labels, num_items)
        return linear_token_loss(self.lm_head, h, labels, num_items)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse paged caches, in which Transformers keeps one entry per token and layer."""
        raise ValueError(
            f"a {type(self).__name__} takes no paged cache, as continuous batching needs; call generate with another "
            "cache_implementation"
        )

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """Refuse early exit: Transformers would cut the blocks of one decoder, and there are several."""
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise ValueError(f"a {type(self).__name__} takes no assistant_early_exit; pass an assistant_model")
        return super()._get_candidate_generator(**kwargs)

    def _stacked_cache(self, given: Cache | None) -> StackedCache:
        """The given cache as that of this model's stacks, or a new one."""
        raise NotImplementedError

    def _reading(
        self,
        inputs_embeds: Tensor,
        mask: Tensor | None,
        position_ids: Tensor | None,
        given: Cache | None,
        use_cache: bool | None,
    ) -> Reading:
        """How the stacks read the input; the arguments are those of `forward`.

        Raises:
            ValueError: a mask of another shape, a cache that is not for this model, or several texts in a row with a
                mask or a cache.
        """
        cache = None if given is None else self._stacked_cache(given)
        past = 0 if cache is None else cache.get_seq_length()
        expected = (inputs_embeds.shape[0], past + inputs_embeds.shape[1])
        if mask is not None and mask.shape != expected:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; expected (batch, past + tokens), here {expected}"
            )
        texts = packed_texts(position_ids, mask, cached=bool(use_cache) or cache is not None)
        if use_cache is None:
            use_cache = texts is None and self._uses_cache()
        if use_cache and cache is None:
            cache = self._stacked_cache(None)
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, mask, past)
        return Reading(position_ids, texts, past, cache, use_cache)

    @staticmethod
    def _positions(inputs_embeds: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """(B, T) or (1, T) positions of the given tokens, not counting padding."""
        length = inputs_embeds.shape[1]
        if mask is not None:
            return positions_of(mask)[:, -length:]
        return torch.arange(past, past + length, device=inputs_embeds.device).unsqueeze(0)


def kept_positions(logits_to_keep: int | Tensor) -> tuple[slice | Tensor, bool]:
    """Index of the positions whose logits are returned, and whether these are all."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None), logits_to_keep == 0
    return logits_to_keep, False


def recorded(stacks: Iterable[ModelOutput]) -> dict[str, tuple[Tensor, ...] | None]:
    """`hidden_states` and `attentions` of all stacks, one after the other; None for what was not recorded."""
    found: dict[str, tuple[Tensor, ...] | None] = {"hidden_states": None, "attentions": None}
    for stack in stacks:
        for name, before in found.items():
            if (states := stack.get(name)) is not None:
                if name == "hidden_states":  # a stack without blocks records none
                    states = states or (stack.last_hidden_state,)
                found[name] = (*(before or ()), *states)
    return found
