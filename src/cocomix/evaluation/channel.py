"""Measure whether a model uses its continuous vector: its loss without the vector, or with a vector from elsewhere.

If any other vector served as well, the vector would carry no information about its token. The loss is therefore also
measured with the vector of another token of the same text, and with that of the same position in another text. A later
token's vector may help to predict, so the first of these losses underestimates the effect.

B blocks, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.models.mixer import Mixer, Prediction
from cocomix.training.validation import evaluate_model

Change = Callable[[Tensor], Tensor]
"""Maps vectors (B, T, D) to others."""


def zeroed(c: Tensor) -> Tensor:
    """Replace the vectors with zeros."""
    return torch.zeros_like(c)


def shift_positions(c: Tensor) -> Tensor:
    """Replace each vector with that of the token half a block away, equally often later and earlier."""
    return c.roll(c.shape[1] // 2, dims=1)


def swap_texts(c: Tensor) -> Tensor:
    """Replace each vector with that of the same position in the paired block."""
    return c.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


CHANGES: dict[str, Change] = {
    "zeroed": zeroed,
    "of another position": shift_positions,
    "of another text": swap_texts,
}


def channel_losses(
    model: PreTrainedModel, blocks: Dataset, batch_size: int, precision: str = "fp32"
) -> dict[str, float]:
    """Measure the validation loss unchanged (`own`) and with each of `CHANGES` to the vector, nats per token.

    Args:
        model: a CoCoMix model with mixing, in evaluation mode.
        blocks: two or more rows with the column `input_ids` (T,); an odd last one is left out.
        batch_size: blocks per batch; it does not affect the result.
        precision: precision of matrix products.
    """
    # Adjacent blocks are often of one document, so each block is paired with one half of the data away.
    half = len(blocks) // 2
    pairs = [block for first in range(half) for block in (first, first + half)]
    blocks = blocks.select_columns("input_ids").select(pairs)
    batch_size = max(2, batch_size - batch_size % 2)
    found = {"own": evaluate_model(model, blocks, batch_size, precision)["loss"]}
    for name, change in CHANGES.items():
        with changed(model.mixer, change):
            found[name] = evaluate_model(model, blocks, batch_size, precision)["loss"]
    return found


@contextmanager
def changed(mixer: Mixer, change: Change) -> Iterator[None]:
    """Apply `change` to the mixer's vectors inside the `with` block."""
    predict = mixer.predict_and_compress

    def predict_and_change(*arguments: object, **options: object) -> Prediction:
        prediction = predict(*arguments, **options)  # type: ignore[arg-type]
        assert prediction.c is not None, "nothing is mixed in"
        return prediction._replace(c=change(prediction.c))

    mixer.predict_and_compress = predict_and_change  # type: ignore[method-assign]
    try:
        yield
    finally:
        del mixer.predict_and_compress
