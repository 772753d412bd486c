"""What the page shows first: facts about the model, an example prompt, and an example concept."""

from __future__ import annotations

import itertools
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cocomix.app.limits import STRONGEST
from cocomix.inspection.effects import CANDIDATES, ROWS, SMALL, candidates, rank_effects
from cocomix.inspection.runs import OpenRun
from cocomix.inspection.tracing import text_ids

PROMPT_TOKENS = 24
"""Maximum length of the example prompt."""
STRENGTH = 6.0
"""Initial strength if no text shows which logits are typical."""


class Opening(NamedTuple):
    """Initial state of the page."""

    prompt: str
    """Beginning of a text from the catalog; empty without one."""
    concepts: list[int]
    """Initially steered concepts: one, or none without a catalog."""
    strength: float
    """Initial strength of each steered concept."""
    typical: str
    """Range of the logits of mixed-in concepts; empty if there is no text to read."""


def opening(run: OpenRun) -> Opening:
    """Choose a text from the catalog, and the concept that has the largest effect after it at a typical strength."""
    ids = _example(run)
    if not len(ids):
        return Opening("", [], STRENGTH, "")
    with torch.no_grad():
        output = run.model(ids[None].to(run.model.device), output_concepts=True, use_cache=False)
    logits = output.concept_logits[0].float().topk(run.model.config.num_active_concepts).values
    low, high = np.quantile(logits.cpu().numpy(), (0.1, 0.9))
    strength = max(1.0, min(STRONGEST, round(2 * float(high)) / 2))
    first = Opening(run.tokenizer.decode(ids), [], strength, f"{low:.1f} to {high:.1f}")
    return first._replace(concepts=effects(run, first, ROWS)[:1])


def _example(run: OpenRun) -> Tensor:
    """Return the tokens of a line of text in which the concept that is a label most often is active."""
    if run.catalog is not None and run.catalog.steerable:
        for context in run.catalog.concept(run.catalog.steerable[0]).contexts:
            if line := (context.before + context.token).rstrip().rpartition("\n")[2].strip():
                kept = min(PROMPT_TOKENS, run.model.config.max_position_embeddings // 2)
                return text_ids(run.tokenizer, line, sys.maxsize)[-kept:]
    return torch.tensor([], dtype=torch.long)


def effects(run: OpenRun, opening: Opening, limit: int = CANDIDATES) -> list[int]:
    """Rank up to `limit` concepts by what steering does to the token after the example prompt (`rank_effects`)."""
    if run.catalog is None or not opening.prompt:
        return []
    tokens = dict(itertools.islice(candidates(run.catalog, run.tokenizer).items(), limit))
    ids = text_ids(run.tokenizer, opening.prompt, sys.maxsize)
    return [effect.concept_id for effect in rank_effects(run.model, ids, tokens, opening.strength)]


def title(run: OpenRun) -> str:
    """Return the name of the run: for OUTPUT/students/NAME, those of the output and the student."""
    folder = run.folder.resolve()
    return f"{folder.parent.parent.name} / {folder.name}" if folder.parent.name == "students" else folder.name


def facts(run: OpenRun) -> list[str]:
    """Describe the model: folder, size and what it can show, loss, and context."""
    size = run.model.num_parameters()
    loss = None if run.record is None else run.record.metrics.get("loss")
    return [
        str(run.folder),
        f"{size / 1e6:,.2f} million parameters",
        *([] if loss is None else [f"validation loss {loss:.2f} nats per token"]),
        f"context of {run.model.config.max_position_embeddings:,} tokens",
        *(["a model of this size illustrates the mechanics only"] if size < SMALL else []),
    ]
