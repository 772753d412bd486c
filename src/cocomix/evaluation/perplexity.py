"""How well a model predicts text: every token of every document once, in windows that overlap.

A document of n tokens is read as in training, with end-of-text before it: the model reads end-of-text and tokens 1 to
n − 1 and predicts tokens 1 to n. End-of-text itself is context, never a target: the sums are over text, and the bytes
that they are divided by are those of the same text.

N documents, n tokens of a document, W tokens of a window, V vocabulary.
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
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cocomix import fingerprint
from cocomix.data.packing import batches
from cocomix.data.tokenizer import changed_characters, encode_documents, vocabulary_size
from cocomix.errors import InputError
from cocomix.evaluation.documents import DocumentLosses, bootstrap_ratios, percentile_interval
from cocomix.evaluation.validation import autocast, bits_per_byte
from cocomix.models.losses import IGNORE

PER_MILLION = (0, 1, 10, 100, 1000, 10000)
"""Bounds between token frequencies, occurrences per million tokens; a bucket holds its lower bound."""


class Window(NamedTuple):
    """Part of a document that the model reads at once: tokens `start` ≤ i < `stop`, of which token 0 is end-of-text.

    Token i predicts token i + 1; predictions of tokens `new` ≤ i are counted, those before were by another window.
    """

    start: int
    new: int
    stop: int


def windows(n: int, size: int, stride: int) -> Iterator[Window]:
    """The windows of a document of n tokens: each prediction counted once, by one of them.

    Every window is as long as `size` allows. After the first, each counts the `stride` predictions that come next, so
    none has less than `size` − `stride` + 1 tokens of context, unless the document itself has less before it. With
    `stride` = `size` these are the windows of lm-evaluation-harness' rolling log-likelihood.
    """
    new = 0
    while new < n:
        stop = min(n, new + (stride if new else size))
        yield Window(max(0, stop - size), new, stop)
        new = stop


@dataclass(frozen=True)
class LossSums:
    """Losses of predicted tokens, added up by something that each token has.

    Attributes:
        nll: (bins,) float64, nats.
        tokens: (bins,) int64.
    """

    nll: np.ndarray
    tokens: np.ndarray

    @classmethod
    def zeros(cls, bins: int) -> LossSums:
        """Nothing added yet."""
        return cls(np.zeros(bins), np.zeros(bins, dtype=np.int64))

    def add(self, bins: np.ndarray | int, nll: np.ndarray) -> None:
        """Add tokens: the bin of each, or the one bin of all, and their losses."""
        of_each = np.broadcast_to(bins, nll.shape)
        np.add.at(self.nll, of_each, nll)
        np.add.at(self.tokens, of_each, 1)


@dataclass(frozen=True)
class TextLosses:
    """A model's losses on documents, added up in three ways; each of them holds every predicted token.

    Attributes:
        documents: (N,) of each document.
        document_bytes: (N,) int64, UTF-8 bytes of each.
        contexts: (W,) by context: entry c of tokens that were predicted from c + 1 tokens, end-of-text included.
        vocabulary: (V,) of each token of the vocabulary, where it was the target.
        fingerprint: of the texts, in order.
        text_changed: share of the texts' characters that their tokens do not give back.
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
    """The losses of a model in evaluation mode.

    Args:
        model: any causal language model.
        tokenizer: the model's; it must have an end-of-text token.
        texts: documents; each has at least one token.
        window: W, tokens read at once; at least 1.
        stride: tokens that each window after a document's first counts, 1 ≤ stride ≤ W.
        batch_size: windows read at once.
        precision: `fp32`, or `bf16` for matrix products.

    Raises:
        InputError: there is no text, or a loss is not a finite number.
    """
    assert not model.training, "evaluation in training mode"
    assert 1 <= stride <= window
    contexts, vocabulary = LossSums.zeros(window), LossSums.zeros(vocabulary_size(tokenizer))
    documents: list[LossSums] = []
    sizes: list[int] = []
    digest = hashlib.sha256()
    characters = changed = 0
    with tqdm(desc="Predicting", unit=" tokens", unit_scale=True, leave=False, disable=None) as progress:
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
        raise InputError("there is no text to evaluate on, or none of which the tokenizer makes a token")
    nll, tokens = (np.concatenate([getattr(each, name) for each in documents]) for name in ("nll", "tokens"))
    if not np.isfinite(nll).all():
        raise InputError(f"the model's loss in {precision} is not a finite number; were its weights saved whole?")
    return TextLosses(
        DocumentLosses(nll, tokens),
        np.array(sizes),
        contexts,
        vocabulary,
        digest.hexdigest()[: fingerprint.LENGTH],
        changed / characters,
    )


