"""Does a model use its continuous vector? Its loss with the vector taken away, or with one from elsewhere.

A vector that any other would serve as well carries nothing about its token: it is used, but as a constant. So the
vector of the same text at another token, and of another text at the same token, are tried beside none. A vector of a
later token could only help, so what that change costs is rather too small than too large. B blocks, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.evaluation.validation import evaluate_model
from cocomix.models.mixer import Mixer, Prediction

Change = Callable[[Tensor], Tensor]
"""Of vectors (B, T, D)."""


def zeroed(c: Tensor) -> Tensor:
    """No vector."""
    return torch.zeros_like(c)


def of_another_position(c: Tensor) -> Tensor:
    """That of a token half a text away, so of one that is as often later as earlier."""
    return c.roll(c.shape[1] // 2, dims=1)


def of_another_text(c: Tensor) -> Tensor:
    """That of the same position in the block that this one is paired with."""
    return c.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


CHANGES: dict[str, Change] = {
    "zeroed": zeroed,
    "of another position": of_another_position,
    "of another text": of_another_text,
}


def channel_losses(
    model: PreTrainedModel, blocks: Dataset, batch_size: int, precision: str = "fp32"
) -> dict[str, float]:
    """Validation loss, nats per token, as the model is (`own`) and with each of `CHANGES` to its vector.

    Args:
        model: a CoCoMix model that mixes something in, in evaluation mode.
        blocks: with the column `input_ids` (T,); two or more, of which an odd last one is left out.
        batch_size: blocks read at once; it decides nothing.
        precision: of the model's matrix products.
    """
    # Neighbours are mostly of one document: each is paired with the block half of the text away.
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
    """Within the block, the mixer mixes in what `change` makes of its vector."""
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
