"""Count the expert weights that a token uses, in any mixture-of-experts backbone of Transformers.

Transformers keeps the E experts of a block in one module, with each kind of weight stacked in a parameter (E, …). The
router is a separate module.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig

PER_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts", "moe_k")
"""Names in configurations of the number of experts per token."""


def expert_modules(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """Iterate over the modules in `module` that hold a block's experts, with the number E of experts in each."""
    for child in module.modules():
        stacked = [weight for weight in child.parameters(recurse=False) if weight.dim() == 3]
        if stacked and not isinstance(child, nn.Conv1d):
            yield child, len(stacked[0])


def experts_per_token(config: PretrainedConfig) -> int:
    """Return the number of experts that a token is routed to.

    Raises:
        ValueError: the configuration does not state it.
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
    """Count the weights of experts in `module` that a token is not routed to."""
    idle = 0
    for experts, count in expert_modules(module):
        stored = sum(weight.numel() for weight in experts.parameters())
        idle += stored * (count - experts_per_token(config)) // count
    return idle
