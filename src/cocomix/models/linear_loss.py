"""Linear layer and cross-entropy fused in chunks: the full logits are never materialized.

Dimensions: N rows, D width, C classes (concepts or tokens), A labels per row, K logits kept per row.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .divergence import (
    TeacherTokens,
    divergence_and_gradient,
    map_tokens,
    teacher_divergence,
)
from .losses import IGNORE, Gate, concept_losses, gate_weights, label_shares

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Bytes of a chunk's logits in float32, by device type: large enough for fast matrix products."""
MULTIPLE = {"cpu": 1, "cuda": 64}
"""Multiple of rows and classes in products, by device type: tensor cores need aligned matrices. Classes are padded to
it, and chunks end at it."""
TOP_BLOCK = 64
"""Columns per block in `largest`."""
DISTILLED_BYTES = 24
"""Bytes per logit assumed for the chunk size with a teacher: both distributions and their difference."""
FLOAT16_SCALE = 2.0**14
"""Scale of probabilities cast to float16: the largest stays below 65504, and the smallest do not underflow to 0."""


class LinearLoss(NamedTuple):
    """Result of `linear_loss` and `linear_cross_entropy`."""

    total: Tensor
    """Scalar in nats: logsumexp(z) − mean of z at the row's labels, summed over rows with a label. With a teacher, its
    gradient is that of total + weight · divergence."""
    values: Tensor
    """(N, K) largest logits of each row."""
    indices: Tensor
    """(N, K) int64 classes of these logits."""
    divergence: Tensor
    """Scalar in nats, without a gradient: divergence from the teacher, with the weights of a gate, summed over
    rows with a label; 0 without a teacher."""
    losses: Tensor
    """(N,) loss of each row in nats, without a gradient and without `row_weights`; 0 without a label."""


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `module` computes x · weightᵀ + bias and nothing else, so that its weight can be used directly.

    Adapters, quantization, pruning, sharding and offloading replace the module, its weight or its `forward`, or add
    hooks.
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, Tensor, FakeTensor)
        and "forward" not in module.__dict__
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def linear_loss(
    linear: nn.Module,
    x: Tensor,
    labels: Tensor | None,
    keep: int = 0,
    teacher: TeacherTokens | None = None,
    weights: Tensor | None = None,
    row_weights: Tensor | None = None,
    gate: Gate | None = None,
) -> LinearLoss:
    """Cross-entropy of z = linear(x) and the `keep` largest z of each row, fused if `linear` is plain.

    Args:
        linear: module that maps (N, D) to (N, C).
        x: (N, D).
        labels: (N, A) int64, `IGNORE` for an empty label slot; None for no loss.
        keep: K.
        teacher: adds the divergence from a teacher's distribution over the classes, at N tokens, to the gradient.
        weights: (N, A) relative weights of the labels; by default they are equal.
        row_weights: (N,) factor of each row's loss; by default 1.
        gate: weights the divergence of each row by its loss and the teacher's, (N,).
    """
    if is_plain(linear):
        return linear_cross_entropy(
            x, linear.weight, linear.bias, labels, keep, teacher, weights, row_weights=row_weights, gate=gate
        )
    z = linear(x)
    values, indices = z.topk(keep, dim=-1)
    if labels is None:
        return LinearLoss(z.new_zeros(()), values, indices, z.new_zeros(()), z.new_zeros(len(z)))
    losses, found = concept_losses(z, labels, weights), z.new_zeros(())
    total = (losses if row_weights is None else losses * row_weights).sum()
    if teacher is not None:
        has_label = (labels != IGNORE).any(-1)
        selected = teacher._replace(distribution=map_tokens(teacher.distribution, lambda each: each[has_label]))
        with torch.autocast(z.device.type, enabled=False):
            distances = teacher_divergence(z[has_label], selected)
        if gate is not None:
            distances = distances * gate_weights(losses.detach(), gate)[has_label]
        found = distances.sum().detach()
        total = total + teacher.weight * (distances.sum() - found)
    return LinearLoss(total, values, indices, found, losses.detach())


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    keep: int = 0,
    teacher: TeacherTokens | None = None,
    label_weights: Tensor | None = None,
    row_weights: Tensor | None = None,
    gate: Gate | None = None,
) -> LinearLoss:
    """Cross-entropy of z = x · weightᵀ + bias, and the `keep` largest z of each row.

    Equals computing z (N, C), its `topk` and its loss, with gradients to x, weight and bias through the loss and the
    kept values. Rows are processed in chunks. The forward pass turns each chunk's gradient of z into gradients of x
    and weight right away: three matrix products, as in the plain form, and no recomputation. The backward pass only
    scales these gradients. Since float16 products do not include the loss scale yet, their gradients are accumulated
    in float32. Second derivatives are not supported and raise an error.

    Args:
        x: (N, D).
        weight: (C, D).
        bias: (C,) or None.
        labels: (N, A) int64, `IGNORE` for an empty label slot; a row with only empty slots has no loss. None for
            no loss; then the kept values alone have gradients.
        keep: K.
        teacher: as in `linear_loss`.
        label_weights: (N, A) relative weights of the labels; by default they are equal.
        row_weights: (N,) factor of each row's loss; by default 1.
        gate: as in `linear_loss`.
    """
    return LinearLoss(
        *_LinearCrossEntropy.apply(x, weight, bias, labels, keep, teacher, label_weights, row_weights, gate)
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor | None,
        keep: int,
        teacher: TeacherTokens | None,
        label_weights: Tensor | None,
        row_weights: Tensor | None,
        gate: Gate | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        full = torch.promote_types(x.dtype, torch.float32)
        device = x.device.type
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        scale = FLOAT16_SCALE if products == torch.float16 else 1.0
        if teacher is not None:
            scale /= 1 + teacher.weight * teacher.temperature if scale != 1 else 1.0
        total, distance = x.new_zeros((), dtype=full), x.new_zeros((), dtype=full)
        kept: list[tuple[Tensor, Tensor]] = []
        losses: list[Tensor] = []
        grad_x: list[Tensor] = []
        grad_weight: Tensor | None = None
        # Cast once here: autocast would cast the weight again in every product of every chunk.
        with torch.autocast(device, enabled=False):
            w, b = _padded(weight.to(products), None if bias is None else bias.to(products))
            grad_bias = torch.zeros_like(b, dtype=full) if b is not None and need_bias else None
            rows = _chunk_rows(len(x), (4 if teacher is None else DISTILLED_BYTES) * len(w), device)
            z_buffer = _buffer(x, rows, len(w), products)
            p_buffer = z_buffer if products == full else _buffer(x, rows, len(w), full)
            targets = () if labels is None else _shares(labels, label_weights, full)
            parts = (each.split(rows) for each in (x.to(products), *targets))
            for chunk, (x_, *targets_) in enumerate(zip(*parts, strict=True)):
                z = _logits(x_, w, b, len(weight), z_buffer)
                values, indices = largest(z, keep)
                kept.append((values, indices))
                if not targets_:
                    continue
                labels_, share_, class_share_, has_loss_ = targets_
                z_labels = z.gather(-1, labels_).to(full)
                z_top = (values[:, :1] if keep else _top(z)).to(full)
                grad_distance: Tensor | None = None
                if teacher is not None:
                    here = map_tokens(teacher.distribution, partial(_rows_of, chunk, rows))
                    distances, grad_distance = divergence_and_gradient(
                        z[:, : len(weight)], teacher._replace(distribution=here)
                    )
                p = torch.softmax(z, -1, dtype=full, out=_first(p_buffer, len(x_)))  # overwrites z if it can
                p_top = p.gather(-1, indices[:, :1]) if keep else _top(p)
                log_p = z_labels - (z_top - p_top.log())  # (rows, A), of the labels
                losses.append(-(log_p * share_).sum(-1))
                if row_weights is not None:
                    weights_ = _rows_of(chunk, rows, row_weights).to(full).unsqueeze(-1)
                    share_, has_loss_ = share_ * weights_, has_loss_ * weights_
                total = total - (log_p * share_).sum()
                if grad_distance is not None:
                    if gate is not None:
                        here_ = gate._replace(teacher_losses=_rows_of(chunk, rows, gate.teacher_losses))
                        weights_ = gate_weights(losses[-1], here_)
                        distances, grad_distance = distances * weights_, grad_distance * weights_.unsqueeze(-1)
                    distance = distance + (distances.to(full) * has_loss_.squeeze(-1)).sum()
                if not (need_x or need_weight or need_bias):
                    continue
                # The gradient of z overwrites p, or z if products have another precision. The products below mask
                # rows without a loss.
                at_labels = log_p.exp() - class_share_
                if teacher is not None and grad_distance is not None:
                    p[:, : len(weight)].add_(grad_distance, alpha=teacher.weight)
                    at_labels = at_labels + teacher.weight * grad_distance.gather(-1, labels_)
                grad_z = p if products == full else z.copy_(p if scale == 1 else p.mul_(scale))
                grad_z.scatter_(-1, labels_, (at_labels * scale).to(products))
                if grad_bias is not None:
                    grad_bias.add_(_product(has_loss_.T.to(products), grad_z)[0], alpha=1 / scale)
                if need_x:
                    product = _product(grad_z, w)
                    grad_x.append(product * (has_loss_ / scale).to(product.dtype))
                if need_weight:
                    grad_weight = _add_product(grad_weight, grad_z, x_ * has_loss_.to(products), scale)
        values, indices = (torch.cat(each) for each in zip(*kept, strict=True))
        if labels is None:
            losses.append(x.new_zeros(len(x), dtype=full))
            grad_x.append(torch.zeros_like(x, dtype=full))
            grad_weight = torch.zeros_like(weight, dtype=full) if need_weight else None
        grad_weight = None if grad_weight is None else grad_weight[: len(weight)]
        grad_bias = None if grad_bias is None else grad_bias[: len(weight)]
        ctx.save_for_backward(torch.cat(grad_x) if need_x else None, grad_weight, grad_bias, x, weight, indices)
        row_losses = torch.cat(losses)
        ctx.mark_non_differentiable(indices, distance, row_losses)
        ctx.set_materialize_grads(False)
        return total, values, indices, distance, row_losses

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_values: Tensor | None, *_: None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; `once_differentiable` would treat it as a constant
            raise RuntimeError(
                "the fused cross-entropy has no second derivative (create_graph=True); materialize the logits with "
                "output_logits=True and output_concepts=True"
            )
        *grads, x, weight, indices = ctx.saved_tensors
        full = torch.promote_types(x.dtype, torch.float32)
        scale = 0.0 if grad_total is None else grad_total
        grad_x, grad_weight, grad_bias = (None if each is None else each.to(full) * scale for each in grads)
        if grad_values is not None and indices.shape[-1]:
            if grad_x is not None:
                grad_x += F.embedding_bag(indices, weight, per_sample_weights=grad_values.to(weight.dtype), mode="sum")
            if grad_weight is not None:
                rows = _chunk_rows(len(x), 4 * indices.shape[-1] * x.shape[-1], x.device.type)
                grad_values = grad_values.to(full)
                for i, v, x_ in zip(indices.split(rows), grad_values.split(rows), x.split(rows), strict=True):
                    outer = v.unsqueeze(-1) * x_.to(v.dtype).unsqueeze(-2)  # (rows, K, D)
                    grad_weight.index_add_(0, i.flatten(), outer.flatten(0, 1))
            if grad_bias is not None:
                grad_bias.index_add_(0, indices.flatten(), grad_values.flatten().to(full))
        pairs = ((grad_x, x), (grad_weight, weight), (grad_bias, weight))
        grads = [None if grad is None else grad.to(leaf.dtype) for grad, leaf in pairs]
        return *grads, None, None, None, None, None, None


def largest(z: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return the `keep` largest entries of each row of z (N, C) and their columns, as `topk`, reading z only once.

    They are among the `keep` blocks of columns with the largest maxima; `topk` sorts those instead of all columns.
    """
    rows, columns = z.shape
    blocks = columns // TOP_BLOCK
    if keep == 0 or 4 * keep > blocks:
        return z.topk(keep, dim=-1)
    in_blocks = TOP_BLOCK * blocks
    best = z[:, :in_blocks].unflatten(-1, (blocks, TOP_BLOCK)).amax(-1).topk(keep, dim=-1, sorted=False).indices
    offsets = torch.arange(TOP_BLOCK, device=z.device)
    candidates = (TOP_BLOCK * best.unsqueeze(-1) + offsets).flatten(1)  # (N, keep · TOP_BLOCK)
    if in_blocks < columns:
        remainder = torch.arange(in_blocks, columns, device=z.device)
        candidates = torch.cat([candidates, remainder.expand(rows, -1)], dim=-1)
    values, chosen = z.gather(-1, candidates).topk(keep, dim=-1)
    return values, candidates.gather(-1, chosen)


def _shares(labels: Tensor, weights: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return labels (N, A) without `IGNORE`, each one's share in its row's loss, and the share of all labels equal
    to it, (N, A) each, and whether the row has a loss, (N, 1)."""
    is_label = labels != IGNORE
    share = label_shares(labels, weights, dtype)
    classes = labels.clamp(min=0)
    equal = classes.unsqueeze(-1) == classes.unsqueeze(-2)  # (N, A, A)
    return classes, share, (equal * share.unsqueeze(-2)).sum(-1), is_label.any(-1, keepdim=True).to(dtype)


def _padded(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Append rows of zeros to weight (C, D) and bias up to the device's multiple of classes."""
    missing = -len(weight) % MULTIPLE.get(weight.device.type, 1)
    if missing == 0:
        return weight, bias
    return F.pad(weight, (0, 0, 0, missing)), None if bias is None else F.pad(bias, (0, missing))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None, classes: int, buffer: Tensor | None) -> Tensor:
    """Compute x · weightᵀ + bias, with −∞ in the columns of padding, which have no probability and no gradient."""
    out = _first(buffer, len(x))
    if bias is None or out is not None:  # with `out`, addmm would first write the bias to every row
        z = torch.mm(x, weight.T, out=out)
        z = z if bias is None else z.add_(bias)
    else:
        z = torch.addmm(bias, x, weight.T)
    if classes < len(weight):
        z[:, classes:] = -torch.inf
    return z


def _rows_of(chunk: int, rows: int, each: Tensor) -> Tensor:
    return each[chunk * rows : (chunk + 1) * rows]


def _top(z: Tensor) -> Tensor:
    return z.amax(-1, keepdim=True)


def _buffer(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """Return memory for all chunks on the CPU, whose allocator would get new pages for each; elsewhere None."""
    return x.new_empty(rows, columns, dtype=dtype) if x.is_cpu and not torch.compiler.is_compiling() else None


def _first(buffer: Tensor | None, rows: int) -> Tensor | None:
    return None if buffer is None else buffer[:rows]


def _chunk_rows(rows: int, bytes_per_row: int, device: str) -> int:
    """Compute the rows per chunk: as few chunks as `CHUNK_BYTES` allows, of about equal size."""
    chunks = -(-rows * bytes_per_row // CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]))
    return _aligned(-(-rows // max(1, chunks)), device)


def _aligned(rows: int, device: str) -> int:
    """Round up to the device's multiple of rows."""
    multiple = MULTIPLE.get(device, 1)
    return multiple * max(1, -(-rows // multiple))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Matrix product, in float32 for float16 factors, since it may exceed the range of float16."""
    if a.dtype != torch.float16:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _add_product(total: Tensor | None, grad_z: Tensor, x: Tensor, scale: float) -> Tensor:
    """Return total + grad_zᵀ x / scale (C, D), accumulated in place in at least float32."""
    full = torch.promote_types(x.dtype, torch.float32)
    first = total is None
    if total is None:
        total = x.new_empty(grad_z.shape[1], x.shape[1], dtype=full)
    if full == x.dtype:
        return total.addmm_(grad_z.T, x, beta=0 if first else 1, alpha=1 / scale)
    # In parts, because a product as large as the weight would cost more memory traffic than arithmetic.
    device = x.device.type
    rows = _aligned(CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (32 * x.shape[-1]), device)
    for part, grad_part in zip(total.split(rows), grad_z.split(rows, dim=1), strict=True):
        product = _product(grad_part.T, x)
        torch.mul(product, 1 / scale, out=part) if first else part.add_(product, alpha=1 / scale)
    return total