class _Predicted(NamedTuple):
    """What one window counts."""

    document: int
    contexts: np.ndarray  # tokens read before each, less one
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
    """Every prediction of some documents, given without end-of-text."""
    documents = [torch.tensor([end_of_text, *ids]) for ids in encoded]
    parts = [(number, each) for number, ids in enumerate(encoded) for each in windows(len(ids), window, stride)]
    parts.sort(key=lambda part: part[1].start - part[1].stop)  # long ones first: windows of a batch are as long
    for first in range(0, len(parts), batch_size):
        together = parts[first : first + batch_size]
        longest = max(part.stop - part.start for _, part in together)
        # What pads a shorter window comes after it, where causal attention does not look.
        inputs = torch.full((len(together), longest), end_of_text)
        targets = torch.full((len(together), longest), IGNORE)
        for row, (number, part) in enumerate(together):
            counted, length = part.new - part.start, part.stop - part.start
            inputs[row, :length] = documents[number][part.start : part.stop]
            targets[row, counted:length] = documents[number][part.new + 1 : part.stop + 1]
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
    """What `evaluation.json` says of them; losses in nats per token, intervals of 95 % over documents.

    Args:
        losses: of a model on text.
        frequencies: (V,) how often each token of the vocabulary occurs in some text.

    Returns:
        `documents`, `tokens`, `bytes`, counted exactly; `loss`, `perplexity` and `bits_per_byte`, each with its
        `…_interval`, None for a single document; `text_changed`; `by_context` and `by_frequency`, lists of buckets.
    """
    nll, tokens = losses.documents.nll, losses.documents.tokens
    size, count = int(losses.document_bytes.sum()), int(tokens.sum())
    loss = float(nll.sum() / count)
    of_loss = of_bits = None
    if len(nll) > 1:
        of_loss = percentile_interval(bootstrap_ratios(nll, tokens))
        of_bits = percentile_interval(bootstrap_ratios(nll / math.log(2), losses.document_bytes))
    return {
        "documents": len(nll),
        "tokens": count,
        "bytes": size,
        "loss": loss,
        "loss_interval": of_loss,
        "perplexity": math.exp(loss),
        "perplexity_interval": of_loss and tuple(map(math.exp, of_loss)),
        "bits_per_byte": bits_per_byte(loss, size / count),
        "bits_per_byte_interval": of_bits,
        "text_changed": losses.text_changed,
        "by_context": _by_context(losses.contexts),
        "by_frequency": _by_frequency(losses.vocabulary, frequencies),
    }


def _by_context(losses: LossSums) -> list[dict[str, Any]]:
    """Contexts of 1, 2, 3–4, 5–8, … tokens."""
    window = len(losses.nll)
    edges = [0, *(2**power for power in range((window - 1).bit_length())), window]
    return [
        {"from": low + 1, "to": high, **mean}
        for low, high in pairwise(edges)
        if (mean := _mean(losses, slice(low, high)))
    ]


def _by_frequency(losses: LossSums, frequencies: np.ndarray) -> list[dict[str, Any]]:
    """Target tokens by how many of a million tokens they are."""
    per_million = frequencies * 1e6 / frequencies.sum()
    bounds = [*PER_MILLION, math.inf]
    buckets: list[tuple[float, float, np.ndarray]] = [(0, 0, per_million == 0)]  # those that never occur
    buckets += [(a, b, (per_million > 0) & (per_million >= a) & (per_million < b)) for a, b in pairwise(bounds)]
    return [
        {"from": low, "to": None if high == math.inf else high, **mean}
        for low, high, chosen in buckets
        if (mean := _mean(losses, chosen))
    ]


def _mean(losses: LossSums, chosen: slice | np.ndarray) -> dict[str, Any] | None:
    """Tokens and mean loss of some bins; None of no token."""
    tokens = int(losses.tokens[chosen].sum())
    return {"tokens": tokens, "loss": float(losses.nll[chosen].sum() / tokens)} if tokens else None
