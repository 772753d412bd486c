"""Continuous concept mixing: predict the next token and the teacher's concepts (arXiv 2502.08524, total loss).

Optionally with distillation, which the paper did not try.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.models.losses import IGNORE
from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.distillation import Distillation
from cocomix.objectives.ntp import count_tokens

Labeler = Callable[[Tensor], Tensor]
"""Computes concept labels (B, T, A) of blocks (B, T), −100 for none."""


@dataclass(frozen=True)
class ConceptMixing:
    """L_token + λ · L_concept of a `CoCoMixForCausalLM`; λ is the model's `concept_loss_weight`.

    Args:
        labeler: computes the labels of each batch; by default they are read from the column `concept_ids`.
        distillation: adds the divergence from the teacher, with its weight.
    """

    labeler: Labeler | None = None
    distillation: Distillation | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """`input_ids`, and the labels and predictions that are stored."""
        labels = () if self.labeler else ("concept_ids",)
        predictions = self.distillation.columns if self.distillation else ()
        return tuple(dict.fromkeys(("input_ids", *labels, *predictions)))

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """Label all micro-batches at once, since the teacher may read more blocks at a time than the student."""
        if self.labeler is None or not batches:
            return batches
        sizes = [len(batch["input_ids"]) for batch in batches]
        labels = self.labeler(torch.cat([batch["input_ids"] for batch in batches])).split(sizes)
        return [{**batch, "concept_ids": ids} for batch, ids in zip(batches, labels, strict=True)]

    def count(self, batch: Batch) -> Counts:
        """Count predicted tokens, and tokens with at least one concept label."""
        labeled = (batch["concept_ids"] != IGNORE).any(-1).sum()
        return {"token": count_tokens(batch), "concept": labeled}

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute the losses; materialize logits for a divergence only."""
        output = model(
            input_ids=batch["input_ids"],
            labels=batch["input_ids"],
            concept_ids=batch["concept_ids"],
            num_items_in_batch=counts["token"],
            num_concept_items_in_batch=counts["concept"],
            output_logits=self.distillation is not None,
            use_cache=False,
        )
        parts = {"token_loss": output.token_loss.detach(), "concept_loss": output.concept_loss.detach()}
        if self.distillation is None:
            return Losses(output.loss, parts)
        kd_loss = self.distillation.teacher_loss(output.logits, batch, counts)
        return Losses(output.loss + self.distillation.weight * kd_loss, {**parts, "kd_loss": kd_loss.detach()})
