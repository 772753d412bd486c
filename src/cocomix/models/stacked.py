"""What all models share that are made of the stacks of one decoder: embedding at the bottom, one token head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import AutoModel, GenerationMixin, PreTrainedModel

from .backbones import fuse_activations, positions_of
from .configuration import StackedConfig
from .linear_loss import linear_cross_entropy


class TokenHead(nn.Linear):
    """The token head, and the loss of its logits where they are not wanted themselves.

    The loss is part of its forward pass, so that whatever gathers a sharded weight for that pass sees the use.
    """

    def forward(self, h: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) of h (B, T, D); with targets (B, T), −100 for none, their summed cross-entropy, nats."""
        if targets is None:
            return super().forward(h)
        return linear_cross_entropy(h.flatten(0, 1), self.weight, self.bias, targets.reshape(-1, 1)).total


class StackedForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of stacks; the first of them is the attribute named by `bottom`."""

    bottom: str
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = False  # generation keeps to dynamic caches, which the stacks share by views

    @staticmethod
    def _decoder(config: StackedConfig) -> PreTrainedModel:
        """The backbone's decoder, freshly made, to be taken apart."""
        backbone = copy.deepcopy(config.backbone_config)  # the stacks change theirs
        return fuse_activations(AutoModel.from_config(backbone, attn_implementation=backbone._attn_implementation))

    def _add_head(self) -> None:
        """Make the token head; it is the token embedding where the configuration ties them."""
        self.lm_head = TokenHead(self.config.hidden_size, self.config.vocab_size, bias=False)
        embedding = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding, at the bottom of the first stack."""
        return getattr(self, self.bottom).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embedding."""
        getattr(self, self.bottom).set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The token head."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: TokenHead) -> None:
        """Replace the token head."""
        self.lm_head = new_embeddings

    @staticmethod
    def _positions(inputs_embeds: Tensor, mask: Tensor | None, past: int) -> Tensor:
        """(B, T) or (1, T) positions of the given tokens, not counting padding."""
        length = inputs_embeds.shape[1]
        if mask is not None:
            return positions_of(mask)[:, -length:]
        return torch.arange(past, past + length, device=inputs_embeds.device).unsqueeze(0)
