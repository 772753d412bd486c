"""Base of the models that run the blocks of one Hugging Face decoder in several stacks.

Blocks keep their numbers (`layer_idx`) in the decoder, so that the layers of a cache, or of an engine that serves the
model, correspond to blocks.

Dimensions: B sequences, T tokens, D width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, Cache, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import fuse_activations, packed_texts, padded_positions, take_flat_attention
from .cache import StackedCache
from .configuration import StackedConfig

IGNORED_ARGUMENTS = frozenset({"cache_position", "token_type_ids", "tokenizer", "assistant_tokenizer"})
"""Arguments without effect here, which callers pass to every Hugging Face decoder; `generate` passes tokenizers."""
RECORDED = ("output_hidden_states", "output_attentions")
"""Arguments that ask the stacks to record states."""
KERNELS_WITHOUT_ARGUMENTS = ("sdpa", "eager", "flex_attention")
"""Attention implementations to which a caller has nothing to pass."""
ENGINES = ("vllm", "vllm_mla", "sglang")
"""Attention implementations of serving engines, which keep one cache entry per token and layer."""


class StackInputs(NamedTuple):
    """The arguments that all stacked models share, checked and completed."""

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
    passed_on: dict[str, Any]
    """Arguments of every stack: what to record, and what the attention implementation takes."""

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


class StackedModel(PreTrainedModel):
    """A decoder in stacks. The attribute named by `bottom` is the first stack, with the embeddings."""

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
        kernel = backbone._attn_implementation
        decoder = fuse_activations(AutoModel.from_config(backbone, attn_implementation=kernel))
        return take_flat_attention(decoder) if kernel in ENGINES else decoder

    def _add_head(self) -> None:
        """Add nothing: only models with a token head have one."""

    def post_init(self) -> None:
        """Finish the construction; engines load all weights of the file.

        Patterns of the stacks that ignore saved masks (GPT-2: `attn.bias`) match weights (`c_attn.bias`), too.
        """
        super().post_init()
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    @property
    def _bottom(self) -> PreTrainedModel:
        return getattr(self, self.bottom)

    @property
    def _kernel(self) -> str:
        """Name of the attention implementation."""
        return self._bottom.config._attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding of the first stack."""
        return self._bottom.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        self._bottom.set_input_embeddings(value)

    def prepare_inputs(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
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
            use_cache: return a cache; by default outside training.
            kwargs: `output_hidden_states`, `output_attentions`, `IGNORED_ARGUMENTS`, and what the attention
                implementation takes (not sdpa, eager and flex_attention), which reaches it unchanged.

        Raises:
            TypeError: an unknown argument, if the attention implementation takes none.
            ValueError: attention weights of a kernel that returns none, a mask of a wrong shape, a cache of another
                model, a static cache with another kernel than sdpa and eager, several texts per row together with a
                mask or a cache, or an argument for attention in a model with several entries per token.
        """
        passed_on = self._check_arguments(kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        cache = None if past_key_values is None else self._stacked_cache(past_key_values)
        past: int | Tensor = 0 if cache is None else cache.get_seq_length()
        if isinstance(past, Tensor):
            past = past.to(inputs_embeds.device)
        given_mask = attention_mask
        attention_mask = self._complete_mask(given_mask, inputs_embeds, cache, past)
        texts = packed_texts(position_ids, given_mask, cached=bool(use_cache) or cache is not None)
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
            passed_on=passed_on,
        )

    def _check_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Reject arguments that have no effect; return those that the stacks take.

        Where the caller does not decide on `output_hidden_states` and `output_attentions`, the configuration does.
        """
        kernel, entries = self._kernel, self._stacks()[-1]
        passed_on = {name: arguments[name] for name in sorted(set(arguments) - IGNORED_ARGUMENTS - set(RECORDED))}
        if passed_on and kernel in KERNELS_WITHOUT_ARGUMENTS:
            raise TypeError(f"forward() got unknown arguments: {', '.join(passed_on)}")
        if passed_on and entries > 1:
            raise ValueError(
                f"{', '.join(passed_on)}: an argument for the attention implementation {kernel!r} describes one entry "
                f"per token, and this model has {entries} above its mixer; leave it out, or use mixing 'add' or 'none'"
            )
        asked = {name: arguments.get(name) for name in RECORDED}
        asked = {name: getattr(self.config, name, False) if on is None else on for name, on in asked.items()}
        if not all(isinstance(on, bool) for on in asked.values()):
            raise ValueError(f"output_hidden_states is {asked['output_hidden_states']!r}; expected True or False")
        if asked["output_attentions"] and kernel != "eager":
            raise ValueError(
                f"output_attentions is not available with the attention implementation {kernel!r}; "
                'use attn_implementation="eager"'
            )
        return {**passed_on, **{name: True for name, on in asked.items() if on}}

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
        kernel = self._kernel
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
