"""FLOPs of a model, counted from its shapes: two per multiply-add of its matrix products.

Normalization, activation functions, top-k and the optimizer are not counted, as is usual. Attention counts the full
square of scores, without the saving of a causal mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cocomix.models.backbones import decoder_blocks
from cocomix.models.causal_lm import CoCoMixForCausalLM
from cocomix.models.experts import expert_modules, experts_per_token
from cocomix.models.multi_token import MultiTokenForCausalLM

BACKWARD = 2
"""Cost of a backward pass in forward passes: gradients of inputs and of weights."""


def linear_flops(module: nn.Module, config: PretrainedConfig) -> int:
    """Return the FLOPs per position of a module's matrix products; of experts, only those that a token is routed to."""
    return 2 * sum(_matrices(module, config))


def _matrices(module: nn.Module, config: PretrainedConfig) -> Iterator[int]:
    """Yield the size of each matrix that a position is multiplied by."""
    for layer in module.modules():
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2 and not isinstance(layer, nn.Embedding):
            yield weight.numel()  # linear layers and routers; routers have no common class
    for experts, count in expert_modules(module):
        stacked = [weight for weight in experts.parameters(recurse=False) if weight.dim() == 3]
        yield sum(weight.numel() for weight in stacked) * experts_per_token(config) // count


def attention_flops(model: PreTrainedModel, blocks: int, positions: int) -> int:
    """Return the FLOPs per position of attention scores and weighted values in `blocks` blocks over `positions`."""
    config = model.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return blocks * 2 * 2 * positions * head * config.num_attention_heads


def forward_flops_per_token(model: PreTrainedModel, block_size: int, up_to_layer: int | None = None) -> int:
    """Return the FLOPs of a forward pass, per token.

    Args:
        model: any causal language model.
        block_size: tokens per block of data, over which attention runs.
        up_to_layer: count only the decoder blocks up to this one (0-based); plain models only.
    """
    config = model.config

    def products(module: nn.Module) -> int:
        return linear_flops(module, config)

    if up_to_layer is not None:
        depth = up_to_layer + 1
        return products(decoder_blocks(model)[:depth]) + attention_flops(model, depth, block_size)
    if isinstance(model, MultiTokenForCausalLM):
        blocks = decoder_blocks(model.trunk)
        heads = products(model.heads) + len(model.heads) * products(model.lm_head)
        depth = len(blocks) + len(model.heads)
        return products(blocks) + heads + attention_flops(model, depth, block_size)
    if not isinstance(model, CoCoMixForCausalLM):
        blocks = decoder_blocks(model)
        head = products(model.get_output_embeddings())
        return products(blocks) + attention_flops(model, len(blocks), block_size) + head
    slots = config.slots_per_token
    above = config.num_hidden_layers - config.insert_layer
    lower = products(decoder_blocks(model.lower)) if config.insert_layer else 0
    lower += attention_flops(model, config.insert_layer, block_size)
    upper = products(decoder_blocks(model.upper)) + attention_flops(model, above, slots * block_size)
    compress = 0
    if config.mixes_concepts:  # reads K rows; there is no matrix product
        compress = 2 * config.num_active_concepts * config.hidden_size
    return lower + slots * upper + products(model.mixer) + compress + products(model.lm_head)


def training_flops_per_token(model: PreTrainedModel, block_size: int) -> int:
    """Return the FLOPs of a training step, per token."""
    return (1 + BACKWARD) * forward_flops_per_token(model, block_size)


class ConceptFlops(NamedTuple):
    """FLOPs of computing concept labels, by model."""

    teacher: int
    sae: int

    @property
    def total(self) -> int:
        """Sum of both."""
        return self.teacher + self.sae


def labeling_flops_per_token(
    teacher: PreTrainedModel, teacher_layer: int, d_sae: int, active: int, block_size: int, selection: str
) -> ConceptFlops:
    """Return the FLOPs of labeling, per token.

    Attribution needs the teacher's forward pass, the gradient of its activations back to the tapped layer, the SAE's
    encoder, and the products of the active decoder directions with the gradient. Activation needs only the teacher up
    to the tapped layer and the encoder.
    """
    width = teacher.config.get_text_config().hidden_size
    if selection == "activation":
        tap = forward_flops_per_token(teacher, block_size, up_to_layer=teacher_layer)
        return ConceptFlops(teacher=tap, sae=2 * d_sae * width)
    blocks = decoder_blocks(teacher)
    above = linear_flops(blocks[teacher_layer + 1 :], teacher.config)
    above += linear_flops(teacher.get_output_embeddings(), teacher.config)
    above += 2 * attention_flops(teacher, len(blocks) - teacher_layer - 1, block_size)
    return ConceptFlops(
        teacher=forward_flops_per_token(teacher, block_size) + above, sae=2 * d_sae * width + 2 * active * width
    )
