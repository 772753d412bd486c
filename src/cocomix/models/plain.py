"""Next-token loss of any causal language model, without its logits if its token head is a plain linear layer."""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .backbones import scaling_setting
from .linear_loss import is_plain, linear_token_loss
from .losses import token_loss


@torch.no_grad()
def plain_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the token head if the logits are its product with the decoder's output and nothing else; else None.

    Decides by the configuration and, unless the model is on the meta device, by a trial on a few tokens.
    """
    head = model.get_output_embeddings()
    if not is_plain(head) or scaling_setting(model.config.get_text_config()) is not None:
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
    """Let a model's forward pass take `output_logits=False`, as CoCoMix models do; changes the model in place.

    With `output_logits=False`, `labels` and optionally `num_items_in_batch`, it returns the loss only: fused with a
    plain head (`linear_loss.py`), or computed from the logits with any other head.
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
