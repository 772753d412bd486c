"""Mixtures of experts: how many of their weights a token uses, for any backbone of Transformers.

Transformers keeps the experts of a block in one module, each kind of weight stacked in a parameter (E, …). The router
in front of them is a module of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig

PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
"""What configurations call the number of experts that a token is sent to."""


def expert_modules(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """All modules in `module` that hold the experts of a block, each with the number E of its experts."""
    for child in module.modules():
        stacked = [weight for weight in child.parameters(recurse=False) if weight.dim() == 3]
        if stacked and not isinstance(child, nn.Conv1d):
            yield child, len(stacked[0])


def experts_per_token(config: PretrainedConfig) -> int:
    """Number of experts that a token is sent to.

    Raises:
        ValueError: the configuration does not name it.
    """
    text = config.get_text_config()
    for holder in (text, getattr(text, "ffn_config", None)):
        for name in PER_TOKEN:
            if isinstance(found := getattr(holder, name, None), int):
                return found
    raise ValueError(
        f"the backbone {text.model_type!r} has experts, but none of {', '.join(PER_TOKEN)} in its configuration gives "
        "the number that a token uses"
    )


def idle_weights(module: nn.Module, config: PretrainedConfig) -> int:
    """Weights of experts in `module` that a token is not sent to."""
    idle = 0
    for experts, count in expert_modules(module):
        stored = sum(weight.numel() for weight in experts.parameters())
        idle += stored * (count - experts_per_token(config)) // count
    return idle
