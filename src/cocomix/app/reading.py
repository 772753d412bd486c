"""Run a model on a text, for the loss and the mixed-in concepts at each token.

A text that is longer than the model's context is read in windows that overlap by half: each token behind the first
window is read with at least half a context before it.

T tokens, C concepts, K concepts mixed in per token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from cocomix.app.limits import Limits
from cocomix.common.errors import InputError
from cocomix.data.pieces import token_pieces
from cocomix.inspection.runs import OpenRun
from cocomix.inspection.trace import TracedToken
from cocomix.inspection.tracing import text_ids, trace

BARS = 12
"""Number of the strongest concepts of a token that are shown and ablated."""


@dataclass(frozen=True)
class Reading:
    """The result of reading a text.

    Attributes:
        ids: (T,) the tokens that were read.
        total: number of tokens of the text, of which the first T were read.
        tokens: text of each token (`token_pieces`).
        losses: (T,) −log p of each token given those before it, in nats; NaN for the first.
        indices: (T, K) the concepts that are mixed in, strongest first.
        logits: (T, K) logits of these concepts.
    """

    ids: list[int]
    total: int
    tokens: list[str]
    losses: np.ndarray
    indices: np.ndarray
    logits: np.ndarray

    def strengths(self, concept: int) -> np.ndarray:
        """Return (T,) the logit of a concept where it is mixed in, NaN elsewhere."""
        mixed = self.indices == concept  # (T, K), at most one in a row
        return np.where(mixed.any(-1), np.where(mixed, self.logits, 0).sum(-1), np.nan)

    def strongest(self, limit: int) -> list[int]:
        """Return the concepts with the largest logits anywhere in the text, strongest first."""
        order = np.argsort(-self.logits, axis=None, kind="stable")
        concepts = self.indices.flat[order]
        _, first = np.unique(concepts, return_index=True)
        return concepts[np.sort(first)[:limit]].tolist()


def window_start(position: int, context: int) -> int:
    """Return where the window begins in which the token at this position is read."""
    step = max(1, context // 2)
    return 0 if position < context else ((position - context) // step + 1) * step


def read_text(run: OpenRun, text: str, limits: Limits) -> Reading:
    """Read a text, with one forward pass per window.

    Raises:
        InputError: the text is empty or has too many characters.
    """
    limits.check_characters(text)
    ids = text_ids(run.tokenizer, text, limits.characters)
    total, ids = len(ids), ids[: limits.read_tokens]
    context, k = run.model.config.max_position_embeddings, run.model.config.num_active_concepts
    losses, indices, logits = [], [], []
    for start in sorted({window_start(position, context) for position in range(len(ids))}):
        window = ids[start : start + context]
        with torch.no_grad():
            output = run.model(window[None].to(run.model.device), output_concepts=True, use_cache=False)
        new = 0 if start == 0 else context - max(1, context // 2)  # tokens that the window before has read too
        logprobs = output.logits[0, :-1].float().log_softmax(-1).cpu()  # (window − 1, V)
        lost = -logprobs.gather(-1, window[1:, None])[:, 0]
        losses.append(lost[max(0, new - 1) :])
        kept = output.concept_logits[0].float().topk(k)
        indices.append(kept.indices[new:].cpu().numpy())
        logits.append(kept.values[new:].cpu().numpy())
    return Reading(
        ids=ids.tolist(),
        total=total,
        tokens=token_pieces(run.tokenizer, ids.tolist()),
        losses=np.concatenate(([np.nan], torch.cat(losses).numpy())),
        indices=np.concatenate(indices),
        logits=np.concatenate(logits),
    )


def token_concepts(run: OpenRun, reading: Reading, written: object) -> TracedToken:
    """Trace the concepts at a token, and ablate the strongest `BARS` of them.

    Raises:
        InputError: the position is not in the text.
    """
    text = str(written)
    if not (text.isdecimal() and text.isascii() and len(text) < 12 and int(text) < len(reading.tokens)):
        raise InputError(f"there is no token {text[:40]}; the text has 0 to {len(reading.tokens) - 1}")
    position, context = int(text), run.model.config.max_position_embeddings
    start = window_start(min(position + 1, len(reading.ids) - 1), context)  # its effects are on the next token
    window = reading.ids[start : start + context]
    found = trace(run.model, run.tokenizer, window, names=run.names, ablate=BARS, positions=[position - start])
    return dataclasses.replace(found.tokens[0], position=position)
