"""Label a token with the concepts that stand out in the tokens after it. This is this project's own criterion.

With a_i(u) the activation of latent i at token u, and W(t) the tokens t + 1 … t + w that lie in the document and block
of token t, the score of latent i at token t is

    s_i(t) = log(N / n_i) · 1 / |W(t)| · Σ over u in W(t) of a_i(u),

the mean activation times the inverse document frequency of information retrieval, where n_i is the number of tokens, of
N counted ones, at which latent i is active. A latent that is active at every token has score 0. The labels of t are the
A latents with the largest positive scores.

B blocks, T tokens, C latents, A labels per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cocomix.concepts.attribution import ConceptExtractor, ConceptLabels
from cocomix.concepts.label_tables import SAMPLE_BLOCKS
from cocomix.concepts.reading import TeacherReader
from cocomix.concepts.teacher import next_token_targets, residual_stream
from cocomix.models.losses import IGNORE

MAX_ACTIVATIONS = 2**25
"""Activations that are held at once, with the zeros of inactive latents."""


def inverse_frequencies(extractor: ConceptExtractor, reader: TeacherReader, blocks_per_batch: int) -> Tensor:
    """Return (C,) log(N / n_i), counted over the first `SAMPLE_BLOCKS` blocks; n_i is at least 1."""
    counts = torch.zeros(extractor.sae.d_sae, dtype=torch.int64, device=extractor.teacher.device)
    tokens, stop = 0, min(SAMPLE_BLOCKS, len(reader))
    for start in range(0, stop, blocks_per_batch):
        ids = reader(start, min(start + blocks_per_batch, stop)).input_ids.to(extractor.teacher.device)
        latents = extractor.sae.encode(residual_stream(extractor.teacher, ids, extractor.teacher_layer))
        counts += torch.bincount(latents.indices[latents.values > 0], minlength=len(counts))
        tokens += ids.numel()
    return torch.log(tokens / counts.clamp(min=1).double()).float()


def mean_over_window(activations: Tensor, documents: Tensor, window: int) -> Tensor:
    """Return (…, T, C) the mean activations over the next `window` tokens of the same document; 0 if there are none.

    Args:
        activations: (…, T, C).
        documents: (…, T) number of the document of each token.
        window: w.
    """
    total = torch.zeros_like(activations)
    count = torch.zeros_like(documents)
    for ahead in range(1, min(window, documents.shape[-1] - 1) + 1):
        same = documents[..., ahead:] == documents[..., :-ahead]
        total[..., :-ahead, :] += activations[..., ahead:, :] * same.unsqueeze(-1)
        count[..., :-ahead] += same
    return total / count.clamp(min=1).unsqueeze(-1)


class WindowExtractor(ConceptExtractor):
    """Label text with the concepts that stand out over the next tokens.

    Args:
        window: w ≥ 1.
        inverse_frequency: (C,) log(N / n_i).
        eos_token_id: id of end-of-text, which ends documents.
        arguments: those of `ConceptExtractor`.
    """

    def __init__(self, *arguments: Any, window: int, inverse_frequency: Tensor, eos_token_id: int) -> None:
        super().__init__(*arguments)
        self.window, self.eos_token_id = window, eos_token_id
        self.inverse_frequency = inverse_frequency.to(self.sae.W_dec)

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ConceptLabels:
        """Label input_ids (B, T), whose rows are packed documents without padding."""
        assert attention_mask is None, "windows are counted in the students' tokens"
        latents = self.sae.encode(residual_stream(self.teacher, input_ids, self.teacher_layer))
        is_end = (input_ids == self.eos_token_id).long()
        documents = is_end.cumsum(-1) - is_end
        has_target = next_token_targets(input_ids) != IGNORE
        at_once = max(1, MAX_ACTIVATIONS // (input_ids.shape[-1] * self.sae.d_sae))  # blocks
        found = []
        parts = (part.split(at_once) for part in (*latents[:2], documents, has_target))
        for values, indices, document, targets in zip(*parts, strict=True):
            # Added, because the id of an inactive latent is that of any other.
            dense = values.new_zeros(*values.shape[:2], self.sae.d_sae).scatter_add_(-1, indices, values)  # (B', T, C)
            found.append(self._strongest(mean_over_window(dense, document, self.window), targets))
        ids, scores, activations = (torch.cat(parts) for parts in zip(*found, strict=True))
        cut = torch.zeros_like(has_target) if latents.cut is None else latents.cut
        return ConceptLabels(ids, scores, cut, activations)

    def _strongest(self, means: Tensor, has_target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids, scores and mean activations (B, T, A) of the labels, given the mean activations (B, T, C)."""
        count = min(self.labels_per_token, means.shape[-1])
        scores, ids = (means * self.inverse_frequency).topk(count, dim=-1)
        found = (scores > 0) & has_target.unsqueeze(-1)
        kept = means.gather(-1, ids).masked_fill(~found, 0.0)
        missing = (0, self.labels_per_token - count)
        return (
            F.pad(ids.masked_fill(~found, IGNORE), missing, value=IGNORE),
            F.pad(scores.masked_fill(~found, 0.0), missing),
            F.pad(kept, missing),
        )
