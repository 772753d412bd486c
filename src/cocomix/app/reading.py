"""Run a model on a text, for the loss and the mixed-in concepts at each token.

T tokens, C concepts, K concepts mixed in per token.
"""

from __future__ import annotations

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
        text: the text.
        tokens: text of each token (`token_pieces`).
        losses: (T,) −log p of each token given those before it, in nats; NaN for the first.
        indices: (T, K) the concepts that are mixed in, strongest first.
        logits: (T, K) logits of these concepts.
    """

    text: str
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


def read_text(run: OpenRun, text: str, limits: Limits) -> Reading:
    """Read a text in one forward pass.

    Raises:
        InputError: the text is empty or too long.
    """
    limits.check_characters(text)
    ids = text_ids(run.tokenizer, text, limits.read_tokens)
    with torch.no_grad():
        output = run.model(ids[None].to(run.model.device), output_concepts=True, use_cache=False)
    logprobs = output.logits[0, :-1].float().log_softmax(-1).cpu()  # (T − 1, V)
    losses = -logprobs.gather(-1, ids[1:, None])[:, 0]
    kept = output.concept_logits[0].float().topk(run.model.config.num_active_concepts)
    return Reading(
        text=text,
        tokens=token_pieces(run.tokenizer, ids.tolist()),
        losses=np.concatenate(([np.nan], losses.numpy())),
        indices=kept.indices.cpu().numpy(),
        logits=kept.values.cpu().numpy(),
    )


def token_concepts(run: OpenRun, reading: Reading, written: object) -> TracedToken:
    """Trace the concepts at a token, and ablate the strongest `BARS` of them.

    Raises:
        InputError: the position is not in the text.
    """
    text = str(written)
    if not (text.isdecimal() and text.isascii() and len(text) < 12 and int(text) < len(reading.tokens)):
        raise InputError(f"there is no token {text[:40]}; the text has 0 to {len(reading.tokens) - 1}")
    found = trace(run.model, run.tokenizer, reading.text, names=run.names, ablate=BARS, positions=[int(text)])
    return found.tokens[0]
