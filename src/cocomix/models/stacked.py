"""Base of the models that run the blocks of one Hugging Face decoder in several stacks, under one token head.

Dimensions: B sequences, T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import fuse_activations, packed_texts, padded_positions
from .cache import StackedCache
from .configuration import StackedConfig
from .linear_loss import linear_token_loss
from .losses import token_loss

IGNORED_ARGUMENTS = frozenset({"cache_position", "token_type_ids"})
"""Arguments without effect here, which callers pass to every Hugging Face decoder."""


class StackInputs(NamedTuple):
    """The shared arguments of a forward pass, checked and completed."""

    embeds: Tensor
    """(B, T, D) token embeddings."""
    attention_mask: Tensor | None
    """(B, past + T), 0 at padding, filled up with 0 to the length of a static cache; None without padding."""
    position_ids: Tensor
    """(B, T) or (1, T)."""
    texts: Tensor | None
    """(B, T) or (1, T), as `packed_texts` returns them."""
    past: int | Tensor
    """Number of tokens that the cache holds before this pass; a tensor if the cache is static."""
    cache: StackedCache | None
    """Cache that the stacks extend."""
    use_cache: bool
    """Whether to return the cache."""
    record: dict[str, bool]
    """`output_hidden_states` and `output_attentions`, where the stacks shall record them."""
    labels: Tensor | None
    """(B, T) token targets."""
    num_items: Tensor | int | None
    """Number of token targets in the full batch."""
    output_logits: bool
    """Whether to return logits."""
    logits_to_keep: slice | Tensor
    """Index of the positions whose logits are returned."""
    keeps_all_logits: bool
    """Whether these are all positions."""

    @property
    def max_tokens(self) -> int | None:
        """Number of tokens that a static cache can hold; None without one."""
        return None if self.cache is None else self.cache.max_tokens

    @property
    def lower_cache(self) -> Cache | None:
        """Cache of the lower stack."""
        return None if self.cache is None else self.cache.lower

    @property
    def upper_cache(self) -> Cache | None:
        """Cache of the upper stack."""
        return None if self.cache is None else self.cache.upper


def adds_to_signature(shared: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show the parameters of `shared` in the signature of a method that passes its *args and **kwargs on to it.

    Transformers inspects the signature of `forward` to find out which arguments a model takes.
    """

    def decorate(method: Callable[..., Any]) -> Callable[..., Any]:
        own = [each for each in inspect.signature(method).parameters.values() if each.kind is each.KEYWORD_ONLY]
        *passed_on, kwargs = inspect.signature(shared).parameters.values()
        method.__signature__ = inspect.Signature([*passed_on, *own, kwargs])  # type: ignore[attr-defined]
        return method

    return decorate


class StackedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of stacks. The attribute named by `bottom` is the first stack, with the embeddings."""

    bottom: str
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @staticmethod
    def _decoder(config: StackedConfig) -> PreTrainedModel:
        """Build the backbone's decoder, to be split into stacks."""
        backbone = copy.deepcopy(config.backbone_config)  # the stacks change theirs
        return fuse_activations(AutoModel.from_config(backbone, attn_implementation=backbone._attn_implementation))

    def _add_head(self) -> None:
        """Add the token head, tied to the token embedding if the configuration says so."""
        self.lm_head: nn.Module = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}

    @property
    def _bottom(self) -> PreTrainedModel:
        return getattr(self, self.bottom)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding of the first stack."""
        return self._bottom.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self._bottom.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the token head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the token head."""
        self.lm_head = new_embeddings

    def prepare_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_logits: bool = True,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> StackInputs:
        """Check and complete the arguments that the forward passes of all stacked models share.

        Args:
            input_ids: (B, T) token ids, unless `inputs_embeds` are given.
            attention_mask: (B, past + T), 0 at padding, on either side. With a static cache it may be longer.
            position_ids: (B, T); by default the number of unmasked tokens before each token. Where positions restart
                within a row, the row holds several texts, and attention stays within each.
            past_key_values: a dynamic or static cache, which is extended in place.
            inputs_embeds: (B, T, D) token embeddings.
            labels: (B, T) token ids, −100 for no target; the model shifts them.
            use_cache: return a cache; by default outside training.
            output_logits: return the logits. Without them a loss takes less memory and time, because (B, T, V) is
                never materialized.
            logits_to_keep: as in Transformers: the number of last positions, or their indices; 0 for all.
            num_items_in_batch: number of token targets in the full batch of which this is a part. Transformers'
                Trainer passes it.
            kwargs: `output_hidden_states`, `output_attentions`, and `IGNORED_ARGUMENTS`.

        Raises:
            TypeError: an argument that no Hugging Face decoder has.
            ValueError: `num_items_in_batch` without `labels`, attention weights of a kernel that returns none, a mask
                of a wrong shape, a cache of another model, a static cache with another kernel than sdpa and eager, or
                several texts per row together with a mask or a cache.
        """
        record = self._check_arguments(kwargs, labels, num_items_in_batch)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        cache = None if past_key_values is None else self._stacked_cache(past_key_values)
        past: int | Tensor = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor):
            past = past.to(inputs_embeds.device)
        attention_mask = self._complete_mask(attention_mask, inputs_embeds, cache, past)
        texts = packed_texts(position_ids, attention_mask, cached=bool(use_cache) or cache is not None)
        if use_cache is None:
            use_cache = texts is None and self._uses_cache()
        if use_cache and cache is None:
            cache = self._stacked_cache(None)
        if position_ids is None:
            position_ids = self._positions(inputs_embeds, attention_mask, past)
        return StackInputs(
            embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            texts=texts,
            past=past,
            cache=cache,
            use_cache=use_cache,
            record=record,
            labels=labels,
            num_items=num_items_in_batch,
            output_logits=output_logits,
            logits_to_keep=slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep,
            keeps_all_logits=isinstance(logits_to_keep, int) and logits_to_keep == 0,
        )

    def _check_arguments(self, arguments: dict[str, Any], labels: Tensor | None, num_items: object) -> dict[str, bool]:
        """Reject arguments that have no effect; return which states the stacks shall record.

        Where the caller does not decide on `output_hidden_states` and `output_attentions`, the configuration does.
        """
        recorded = ("output_hidden_states", "output_attentions")
        if unknown := set(arguments) - IGNORED_ARGUMENTS - set(recorded):
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
        """Whether a pass returns a cache by default: outside training, unless a configuration turns it off."""
        configs = (self.config, self.config.backbone_config)
        return not self.training and all(getattr(config, "use_cache", True) for config in configs)

    def _complete_mask(
        self, mask: Tensor | None, inputs_embeds: Tensor, cache: StackedCache | None, past: int | Tensor
    ) -> Tensor | None:
        """Check the mask (B, past + T), and fill it up to the length of a static cache, whose shapes never change."""
        rows, length = inputs_embeds.shape[:2]
        max_tokens = None if cache is None else cache.max_tokens
        kernel = self._bottom.config._attn_implementation
        if max_tokens is not None and kernel not in ("sdpa", "eager"):
            raise ValueError(f"a static cache takes no attention implementation {kernel!r}; use sdpa or eager")
        if mask is None:
            return None
        if max_tokens is None:
            fits, expected = mask.shape == (rows, past + length), f"{past + length}"
        else:  # `past` is on the device, and reading it would wait for the device
            fits = mask.ndim == 2 and mask.shape[0] == rows and length <= mask.shape[1] <= max_tokens
            expected = f"{length} to {max_tokens}"
        if not fits:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}; expected (batch, past + tokens), here "
                f"({rows}, {expected})"
            )
        return mask if cache is None or max_tokens is None else fill_mask(mask, cache)

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Tensor | None, past_key_values: Cache, **kwargs: Any
    ) -> Tensor | None:
        """Prepare the mask for a static cache: only fill it up. Each stack derives its own within the compiled step.

        `generate` calls this in place of Transformers' function of the same name.
        """
        return None if attention_mask is None else fill_mask(attention_mask, past_key_values)

    @staticmethod
    def _positions(inputs_embeds: Tensor, mask: Tensor | None, past: int | Tensor) -> Tensor:
        """(B, T) or (1, T) default positions, which count unmasked tokens only."""
        tokens = past + torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device)
        return tokens.unsqueeze(0) if mask is None else padded_positions(mask)[:, tokens.to(mask.device)]

    def _stacks(self) -> tuple[PretrainedConfig, PretrainedConfig, int]:
        """Return the configurations of the lower and the upper stack, and the entries per token of the latter."""
        raise NotImplementedError

    def _stacked_cache(self, given: Cache | None) -> StackedCache:
        """Convert a cache to one for this model's stacks; create one from None."""
        return StackedCache.convert(given, *self._stacks())

    def _prepare_static_cache(self, cache_implementation: str, max_cache_len: int, **kwargs: Any) -> StackedCache:
        """Create the static cache of `generate`, as long as that of the last call, so that steps stay compiled."""
        if "offloaded" in cache_implementation:
            raise ValueError(
                f"a {type(self).__name__} offloads no static cache; use cache_implementation 'static' or 'offloaded'"
            )
        self._previous_max_cache_length = max(max_cache_len, getattr(self, "_previous_max_cache_length", 0))
        return StackedCache(*self._stacks(), max_tokens=self._previous_max_cache_length)

    def _logits(self, h: Tensor, inputs: StackInputs) -> Tensor | None:
        """(B, T, V) logits of h (B, T, D), or of the positions to keep; None if they are not asked for."""
        return self.lm_head(h[:, inputs.logits_to_keep]) if inputs.output_logits else None

    def _token_loss(self, h: Tensor, logits: Tensor | None, inputs: StackInputs) -> Tensor | None:
        """Next-token loss of complete logits, else of h (B, T, D) without materializing them; None without labels."""
        if inputs.labels is None:
            return None
        if logits is not None and inputs.keeps_all_logits:
            return token_loss(logits, inputs.labels, inputs.num_items)
        return linear_token_loss(self.lm_head, h, inputs.labels, inputs.num_items)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse paged caches, in which Transformers keeps one entry per token and layer."""
        raise ValueError(
            f"a {type(self).__name__} takes no paged cache, as continuous batching needs; call generate with another "
            "cache_implementation"
        )

    def _get_candidate_generator(self, **kwargs: Any) -> Any:
        """Refuse early exit, for which Transformers would cut the blocks of a single decoder."""
        if kwargs["generation_config"].assistant_early_exit is not None:
            raise ValueError(f"a {type(self).__name__} takes no assistant_early_exit; pass an assistant_model")
        return super()._get_candidate_generator(**kwargs)


def fill_mask(mask: Tensor, cache: Cache) -> Tensor:
    """Fill a mask (B, T) up with 0 to the number of tokens that a static cache can hold."""
    return F.pad(mask, (0, cache.get_max_length() - mask.shape[1]))


def recorded(stacks: Iterable[ModelOutput]) -> dict[str, tuple[Tensor, ...] | None]:
    """Concatenate the `hidden_states` and `attentions` of all stacks; None for what was not recorded."""
    found: dict[str, tuple[Tensor, ...] | None] = {"hidden_states": None, "attentions": None}
    for stack in stacks:
        for name, before in found.items():
            if (states := stack.get(name)) is not None:
                if name == "hidden_states":  # a stack without blocks records none
                    states = states or (stack.last_hidden_state,)
                found[name] = (*(before or ()), *states)
    return found
