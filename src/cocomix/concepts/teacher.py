"""Tap a frozen teacher: its residual stream after one block, and the gradient of its loss there.

B sequences, T tokens, d teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from cocomix.common import fingerprint
from cocomix.common.errors import InputError
from cocomix.models.backbones import decoder_blocks, fuse_activations, padded_positions
from cocomix.models.linear_loss import LinearLoss, linear_cross_entropy
from cocomix.models.losses import IGNORE, at_least_float32


class TappedResidual(NamedTuple):
    """The residual stream at the tap, and the gradient of the teacher's loss there."""

    residual: Tensor
    """x, (B, T, d): the output of the tapped block."""
    gradient: Tensor
    """∂(sum of next-token losses)/∂x, (B, T, d), in nats."""
    has_target: Tensor
    """(B, T) bool, True at tokens whose next token is known; elsewhere the gradient is 0."""


class _Tapped(Exception):
    """Stops the forward pass at the tap."""


def check_teacher_layer(teacher_layer: int, num_blocks: int) -> None:
    """Raise InputError unless a teacher of `num_blocks` blocks has a block `teacher_layer`."""
    if not 0 <= teacher_layer < num_blocks:
        raise InputError(
            f"teacher_layer is {teacher_layer}; a teacher of {num_blocks} blocks takes 0 to {num_blocks - 1}"
        )


def freeze(teacher: PreTrainedModel) -> PreTrainedModel:
    """Set evaluation mode, fuse activations, and disable gradients, in place; return the model."""
    return fuse_activations(teacher).eval().requires_grad_(False)


def compile_blocks(teacher: PreTrainedModel) -> PreTrainedModel:
    """Compile the blocks of a frozen teacher in place, and return it.

    Equal blocks share a graph. What taps them (`tap`) stays outside of it.
    """
    for block in decoder_blocks(teacher):
        block.forward = torch.compile(block.forward)
    return teacher


@torch.no_grad()
def check_causal(model: PreTrainedModel, role: str, source: str) -> None:
    """Raise InputError if a later token changes what the model predicts at earlier ones, as in an encoder."""
    ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], device=model.device)
    one, other = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    if not torch.allclose(one, other, rtol=1e-2, atol=1e-2 * one.abs().max().item()):
        raise InputError(
            f"the {role} {source} is not a causal language model: a later token changes its predictions at earlier ones"
        )


def teacher_fingerprint(teacher: PreTrainedModel) -> str:
    """Return the fingerprint of the teacher's weights."""
    return fingerprint.hash_tensors(teacher.state_dict().items())


@contextmanager
def tap(teacher: PreTrainedModel, layer: int, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While open, replace the output of block `layer` by act(output)."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (act(output[0]), *output[1:])
        return act(output)

    handle = decoder_blocks(teacher)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _inputs(input_ids: Tensor, attention_mask: Tensor | None) -> dict[str, Tensor | bool]:
    """Build the arguments of a forward pass; padding is neither attended to nor counted in positions."""
    inputs: dict[str, Tensor | bool] = {"input_ids": input_ids, "use_cache": False}
    if attention_mask is not None:
        inputs |= {"attention_mask": attention_mask, "position_ids": padded_positions(attention_mask)}
    return inputs


@torch.no_grad()
def residual_stream(
    teacher: PreTrainedModel, input_ids: Tensor, layer: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Return x (B, T, d) after block `layer`. The blocks above it do not run."""
    tapped: list[Tensor] = []

    def take(x: Tensor) -> Tensor:
        tapped.append(x)
        raise _Tapped

    with tap(teacher, layer, take):
        try:
            teacher.base_model(**_inputs(input_ids, attention_mask))
        except _Tapped:
            return tapped[0]
    raise AssertionError("the tapped block did not run")


class ReadText(NamedTuple):
    """A teacher's output for a text."""

    residual: Tensor
    """x, (B, T, d): the output of the tapped block."""
    logits: Tensor
    """(B, T, V) next-token logits."""


@torch.no_grad()
def read_text(
    teacher: PreTrainedModel, input_ids: Tensor, layer: int, attention_mask: Tensor | None = None
) -> ReadText:
    """Return the residual stream after block `layer` and the logits, in one forward pass."""
    tapped: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        tapped.append(x)
        return x

    with tap(teacher, layer, note):
        logits = teacher(**_inputs(input_ids, attention_mask)).logits
    return ReadText(tapped[0], logits)


def next_token_targets(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return (B, T) the token that follows each token, IGNORE where there is none or where either is padding."""
    targets = torch.full_like(input_ids, IGNORE, dtype=torch.long)
    targets[:, :-1] = input_ids[:, 1:]
    if attention_mask is not None:
        followed = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        targets[:, :-1][~followed] = IGNORE
    return targets


def _sum_of_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        at_least_float32(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )


def tapped_residual(
    teacher: PreTrainedModel,
    input_ids: Tensor,
    layer: int,
    attention_mask: Tensor | None = None,
    head: nn.Linear | None = None,
    cross_entropy: Callable[..., LinearLoss] = linear_cross_entropy,
) -> TappedResidual:
    """Run a forward pass, and a backward pass that ends at the tap.

    The graph starts at x: the blocks below the tap build none, and no weight gets a gradient. The teacher must be
    frozen (`freeze`). If its `plain_head` is given, the full logits (B, T, V) are never materialized; the loss is then
    computed by `cross_entropy`, which may be compiled.
    """
    tapped: list[Tensor] = []

    def start_graph(x: Tensor) -> Tensor:
        tapped.append(x.detach().requires_grad_())
        return tapped[0]

    targets = next_token_targets(input_ids, attention_mask)
    with torch.enable_grad(), tap(teacher, layer, start_graph):
        inputs = _inputs(input_ids, attention_mask)
        if head is None:
            loss = _sum_of_losses(teacher(**inputs).logits, targets)
        else:
            hidden = teacher.base_model(**inputs).last_hidden_state
            loss = cross_entropy(hidden.flatten(0, 1), head.weight, head.bias, targets.view(-1, 1)).total
        (gradient,) = torch.autograd.grad(loss, tapped[0])
    return TappedResidual(tapped[0].detach(), gradient, targets != IGNORE)


@torch.no_grad()
def loss_with_residual(
    teacher: PreTrainedModel, input_ids: Tensor, layer: int, replace: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return the sum of the teacher's next-token losses (nats) if the residual after `layer` is replace(x)."""
    with tap(teacher, layer, replace):
        logits = teacher(**_inputs(input_ids, None)).logits
    return _sum_of_losses(logits, next_token_targets(input_ids))
