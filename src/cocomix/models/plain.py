"""The next-token loss of any causal language model, without its logits where its token head is a plain linear layer."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .backbones import scaling_of
from .linear_loss import is_plain, linear_token_loss
from .losses import token_loss


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """The token head if the logits are its product with what the decoder returns and nothing else, or None.

    The configuration tells, and a few tokens are tried if the model has weights (is not on the meta device).
    """
    head = model.get_output_embeddings()
    if not is_plain(head) or scaling_of(model.config.get_text_config()) is not None:
        return None
    if model.device.type == "meta":
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
    """The same model, whose forward pass takes `output_logits=False`, as that of a CoCoMix model does.

    With it, `labels` and `num_items_in_batch` it returns the loss only: fused with a plain head (`linear_loss.py`), so
    that a plain decoder is not slower than it need be, and from the logits with any other head.
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
        if fused:
            h = self.base_model(*args, **kwargs).last_hidden_state
            return CausalLMOutput(loss=linear_token_loss(self.get_output_embeddings(), h, labels, num_items))
        return CausalLMOutput(loss=token_loss(with_logits(self, *args, **kwargs).logits, labels, num_items))

    model.forward = MethodType(forward, model)
    return model
