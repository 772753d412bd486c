"""One cache for two stacks, whose length is counted in tokens.

    layers of the lower stack: one entry per token │ layers of the upper stack: `slots` entries per token

Holders of the cache (generation, assisted decoding, a caller that continues a text) count and crop in tokens. Each
stack reads its layers through a view, which counts entries. Blocks name their layer by its number in the full cache.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

PLAIN = (Cache, DynamicCache, QuantizedCache)
"""Classes that `StackedCache.convert` converts. Other classes may count differently."""

CROPPED = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that can be cropped. A quantized layer inherits the method, which would skip its quantized part, and a static
layer has none."""


class StackView(Cache):
    """The layers of one stack, as a view of the full cache, which stores (and offloads) the entries."""

    def __init__(self, cache: Cache, layers: slice) -> None:
        super().__init__(layers=cache.layers[layers])
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Append entries to a layer, counted in the full cache; return all keys and values of the layer."""
        return self.cache.update(key_states, value_states, layer_idx, *args, **kwargs)


class StackedCache(Cache):
    """Cache of a lower and an upper stack."""

    split: int
    """Number of layers in the lower stack."""
    slots: int
    """Entries per token in the upper stack."""

    def __init__(
        self, lower: PretrainedConfig, upper: PretrainedConfig, slots: int = 1, max_tokens: int | None = None
    ) -> None:
        """Create an empty cache for two stacks. The sliding windows of `upper` count entries.

        With `max_tokens`, the cache is static: its tensors are allocated once for that many tokens, so that a decoding
        step can be compiled. Windows are then left to the attention mask, and every layer keeps all entries.
        """
        if max_tokens is None:
            layers: list[Any] = [*DynamicCache(config=lower).layers, *DynamicCache(config=upper).layers]
        else:
            layers = [StaticLayer(max_tokens) for _ in range(lower.num_hidden_layers)]
            layers += [StaticLayer(slots * max_tokens) for _ in range(upper.num_hidden_layers)]
        super().__init__(layers=layers)
        self.split, self.slots = lower.num_hidden_layers, slots

    @classmethod
    def convert(
        cls, cache: Cache | None, lower: PretrainedConfig, upper: PretrainedConfig, slots: int = 1
    ) -> StackedCache:
        """Convert `cache` to a cache for these stacks; create one from None.

        Converts a plain cache in place, because callers pass the same object again.

        Raises:
            ValueError: `cache` has a wrong depth, entries of another model, or an unknown class, or it is static and
                not empty or with windows.
        """
        if cache is None:
            return cls(lower, upper, slots)
        split, depth = lower.num_hidden_layers, lower.num_hidden_layers + upper.num_hidden_layers
        if isinstance(cache, cls):
            if (len(cache), cache.split, cache.slots) != (depth, split, slots):
                raise ValueError("past_key_values comes from a model with other stacks; pass the one of this model")
            return cache
        if type(cache) is StaticCache:
            cache.layers = cls(lower, upper, slots, _static_tokens(cache, depth)).layers
        else:
            _check_plain(cache, depth, slots)
            for index, layer in enumerate(cls(lower, upper, slots).layers):
                given: Any = cache.layers[index]
                if given.is_sliding and not given.get_seq_length():  # its window may count tokens
                    if given.record_past:
                        layer.activate_past_recording()
                    cache.layers[index] = layer
        cache.__class__ = cls
        assert isinstance(cache, cls)
        cache.split, cache.slots = split, slots
        return cache

    @property
    def lower(self) -> Cache:
        """View of the lower stack."""
        return StackView(self, slice(self.split))

    @property
    def upper(self) -> Cache:
        """View of the upper stack."""
        return StackView(self, slice(self.split, None))

    @property
    def max_tokens(self) -> int | None:
        """Number of tokens that a static cache can hold; None if it is dynamic."""
        return self.get_max_length() if self.is_compileable else None

    def _entries_per_token(self, layer_idx: int) -> int:
        return 1 if layer_idx < self.split else self.slots

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that a layer holds; of a static cache, a new tensor."""
        return super().get_seq_length(layer_idx) // self._entries_per_token(layer_idx)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return the number of tokens that a layer, by default the longest, can hold; −1 without a limit."""
        if layer_idx is None:
            return max(self.get_max_length(index) for index in range(len(self)))
        return super().get_max_length(layer_idx) // self._entries_per_token(layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last −`tokens_to_remove` tokens. Transformers passes a negative number."""
        if not all(type(layer) in CROPPED for layer in self.layers):
            raise ValueError("a quantized or static cache cannot be cropped, as assisted decoding does; use another")
        self.lower.crop(tokens_to_remove)
        self.upper.crop(self.slots * tokens_to_remove)


def _static_tokens(cache: StaticCache, depth: int) -> int:
    """Return the number of tokens that an empty static cache of `depth` layers is for, or raise ValueError."""
    filled = any(layer.is_initialized for layer in cache.layers)
    if filled or len(cache) != depth or cache.offloading or any(cache.is_sliding):
        raise ValueError(
            f"past_key_values is a StaticCache of {len(cache)} layers; expected an empty one of {depth} without "
            'sliding windows and offloading; call generate with cache_implementation="static", which creates it'
        )
    return cache.get_max_length()


def _check_plain(cache: Cache, depth: int, slots: int) -> None:
    """Raise ValueError if a plain cache cannot be converted; create its layers if it has none yet."""
    if cache.layer_class_to_replicate is not None:  # a cache that creates its layers on first use
        cache.layers.extend(cache.layer_class_to_replicate() for _ in range(depth - len(cache)))
    lengths = [layer.get_seq_length() for layer in cache.layers if isinstance(layer, DynamicLayer)]
    if type(cache) not in PLAIN or not depth == len(lengths) == len(cache):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} of {len(cache)} layers; expected a dynamic cache of {depth}"
        )
    if slots > 1 and any(lengths):
        raise ValueError(
            f"past_key_values is a {type(cache).__name__} with one entry per token, and this model keeps {slots} above "
            "its mixer; pass an empty cache or the one that this model returned"
        )
