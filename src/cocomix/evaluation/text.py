"""`cocomix evaluate RUN`: a saved model on text, from the text's source to its figures."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import load_from_disk

from cocomix import environment, portable
from cocomix.data.blocks import Blocks, collate
from cocomix.data.corpus import check_source, distinct_texts, is_nanogpt_folder
from cocomix.data.packing import load_packed, validation_texts
from cocomix.data.tokenizer import vocabulary_size
from cocomix.errors import InputError
from cocomix.evaluation.perplexity import figures, text_losses
from cocomix.evaluation.record import Evaluation
from cocomix.settings import Batch, Count
from cocomix.steering.runs import OpenRun
from cocomix.training.run import RUN_FILE

OWN_TEXT = "validation"
"""What the validation documents of a run's own corpus are called."""
COUNTED_BLOCKS = 1 << 16
"""Training blocks in which tokens are counted; of a larger corpus, these say how frequent a token is."""


@dataclass(frozen=True)
class TextSettings:
    """How a model is evaluated on text.

    Attributes:
        source: as `corpus.source` of a recipe; of nanoGPT's token files, val.bin. None: the validation documents of
            the run's own corpus.
        text_field: the field of records that holds the text.
        window: tokens read at once; by default the block size of training, or the model's context length.
        stride: tokens that a window counts, those before are context; by default half a window.
        limit: so many documents, the first; by default all.
        batch_size: windows read at once.
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
    """Perplexity, bits per byte and losses by context and token frequency.

    Raises:
        InputError: the text is not there, or window and stride do not fit the model.
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
    of_training = _training_frequencies(run)
    measured = figures(losses, losses.vocabulary.tokens if of_training is None else of_training)
    return Evaluation(
        kind="text",
        name=portable.short(settings.source) if settings.source else OWN_TEXT,
        settings={
            "text": losses.fingerprint,
            "window": window,
            "stride": stride,
            "precision": settings.precision,
        },
        figures={**measured, "frequency_in": "evaluated text" if of_training is None else "training text"},
        environment=environment.describe(),
    )


def _window(run: OpenRun, settings: TextSettings) -> tuple[int, int]:
    """Window and stride, in tokens."""
    longest = run.context_length
    window = settings.window
    if window is None:
        window = run.record.block_size if run.record is not None else longest
    if window is None:
        raise InputError(f"the configuration of {run.folder} does not say how much it reads at once; give --window")
    if longest is not None and window > longest:
        raise InputError(f"--window is {window}; {run.folder} reads 1 to {longest} tokens at once")
    stride = max(1, window // 2) if settings.stride is None else settings.stride
    if stride > window:
        raise InputError(f"--stride is {stride}; of windows of {window} tokens it must be 1 to {window}")
    return window, stride


def _texts(run: OpenRun, settings: TextSettings) -> Iterable[str]:
    """The documents to evaluate on, read as they are needed; those without text are left out."""
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
        raise InputError(f"{run.folder} has no {RUN_FILE}, so no corpus of its own; give --text SOURCE")
    if run.corpus is not None and (documents := run.corpus / "documents" / "validation").is_dir():
        return load_from_disk(str(documents))["text"]
    source = os.path.expanduser(run.record.recipe["corpus"]["source"])
    if is_nanogpt_folder(source):
        return validation_texts(Path(source), run.tokenizer)
    reason = "is not beside it" if run.corpus is None else "is of tokens, whose text was not kept"
    raise InputError(f"the corpus that {run.folder} was trained on {reason}; give --text SOURCE")


def _training_frequencies(run: OpenRun) -> np.ndarray | None:
    """(V,) how often each token occurs in the first `COUNTED_BLOCKS` training blocks; None without them."""
    if run.corpus is None:
        return None
    blocks = load_packed(run.corpus).train
    rows, count = Blocks(blocks, ["input_ids"]), min(len(blocks), COUNTED_BLOCKS)
    total = np.zeros(vocabulary_size(run.tokenizer), np.int64)
    for start in range(0, count, 1024):
        ids = collate(rows.__getitems__(list(range(start, min(start + 1024, count)))))["input_ids"]
        total += np.bincount(ids.flatten().numpy(), minlength=len(total))
    return total
