"""Knowledge distillation: predict the next token and the teacher's distribution over it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.models.divergence import Distribution, TeacherHidden, TeacherTokens, TopTokens
from cocomix.models.plain import plain_head
from cocomix.objectives.base import Batch, Counts, Losses, PredictTokens
from cocomix.objectives.gate import TeacherGate
from cocomix.objectives.ntp import NextToken
from cocomix.objectives.schedule import WeightSchedule, scheduled

COLUMNS = ("teacher_ids", "teacher_log_probs", "teacher_log_rest")
"""Dataset columns of stored predictions: the fields of `TopTokens`."""


@dataclass(frozen=True)
class Distillation(NextToken):
    """L_token + weight · KL(teacher ‖ student) of any causal language model (arXiv 2502.08524, section 3.1: 0.1).

    The divergence is averaged over the predicted tokens, as the token loss is.

    Args:
        weight: weight of the divergence. With weight 0, the teacher does not run.
        temperature: τ, temperature of both distributions.
        teacher: computes the teacher's distributions for each micro-batch; by default its top tokens are read from
            `COLUMNS`.
        schedule: how the weight changes during training.
        gate: weights the divergence of each token (`objectives/gate.py`).
    """

    weight: float = 0.1
    temperature: float = 1.0
    teacher: PredictTokens | None = None
    schedule: WeightSchedule | None = None
    gate: TeacherGate | None = None

    def at(self, progress: float) -> Distillation:
        """Return the objective of a step, with the weight of its schedule."""
        return replace(self, weight=scheduled(self.weight, self.schedule, progress))

    def scheduled_weights(self) -> dict[str, float]:
        """Return the weight if it changes."""
        return {} if self.schedule is None else {"kd_weight": self.weight}

    @property
    def columns(self) -> tuple[str, ...]:
        """`input_ids`, and the teacher's predictions and losses if they are stored."""
        return ("input_ids", *(() if self.teacher else COLUMNS), *(self.gate.columns if self.gate else ()))

    def __call__(self, model: PreTrainedModel, batch: Batch, counts: Counts) -> Losses:
        """Compute both losses."""
        if self.weight == 0:
            return super().__call__(model, batch, counts)
        ids, tokens = batch["input_ids"], self.teacher_tokens(batch)
        output = model(
            input_ids=ids,
            labels=ids,
            teacher_tokens=tokens,
            num_items_in_batch=counts["token"],
            output_logits=False,
            use_cache=False,
            **({} if self.gate is None else {"gate": self.gate(batch, tokens.distribution)}),
        )
        parts = {"token_loss": output.token_loss.detach(), "kd_loss": output.kd_loss}
        if self.gate is not None:
            parts["mean_gate"] = output.mean_gate
        return Losses(output.loss, parts)

    def teacher_tokens(self, batch: Batch) -> TeacherTokens:
        """Return what the student learns of the teacher's predictions of `batch`."""
        if self.teacher is not None:
            return TeacherTokens(self.teacher(batch["input_ids"]), self.weight, self.temperature)
        return TeacherTokens(TopTokens(*(batch[name] for name in COLUMNS)), self.weight, self.temperature)


def predictor(teacher: PreTrainedModel, vocab_size: int) -> PredictTokens:
    """Return a frozen teacher's forward pass, without its logits if its head is plain.

    Args:
        teacher: any causal language model.
        vocab_size: V, number of its first tokens that the distribution is over.
    """
    head = plain_head(teacher)

    def predict(input_ids: Tensor) -> Distribution:
        with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
            if head is None:
                return teacher(input_ids=input_ids, use_cache=False).logits[..., :vocab_size]
            hidden = teacher.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            return TeacherHidden(
                hidden, head.weight[:vocab_size], None if head.bias is None else head.bias[:vocab_size]
            )

    return predict
