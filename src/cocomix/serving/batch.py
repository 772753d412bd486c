"""Rows of one model that are generated together, and join and leave between two steps.

All rows share one cache, padded on the left to the longest of them. Transformers' own continuous batching keeps one
cache entry per token and layer, where interleaved models keep two, and hands no steering to the model.

Dimensions: R rows, T tokens, S cached tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from cocomix.models.steering import Steering

GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
"""Kinds of cache layers whose rows can be joined: their entries are in the order of the tokens."""


class Tokens(Protocol):
    """A row as the batch sees it."""

    ids: list[int]
    """Its token ids so far."""
    steering: Steering | None
    """Its steering, with positions as numbers."""


class Batch:
    """Rows in one cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.rows = model, list[Any]()
        self.cache: Any = None
        self.mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)  # (R, S), 0 at padding
        self.takes = inspect.signature(model.forward).parameters

    @torch.no_grad()
    def join(self, rows: Sequence[Tokens], all_logits: bool = False) -> Tensor:
        """Read the tokens of new rows, and add them to the batch.

        Returns:
            Their logits after each token (R, T, V), padded on the left, or only after the last one (R, 1, V).
        """
        length = max(len(row.ids) for row in rows)
        ids = torch.tensor([[0] * (length - len(row.ids)) + row.ids for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (length - len(row.ids)) + [1] * len(row.ids) for row in rows], device=ids.device)
        output = self._read(ids, mask, None, rows, all_logits)
        width = max(length, self.mask.shape[1])
        if self.rows:
            _append(self.cache, output.past_key_values)
        else:
            self.cache = output.past_key_values
        self.mask = torch.cat([_padded(self.mask, width), _padded(mask, width)]) if self.rows else mask
        self.rows += rows
        return output.logits

    @torch.no_grad()
    def step(self) -> Tensor:
        """Read the last token of each row; return the logits of the next one (R, V)."""
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=self.model.device)
        self.mask = F.pad(self.mask, (0, 1), value=1)
        return self._read(ids, self.mask, self.cache, self.rows, False).logits[:, -1]

    def keep(self, kept: Sequence[int]) -> None:
        """Remove all rows but those with these indices, and the padding that only the others needed."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[index] for index in kept]
        if not self.rows:
            self.cache, self.mask = None, self.mask[:0, :0]
            return
        index = torch.tensor(kept, device=self.mask.device)
        self.cache.batch_select_indices(index)
        tokens, mask = self.mask.shape[1], self.mask[index]
        self.mask = mask[:, int(mask.any(0).int().argmax()) :]
        _trim(self.cache, tokens, self.mask.shape[1])

    def _read(self, ids: Tensor, mask: Tensor, cache: Cache | None, rows: Sequence[Tokens], all_logits: bool) -> Any:
        """Run the model on ids (R, T) after the cached tokens; mask is (R, S + T)."""
        arguments: dict[str, Any] = {}
        if "position_ids" in self.takes:
            positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
            arguments["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self.takes and not all_logits:
            arguments["logits_to_keep"] = 1
        if any(row.steering is not None for row in rows):
            arguments["steering"] = [row.steering for row in rows]
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **arguments)


def can_join(cache: Cache) -> bool:
    """Return whether rows can be added to a cache while others are generated."""
    return all(type(layer) in GROWING for layer in cache.layers)


def _padded(entries: Tensor, length: int) -> Tensor:
    """Pad a mask (R, S), or keys and values (R, heads, S, width), on the left to S = length."""
    missing = length - entries.shape[min(2, entries.ndim - 1)]
    return F.pad(entries, (0, 0) * (entries.ndim == 4) + (missing, 0))


def _append(cache: Cache, other: Cache) -> None:
    """Add the rows of another cache. Both hold the latest tokens last."""
    for layer, added in zip(cache.layers, other.layers, strict=True):
        length = max(layer.keys.shape[2], added.keys.shape[2])
        layer.keys = torch.cat([_padded(layer.keys, length), _padded(added.keys, length)])
        layer.values = torch.cat([_padded(layer.values, length), _padded(added.values, length)])
        if layer.is_sliding:
            layer.cumulative_length = max(layer.cumulative_length, added.cumulative_length)


def _trim(cache: Cache, tokens: int, kept: int) -> None:
    """Remove the entries of all but the last `kept` of `tokens` tokens, for each of which a layer has one or more."""
    for layer in cache.layers:
        entries = layer.get_seq_length() // tokens * kept
        layer.keys, layer.values = layer.keys[:, :, -entries:], layer.values[:, :, -entries:]
        if layer.is_sliding:
            layer.cumulative_length = entries
