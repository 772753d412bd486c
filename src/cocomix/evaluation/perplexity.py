"""Perplexity and bits per byte: every token of every document is predicted once, in overlapping windows.

A document of n tokens is read as in training, with end-of-text before it: the model reads end-of-text and tokens 1 to
n − 1, and predicts tokens 1 to n. End-of-text is context, never a target, so losses and bytes cover the same text.

N documents, n tokens of a document, W tokens of a window, V vocabulary size.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix.common import fingerprint
from cocomix.common.console import progress_bar
from cocomix.common.errors import InputError
from cocomix.data.packing import batches
from cocomix.data.tokenizer import changed_characters, encode_documents, vocabulary_size
from cocomix.evaluation.statistics import MIN_DOCUMENTS, bootstrap_ratios, percentile_interval
from cocomix.models.losses import IGNORE
from cocomix.training.documents import DocumentLosses
from cocomix.training.validation import autocast, bits_per_byte

PER_MILLION = (0, 1, 10, 100, 1000, 10000)
"""Bounds of the token-frequency buckets, occurrences per million tokens; a bucket includes its lower bound."""


class Window(NamedTuple):
    """A part of a document: tokens `start` ≤ i < `stop`, where token 0 is end-of-text.

    Token i predicts token i + 1. The window scores the predictions of tokens i ≥ `new`; an earlier window scored the
    others.
    """

    start: int
    new: int
    stop: int


def windows(n: int, size: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a document of n tokens; each prediction is scored by exactly one window.

    The first window scores `size` predictions, each later one the next `stride`. A prediction therefore has at least
    `size` − `stride` + 1 tokens of context, unless the document has fewer before it. With `stride` = `size`, the
    windows are those of the harness' `loglikelihood_rolling`.
    """
    new = 0
    while new < n:
        stop = min(n, new + (stride if new else size))
        yield Window(max(0, stop - size), new, stop)
        new = stop


