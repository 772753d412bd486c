"""One cache for two stacks, whose length is counted in tokens.

    layers of the lower stack: one entry per token │ layers of the upper stack: `slots` entries per token

Whoever holds the cache (generation, assisted decoding, a caller that continues a text) counts and crops in tokens.
Each stack reads its own layers through a view, which counts entries, as the stack does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig, QuantizedCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

PLAIN = (Cache, DynamicCache, QuantizedCache)
"""Classes that `StackedCache.of` converts. Another class may count in a way of its own."""

CROPPED = (DynamicLayer, DynamicSlidingWindowLayer)
"""Layers that can be cropped. A quantized one inherits the method, which leaves its quantized part as it is."""


class StackView(Cache):
    """The layers of one stack, shared with the whole cache, which stores the entries (and offloads them)."""

    def __init__(self, whole: Cache, layers: slice) -> None:
        super().__init__(layers=whole.layers[layers])
        self.whole, self.first = whole, layers.start or 0

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add entries to a layer of this stack; return all of its keys and values."""
        return self.whole.update(key_states, value_states, self.first + layer_idx, *args, **kwargs)


class StackedCache(Cache):
    """The cache of a lower and an upper stack."""

    split: int
    """Layers of the lower stack."""
    slots: int
    """Entries of one token in the upper stack."""

    def __init__(self, lower: PretrainedConfig, upper: PretrainedConfig, slots: int = 1) -> None:
        """Make an empty cache for two stacks; the sliding windows of `upper` count entries."""
        super().__init__(layers=[*DynamicCache(config=lower).layers, *DynamicCache(config=upper).layers])
        self.split, self.slots = lower.num_hidden_layers, slots

    @classmethod
    def of(cls, cache: Cache | None, lower: PretrainedConfig, upper: PretrainedConfig, slots: int = 1) -> StackedCache:
        """Return `cache` as the cache of these stacks; make one where it is None.

        A plain cache becomes a stacked one in place, because callers pass the same object again.

        Raises:
            ValueError: `cache` has a fixed size, another depth, entries of another model, or an unknown class.
        """
        if cache is None:
            return cls(lower, upper, slots)
        split, depth = lower.num_hidden_layers, lower.num_hidden_layers + upper.num_hidden_layers
        if isinstance(cache, cls):
            if (len(cache), cache.split, cache.slots) != (depth, split, slots):
                raise ValueError("past_key_values comes from a model with other stacks; pass the one of this model")
            return cache
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
        """The cache of the lower stack."""
        return StackView(self, slice(self.split))

    @property
    def upper(self) -> Cache:
        """The cache of the upper stack."""
        return StackView(self, slice(self.split, None))

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of which a layer holds entries."""
        return super().get_seq_length(layer_idx) // (1 if layer_idx < self.split else self.slots)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last −`tokens_to_remove` tokens; Transformers passes their number as a negative one."""
        if not all(type(layer) in CROPPED for layer in self.layers):
            raise ValueError("a quantized cache cannot be cropped, as assisted decoding does; use another cache")
        self.lower.crop(tokens_to_remove)
        self.upper.crop(self.slots * tokens_to_remove)


def _check_plain(cache: Cache, depth: int, slots: int) -> None:
    """Raise ValueError unless a cache that is not stacked can become one; give it all its layers."""
    if cache.layer_class_to_replicate is not None:  # a cache that makes its layers at their first use
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
