"""Validation losses per document.

N documents, or blocks if the corpus has no documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel

from cocomix.common import distributed
from cocomix.data.blocks import Blocks
from cocomix.data.documents import DocumentTokens
from cocomix.training.validation import autocast, batches_of_rank

LOSSES_FILE = "validation-documents.npz"


@dataclass(frozen=True)
class DocumentLosses:
    """The losses of a model on validation documents.

    Attributes:
        nll: (N,) float64, negative log-likelihood summed over a document's predicted tokens, nats.
        tokens: (N,) int64, predicted tokens per document; the first token of a block is not predicted.
    """

    nll: np.ndarray
    tokens: np.ndarray


@torch.no_grad()
def document_losses(
    model: PreTrainedModel, blocks: Dataset, documents: DocumentTokens | None, batch_size: int, precision: str
) -> DocumentLosses:
    """Compute the loss of each document. Call it on every rank; each reads its share and all get the result.

    Args:
        model: any causal language model, in evaluation mode.
        blocks: all validation blocks.
        documents: the document of each token; if None, each block counts as a document.
        batch_size: blocks per batch.
        precision: precision of matrix products, as in training.
    """
    assert not model.training, "evaluation in training mode"
    rows = Blocks(blocks, ["input_ids"])
    length = len(blocks[0]["input_ids"])
    count = len(blocks) if documents is None else len(documents)
    nll, tokens = np.zeros(count), np.zeros(count, dtype=np.int64)
    for start, counts in batches_of_rank(range(0, len(blocks), batch_size)):
        stop = min(start + batch_size, len(blocks))
        ids = rows.batch(start, batch_size)["input_ids"].to(model.device)
        with autocast(model.device, precision):
            logits = model(input_ids=ids, use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        if not counts:
            continue
        positions = (np.arange(start, stop)[:, None] * length + np.arange(1, length)).ravel()
        numbers = positions // length if documents is None else documents.number_of(positions)
        nll += np.bincount(numbers, weights=losses.double().cpu().numpy(), minlength=count)
        tokens += np.bincount(numbers, minlength=count)
    summed = distributed.sum_arrays([nll, tokens.astype(np.float64)])
    return DocumentLosses(summed[0], summed[1].astype(np.int64))


def save_document_losses(losses: DocumentLosses, folder: Path) -> None:
    """Save losses in the folder of a run, without documents that have no predicted tokens."""
    predicted = losses.tokens > 0
    np.savez_compressed(folder / LOSSES_FILE, nll=losses.nll[predicted], tokens=losses.tokens[predicted])


def load_document_losses(folder: Path) -> DocumentLosses | None:
    """Load the losses of the run in `folder`; None if it has none."""
    if not (folder / LOSSES_FILE).is_file():
        return None
    with np.load(folder / LOSSES_FILE) as stored:
        return DocumentLosses(stored["nll"], stored["tokens"])