@dataclass(frozen=True)
class LossSums:
    """Losses of predicted tokens, summed by bin.

    Attributes:
        nll: (bins,) float64, summed negative log-likelihood, nats.
        tokens: (bins,) int64, number of tokens.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @classmethod
    def zeros(cls, bins: int) -> LossSums:
        """Create empty sums."""
        return cls(np.zeros(bins), np.zeros(bins, dtype=np.int64))

    def add(self, bins: np.ndarray | int, nll: np.ndarray) -> None:
        """Add the losses of tokens, given the bin of each token or one bin for all."""
        token_bins = np.broadcast_to(bins, nll.shape)
        np.add.at(self.nll, token_bins, nll)
        np.add.at(self.tokens, token_bins, 1)


@dataclass(frozen=True)
class TextLosses:
    """A model's losses on documents, summed by document, context length and target token.

    Attributes:
        documents: (N,) sums by document.
        document_bytes: (N,) int64, UTF-8 bytes of each document.
        contexts: (W,) sums by context length; entry c holds tokens predicted from c + 1 tokens, end-of-text included.
        vocabulary: (V,) sums by target token.
        fingerprint: hash of the texts, in order.
        text_changed: share of the characters that decoding the tokens does not restore.
    """

    documents: DocumentLosses
    document_bytes: np.ndarray
    contexts: LossSums
    vocabulary: LossSums
    fingerprint: str
    text_changed: float


@torch.no_grad()
def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    window: int,
    stride: int,
    batch_size: int,
    precision: str,
) -> TextLosses:
    """Compute a model's losses on documents.

    Args:
        model: any causal language model, in evaluation mode.
        tokenizer: the model's tokenizer, with an end-of-text token.
        texts: the documents.
        window: W, tokens per window, at least 1.
        stride: tokens that each window after a document's first scores, 1 ≤ stride ≤ W.
        batch_size: windows per batch.
        precision: `fp32`, or `bf16` for matrix products.

    Raises:
        InputError: there is no text, or a loss is not finite.
    """
    assert not model.training, "evaluation in training mode"
    assert 1 <= stride <= window
    contexts, vocabulary = LossSums.zeros(window), LossSums.zeros(vocabulary_size(tokenizer))
    documents: list[LossSums] = []
    sizes: list[int] = []
    digest = hashlib.sha256()
    characters = changed = 0
    with progress_bar(desc="Predicting", unit=" tokens", unit_scale=True, leave=False) as progress:
        for batch in batches(texts):
            encoded = encode_documents(tokenizer, batch)
            characters += sum(map(len, batch))
            changed += changed_characters(tokenizer, batch, encoded)
            found = LossSums.zeros(len(batch))
            for part in _predicted(model, encoded, tokenizer.eos_token_id, window, stride, batch_size, precision):
                found.add(part.document, part.nll)
                contexts.add(part.contexts, part.nll)
                vocabulary.add(part.targets, part.nll)
                progress.update(len(part.nll))
            documents.append(found)
            for content in map(str.encode, batch):
                sizes.append(len(content))
                digest.update(hashlib.sha256(content).digest())
    if not sum(each.tokens.sum() for each in documents):
        raise InputError("there is no text to evaluate on, or the tokenizer produces no tokens for it")
    nll, tokens = (np.concatenate([getattr(each, name) for each in documents]) for name in ("nll", "tokens"))
    if not np.isfinite(nll).all():
        raise InputError(f"the model's loss in {precision} is not finite; check that its weights are complete")
    return TextLosses(
        DocumentLosses(nll, tokens),
        np.array(sizes),
        contexts,
        vocabulary,
        digest.hexdigest()[: fingerprint.LENGTH],
        changed / characters,
    )


class _Predicted(NamedTuple):
    """The predictions that one window scores."""

    document: int
    contexts: np.ndarray  # context length of each, minus one
    targets: np.ndarray
    nll: np.ndarray


def _predicted(
    model: PreTrainedModel,
    encoded: list[list[int]],
    end_of_text: int,
    window: int,
    stride: int,
    batch_size: int,
    precision: str,
) -> Iterator[_Predicted]:
    """Yield every prediction of some documents, which are given without end-of-text."""
    documents = [torch.tensor([end_of_text, *ids]) for ids in encoded]
    parts = [(number, each) for number, ids in enumerate(encoded) for each in windows(len(ids), window, stride)]
    parts.sort(key=lambda part: part[1].start - part[1].stop)  # longest first: similar lengths per batch
    for first in range(0, len(parts), batch_size):
        together = parts[first : first + batch_size]
        longest = max(part.stop - part.start for _, part in together)
        # Padding follows the tokens of a shorter window, so causal attention ignores it.
        inputs = torch.full((len(together), longest), end_of_text)
        targets = torch.full((len(together), longest), IGNORE)
        for row, (number, part) in enumerate(together):
            first_scored, length = part.new - part.start, part.stop - part.start
            inputs[row, :length] = documents[number][part.start : part.stop]
            targets[row, first_scored:length] = documents[number][part.new + 1 : part.stop + 1]
        with autocast(model.device, precision):
            logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
        losses = F.cross_entropy(
            logits.float().flatten(0, 1), targets.flatten().to(model.device), ignore_index=IGNORE, reduction="none"
        )
        nll = losses.view(inputs.shape).cpu().double().numpy()
        for row, (number, part) in enumerate(together):
            contexts = np.arange(part.new, part.stop) - part.start
            yield _Predicted(number, contexts, targets[row, contexts].numpy(), nll[row, contexts])


def figures(losses: TextLosses, frequencies: np.ndarray) -> dict[str, Any]:
    """Compute the figures for `evaluation.json`: losses in nats per token, 95 % intervals over documents.

    Args:
        losses: losses of a model on text.
        frequencies: (V,) number of occurrences of each token in a reference text.

    Returns:
        `documents`, `tokens` and `bytes`, counted exactly; `loss`, `perplexity` and `bits_per_byte`, each with an
        `…_interval` that is None for fewer than `MIN_DOCUMENTS` documents; `text_changed`; `by_context` and
        `by_frequency`, lists of buckets.
    """
    nll, tokens = losses.documents.nll, losses.documents.tokens
    size, count = int(losses.document_bytes.sum()), int(tokens.sum())
    loss = float(nll.sum() / count)
    loss_interval = bits_interval = None
    if len(nll) >= MIN_DOCUMENTS:
        loss_interval = percentile_interval(bootstrap_ratios(nll, tokens))
        bits_interval = percentile_interval(bootstrap_ratios(nll / math.log(2), losses.document_bytes))
    return {
        "documents": len(nll),
        "tokens": count,
        "bytes": size,
        "loss": loss,
        "loss_interval": loss_interval,
        "perplexity": math.exp(loss),
        "perplexity_interval": loss_interval and tuple(map(math.exp, loss_interval)),
        "bits_per_byte": bits_per_byte(loss, size / count),
        "bits_per_byte_interval": bits_interval,
        "text_changed": losses.text_changed,
        "by_context": _by_context(losses.contexts),
        "by_frequency": _by_frequency(losses.vocabulary, frequencies),
    }


def _by_context(losses: LossSums) -> list[dict[str, Any]]:
    """Compute the mean loss for contexts of 1, 2, 3–4, 5–8, … tokens."""
    window = len(losses.nll)
    edges = [0, *(2**power for power in range((window - 1).bit_length())), window]
    return [
        {"from": low + 1, "to": high, **mean}
        for low, high in pairwise(edges)
        if (mean := _mean(losses, slice(low, high)))
    ]


def _by_frequency(losses: LossSums, frequencies: np.ndarray) -> list[dict[str, Any]]:
    """Compute the mean loss by the target token's occurrences per million tokens."""
    per_million = frequencies * 1e6 / frequencies.sum()
    bounds = [*PER_MILLION, math.inf]
    buckets: list[tuple[float, float, np.ndarray]] = [(0, 0, per_million == 0)]  # tokens that never occur
    buckets += [(a, b, (per_million > 0) & (per_million >= a) & (per_million < b)) for a, b in pairwise(bounds)]
    return [
        {"from": low, "to": None if high == math.inf else high, **mean}
        for low, high, chosen in buckets
        if (mean := _mean(losses, chosen))
    ]


def _mean(losses: LossSums, chosen: slice | np.ndarray) -> dict[str, Any] | None:
    """Return the number of tokens and the mean loss of some bins; None without tokens."""
    tokens = int(losses.tokens[chosen].sum())
    return {"tokens": tokens, "loss": float(losses.nll[chosen].sum() / tokens)} if tokens else None
