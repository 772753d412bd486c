"""Continuous concept mixing: predict the next token and the teacher's concepts (arXiv 2502.08524, total loss).

Optionally with distillation, which the paper did not try.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.models.losses import IGNORE
from cocomix.objectives.base import Batch, Counts, Losses
from cocomix.objectives.distillation import Distillation
from cocomix.objectives.gate import TeacherGate
from cocomix.objectives.ntp import count_tokens
from cocomix.objectives.schedule import WeightSchedule, scheduled

Labeler = Callable[[Tensor], Tensor]
"""Computes concept labels (B, T, A) of blocks (B, T), −100 for none."""


@dataclass(frozen=True)
class ConceptMixing:
    """L_token + λ · L_concept of a `CoCoMixForCausalLM`.

    Args:
        labeler: computes the labels of each batch; by default they are read from the column `concept_ids`.
        distillation: adds the divergence from the teacher, with its weight.
        weight: λ; by default the model's `concept_loss_weight`. With weight 0, the labeler does not run. The loss on
            stored labels is still computed, because it costs no product that the mixer does not need, and logged.
        schedule: how λ changes during training; it needs `weight`.
        has_weights: whether labels have the weights of the column `concept_weights`; otherwise they count equally.
        gate: weights the concept loss and the divergence of each token (`objectives/gate.py`). While neither has an
            effect, the teacher does not run for it.
    """

    labeler: Labeler | None = None
    distillation: Distillation | None = None
    weight: float | None = None
    schedule: WeightSchedule | None = None
    has_weights: bool = False
    gate: TeacherGate | None = None

    def at(self, progress: float) -> ConceptMixing:
        """Return the objective of a step, with the weights of the schedules."""
        weight = self.weight if self.weight is None else scheduled(self.weight, self.schedule, progress)
        return replace(self, weight=weight, distillation=self.distillation and self.distillation.at(progress))

    def scheduled_weights(self) -> dict[str, float]:
        """Return the weights that change."""
        own = {} if self.schedule is None or self.weight is None else {"concept_loss_weight": self.weight}
        return own | (self.distillation.scheduled_weights() if self.distillation else {})

    @property
    def columns(self) -> tuple[str, ...]:
        """`input_ids`, and the labels, predictions and losses of the teacher that are stored."""
        labels = () if self.labeler else ("concept_ids", *(("concept_weights",) if self.has_weights else ()))
        predictions = self.distillation.columns if self.distillation else ()
        losses = self.gate.columns if self.gate else ()
        return tuple(dict.fromkeys(("input_ids", *labels, *predictions, *losses)))

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """Label all micro-batches at once, since the teacher may read more blocks at a time than the student."""
        if self.labeler is None or not batches:
            return batches
        if self.weight == 0:
            return [{**batch, "concept_ids": _no_labels(batch["input_ids"])} for batch in batches]
        sizes = [len(batch["input_ids"]) for batch in batches]
        labels = self.labeler(torch.cat([batch["input_ids"] for batch in batches])).split(sizes)
        return [{**batch, "concept_ids": ids} for batch, ids in zip(batches, labels, strict=True)]

    def count(self, batch: Batch) -> Counts:
        """Count predicted tokens, and tokens with at least one concept label."""
        labeled = (batch["concept_ids"] != IGNORE).any(-1).sum()
        return {"token": count_tokens(batch), "concept": labeled}

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute the losses."""
        distillation = self.distillation if self.distillation is not None and self.distillation.weight > 0 else None
        more: dict[str, Any] = {}
        if distillation is not None:
            more["teacher_tokens"] = distillation.teacher_tokens(batch)
        if self.gate is not None and (self.weight != 0 or distillation is not None):
            more["gate"] = self.gate(batch, more["teacher_tokens"].distribution if distillation else None)
        output = model(
            input_ids=batch["input_ids"],
            labels=batch["input_ids"],
            concept_ids=batch["concept_ids"],
            concept_weights=batch.get("concept_weights"),
            num_items_in_batch=counts["token"],
            num_concept_items_in_batch=counts["concept"],
            output_logits=False,
            use_cache=False,
            **more,
        )
        parts = {"token_loss": output.token_loss.detach()}
        if self.labeler is None or self.weight != 0:
            parts["concept_loss"] = output.concept_loss.detach()
        if distillation is not None:
            parts["kd_loss"] = output.kd_loss
        if "gate" in more:
            parts["mean_gate"] = output.mean_gate
        if self.weight is None:
            return Losses(output.loss, parts)
        total = output.token_loss + self.weight * output.concept_loss
        return Losses(total if distillation is None else total + distillation.weight * output.kd_loss, parts)


def _no_labels(input_ids: Tensor) -> Tensor:
    """Return the labels (B, T, 1) of blocks (B, T) without labels."""
    return torch.full_like(input_ids, IGNORE).unsqueeze(-1)
