"""Count how often and where each concept is active, in one pass over the text.

C concepts (SAE latents), n contexts kept per concept, B blocks per batch, S teacher tokens per block, k active
latents per token, N activations in a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common.console import progress_bar
from cocomix.concepts.reading import Passages, TeacherReader
from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.teacher import residual_stream


class Firings(NamedTuple):
    """Activations above 0, ordered by block and position."""

    concept: Tensor
    """(N,) int64."""
    activation: Tensor
    """(N,) float32."""
    block: Tensor
    """(N,) int64."""
    position: Tensor
    """(N,) int64."""

    def take(self, index: Tensor) -> Firings:
        """Select firings by a mask or by indices, in their order."""
        return Firings(*(column[index] for column in self))


def counted_tokens(passages: Passages) -> Tensor:
    """Return (B, S) bool, True at tokens of text: neither padding nor beginning-of-text."""
    counted = torch.ones_like(passages.input_ids, dtype=torch.bool)
    if passages.attention_mask is not None:
        counted &= passages.attention_mask.bool()
    if passages.documents is not None:
        counted &= torch.from_numpy(passages.documents >= 0)
    return counted


def find_firings(latents: Latents, counted: Tensor, first_block: int) -> Firings:
    """List the activations of a batch.

    Args:
        latents: (B, S, k).
        counted: (B, S) bool, the tokens to include.
        first_block: index of the first block of the batch.
    """
    active = (latents.values > 0) & counted.unsqueeze(-1)
    block, position, _ = active.nonzero(as_tuple=True)
    return Firings(latents.indices[active], latents.values[active].float(), first_block + block, position)


def _strongest_first(firings: Firings, group: Tensor) -> Tensor:
    """Return the (N,) order by `group` (N,), then by descending activation; ties keep their order."""
    order = firings.activation.argsort(descending=True, stable=True)
    return order[group[order].argsort(stable=True)]


def one_per_block(firings: Firings) -> Firings:
    """Keep the strongest firing of each concept in each block, the first of equally strong ones; order by concept."""
    place = firings.concept * (firings.block.max() + 1) + firings.block
    order = _strongest_first(firings, place)
    place = place[order]
    first = torch.ones_like(place, dtype=torch.bool)
    first[1:] = place[1:] != place[:-1]
    return firings.take(order[first])


class ConceptActivity:
    """Accumulate how often and where each concept is active. Memory is O(C · n), independent of the text read.

    Attributes:
        tokens: number of tokens counted.
        count: (C,) int64 number of tokens at which the concept is active.
        total: (C,) float64 sum of its activations.
        activation: (C, n) float32 strongest activations in descending order, padded with 0.
        block, position: (C, n) int64 where those activations are, padded with −1.
    """

    def __init__(self, num_concepts: int, contexts: int, device: torch.device) -> None:
        self.tokens = 0
        self.count = torch.zeros(num_concepts, dtype=torch.long, device=device)
        self.total = torch.zeros(num_concepts, dtype=torch.double, device=device)
        self.activation = torch.zeros(num_concepts, contexts, device=device)
        self.block = torch.full((num_concepts, contexts), -1, device=device)
        self.position = self.block.clone()

    def add(self, firings: Firings, tokens: int) -> None:
        """Add a batch of `tokens` tokens, whose blocks must follow all blocks added before."""
        self.tokens += tokens
        self.count += firings.concept.bincount(minlength=len(self.count))
        self.total.index_add_(0, firings.concept, firings.activation.double())
        weakest_kept = self.activation[firings.concept, -1]
        firings = firings.take(firings.activation > weakest_kept)  # among equals, keep the earlier
        if len(firings.concept):
            self._merge(one_per_block(firings))

    def _merge(self, new: Firings) -> None:
        touched = new.concept.unique()  # (U,)
        n = self.activation.shape[1]
        kept = (touched.repeat_interleave(n), self.activation[touched], self.block[touched], self.position[touched])
        # The kept ones come first, so that among equal activations the earlier one stays.
        merged = Firings(*(torch.cat([old.flatten(), added]) for old, added in zip(kept, new, strict=True)))
        merged = merged.take(_strongest_first(merged, merged.concept))
        start = torch.searchsorted(merged.concept, touched)
        row = torch.searchsorted(touched, merged.concept)
        rank = torch.arange(len(row), device=start.device) - start[row]
        best = merged.take(rank < n)  # exactly U · n, because each concept had n before
        self.activation[touched] = best.activation.view(-1, n)
        self.block[touched] = best.block.view(-1, n)
        self.position[touched] = best.position.view(-1, n)


def read_activity(
    teacher: PreTrainedModel,
    sae: SparseAutoencoder,
    teacher_layer: int,
    reader: TeacherReader,
    blocks: int,
    blocks_per_batch: int,
    contexts: int,
) -> ConceptActivity:
    """Run the teacher once over the first `blocks` blocks and count the activations of its SAE."""
    activity = ConceptActivity(sae.d_sae, contexts, teacher.device)
    with progress_bar(desc="catalog", unit="token", unit_scale=True) as progress:
        for start in range(0, blocks, blocks_per_batch):
            stop = min(start + blocks_per_batch, blocks)
            passages = reader(start, stop)
            ids, mask = passages.input_ids.to(teacher.device), passages.attention_mask
            mask = None if mask is None else mask.to(teacher.device)
            latents = sae.encode(residual_stream(teacher, ids, teacher_layer, mask))
            counted = counted_tokens(passages)
            activity.add(find_firings(latents, counted.to(teacher.device), start), int(counted.sum()))
            progress.total = round(activity.tokens / stop * blocks)  # some readers yield blocks of different lengths
            progress.update(int(counted.sum()))
    return activity
