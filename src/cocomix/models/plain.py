"""Next-token loss of any causal language model, without its logits if its token head is a plain linear layer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .backbones import scaling_setting
from .divergence import TeacherTokens
from .linear_loss import is_plain
from .losses import Gate
from .next_token_loss import distilled_token_loss, linear_token_loss


@dataclass
class PlainOutput(ModelOutput):
    """Losses of a model prepared by `with_token_loss`."""

    loss: Tensor | None = None
    """token_loss, with `teacher_tokens` + weight · kd_loss."""
    token_loss: Tensor | None = None
    """Mean next-token cross-entropy in nats; with `teacher_tokens`, it has the gradient of `loss`."""
    kd_loss: Tensor | None = None
    """Mean divergence from the teacher in nats, weighted by the gate only and without a gradient, with
    `teacher_tokens`."""
    mean_gate: Tensor | None = None
    """Mean weight of the tokens, with `gate`."""


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the token head if the logits are its product with the decoder's output and nothing else; else None.

    Decides by the configuration and, if the model has weights, by a trial on a few tokens.
    """
    head = model.get_output_embeddings()
    if not is_plain(head) or scaling_setting(model.config.get_text_config()) is not None:
        return None
    if model.device.type == "meta" or isinstance(head.weight, FakeTensor):
        return head
    ids = torch.arange(3, device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    hidden = getattr(model.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    logits = model(input_ids=ids, use_cache=False).logits
    model.train(was_training)
    if hidden is None or hidden.shape[-1] != head.in_features:
        return None
    found = head(hidden)
    return head if logits.shape == found.shape and torch.allclose(found, logits, rtol=1e-4, atol=1e-6) else None


def with_token_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model's forward pass take `output_logits=False`, as CoCoMix models do; changes the model in place.

    With `output_logits=False`, `labels` and optionally `num_items_in_batch`, `teacher_tokens` and a `gate` of these, it
    returns the losses only: fused with a plain head (`next_token_loss.py`), or computed from the logits with any other.
    """
    if "output_logits" in inspect.signature(model.forward).parameters:
        return model
    fused = plain_head(model) is not None
    with_logits = model.forward.__func__

    def forward(self: PreTrainedModel, *args: Any, output_logits: bool = True, **kwargs: Any) -> Any:
        if output_logits:
            return with_logits(self, *args, **kwargs)
        labels: Tensor = kwargs.pop("labels")
        num_items = kwargs.pop("num_items_in_batch", None)
        teacher: TeacherTokens | None = kwargs.pop("teacher_tokens", None)
        gate: Gate | None = kwargs.pop("gate", None)
        if fused:
            head, h = self.get_output_embeddings(), self.base_model(*args, **kwargs).last_hidden_state
        else:
            head, h = nn.Identity(), with_logits(self, *args, **kwargs).logits
        if teacher is None:
            token = linear_token_loss(head, h, labels, num_items)
            return PlainOutput(loss=token, token_loss=token)
        token, distance, _, mean_gate = distilled_token_loss(head, h, labels, teacher, num_items, gate)
        total = token + teacher.weight * distance
        return PlainOutput(loss=total, token_loss=token, kd_loss=distance, mean_gate=mean_gate)

    model.forward = MethodType(forward, model)
    return model
