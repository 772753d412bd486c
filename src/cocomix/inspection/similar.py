"""Find concepts that a model mixes in alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


class SimilarConcept(NamedTuple):
    """A concept and how similar its contribution is to that of another one."""

    concept_id: int
    cosine: float
    """Cosine between the rows of W_comp of both concepts, −1 to 1."""


@torch.no_grad()
def similar_concepts(model: Any, concept: int, count: int) -> list[SimilarConcept]:
    """Rank the other concepts by the cosine between their rows of W_comp and that of `concept`.

    A row of W_comp is the direction that a concept adds to the continuous vector (arXiv 2502.08524, section 2), so
    steering similar concepts has similar effects.

    Args:
        model: model that mixes concepts.
        concept: 0 ≤ concept < C.
        count: maximum number of concepts.

    Returns:
        The most similar first.
    """
    rows = model.mixer.compress_weight.float()
    cosines = F.cosine_similarity(rows, rows[concept], dim=-1)
    cosines[concept] = -torch.inf
    found = cosines.topk(min(count, len(cosines) - 1))
    return [SimilarConcept(*each) for each in zip(found.indices.tolist(), found.values.tolist(), strict=True)]
