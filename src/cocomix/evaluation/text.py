"""Evaluate a saved model on text: `cocomix evaluate RUN`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import load_from_disk

from cocomix.common import environment, portable
from cocomix.common.errors import InputError
from cocomix.common.settings import Batch, Count
from cocomix.data.blocks import Blocks
from cocomix.data.corpus import check_source, distinct_texts, is_nanogpt_folder
from cocomix.data.packing import load_packed, validation_texts
from cocomix.data.tokenizer import vocabulary_size
from cocomix.evaluation.perplexity import figures, text_losses
from cocomix.evaluation.record import Evaluation
from cocomix.inspection.runs import OpenRun
from cocomix.training.run import RUN_FILE

OWN_TEXT = "validation"
"""Name of the validation documents of a run's own corpus."""
COUNTED_BLOCKS = 1 << 16
"""Number of training blocks from which token frequencies are estimated."""


@dataclass(frozen=True)
class TextSettings:
    """Settings for evaluating a model on text.

    Attributes:
        source: source of the text, as `corpus.source` of a recipe; of nanoGPT token files, val.bin is read. None means
            the validation documents of the run's own corpus.
        text_field: field of records that holds the text.
        window: tokens per window; defaults to the block size of training, or else to the model's context length.
        stride: tokens that each window scores, after its context; defaults to half a window.
        limit: evaluate only the first `limit` documents; None means all.
        batch_size: windows per batch.
        precision: `fp32`, or `bf16` for matrix products.
    """

    source: str | None = None
    text_field: str = "text"
    window: Count | None = None
    stride: Count | None = None
    limit: Count | None = None
    batch_size: Batch = 8
    precision: str = "fp32"


def evaluate_text(run: OpenRun, settings: TextSettings) -> Evaluation:
    """Measure perplexity, bits per byte, and losses by context length and token frequency.

    Raises:
        InputError: the text does not exist, or window and stride do not fit the model.
    """
    window, stride = _window(run, settings)
    texts = _texts(run, settings)
    losses = text_losses(
        run.model,
        run.tokenizer,
        texts,
        window=window,
        stride=stride,
        batch_size=settings.batch_size,
        precision=settings.precision,
    )
    frequencies = _training_frequencies(run)
    measured = figures(losses, losses.vocabulary.tokens if frequencies is None else frequencies)
    return Evaluation(
        kind="text",
        name=portable.short(settings.source) if settings.source else OWN_TEXT,
        settings={
            "text": losses.fingerprint,
            "window": window,
            "stride": stride,
            "precision": settings.precision,
        },
        figures={**measured, "frequency_in": "evaluated text" if frequencies is None else "training text"},
        environment=environment.describe(),
    )


def _window(run: OpenRun, settings: TextSettings) -> tuple[int, int]:
    """Return window and stride, in tokens."""
    longest = run.context_length
    window = settings.window
    if window is None:
        window = run.record.block_size if run.record is not None else longest
    if window is None:
        raise InputError(f"the configuration of {run.folder} has no context length; give --window")
    if longest is not None and window > longest:
        raise InputError(f"--window is {window}; expected 1 to {longest}, the context length of {run.folder}")
    stride = max(1, window // 2) if settings.stride is None else settings.stride
    if stride > window:
        raise InputError(f"--stride is {stride}; expected 1 to {window}, the size of the window")
    return window, stride


def _texts(run: OpenRun, settings: TextSettings) -> Iterable[str]:
    """Return the documents to evaluate on, read lazily, without blank ones."""
    source = settings.source
    if source is None:
        texts = _own_texts(run)
    elif is_nanogpt_folder(source):
        texts = validation_texts(Path(source), run.tokenizer)
    else:
        check_source(source, settings.text_field)
        texts = distinct_texts(source, settings.text_field)
    return islice((text for text in texts if text and not text.isspace()), settings.limit)


def _own_texts(run: OpenRun) -> Iterable[str]:
    if run.record is None:
        raise InputError(f"{run.folder} has no {RUN_FILE} that names a corpus; give --text SOURCE")
    if run.corpus is not None and (documents := run.corpus / "documents" / "validation").is_dir():
        return load_from_disk(str(documents))["text"]
    source = os.path.expanduser(run.record.recipe["corpus"]["source"])
    if is_nanogpt_folder(source):
        return validation_texts(Path(source), run.tokenizer)
    reason = "is gone or has changed" if run.corpus is None else "has tokens only, no text"
    raise InputError(f"the training corpus of {run.folder} {reason}; give --text SOURCE")


def _training_frequencies(run: OpenRun) -> np.ndarray | None:
    """Count each token (V,) in the first `COUNTED_BLOCKS` training blocks; None if the corpus is not available."""
    if run.corpus is None:
        return None
    blocks = load_packed(run.corpus).train
    count = min(len(blocks), COUNTED_BLOCKS)
    rows = Blocks(blocks.select(range(count)), ["input_ids"])
    total = np.zeros(vocabulary_size(run.tokenizer), np.int64)
    for start in range(0, count, 1024):
        ids = rows.batch(start, 1024)["input_ids"]
        total += np.bincount(ids.flatten().numpy(), minlength=len(total))
    return total
