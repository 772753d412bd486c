"""Cross-entropy of a linear layer whose logits never live whole, in time as in memory the cost of its matrix products.

N rows, D width, C classes (concepts or tokens), A labels per row, K logits kept per row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import IGNORE

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Logits of so many rows at once, in float32: large enough for fast matrix products."""


class LinearLoss(NamedTuple):
    """What `linear_cross_entropy` gives."""

    total: Tensor
    """Sum over the rows with a label of logsumexp(z) − mean of z at the row's labels; 0-dimensional, in nats."""
    values: Tensor
    """(N, K) the largest logits of each row."""
    indices: Tensor
    """(N, K) int64, their classes."""


def linear_cross_entropy(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, keep: int = 0) -> LinearLoss:
    """Cross-entropy of z = x · weightᵀ + bias, and the `keep` largest z of each row.

    Equal to building z (N, C), `topk`, and the loss of it, with gradients to x, weight and bias through the loss and
    the kept values. The rows go through in chunks, and what the loss asks of z is turned into gradients of x and
    weight while the chunk is there: three matrix products, as in the plain form, and nothing computed twice. The
    kept values add to them by K rows of the weight.

    Args:
        x: (N, D).
        weight: (C, D).
        bias: (C,) or None.
        labels: (N, A) int64; `IGNORE` in a slot means no label, in every slot a row without loss.
        keep: K.
    """
    return LinearLoss(*_LinearCrossEntropy.apply(x, weight, bias, labels, keep))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, keep: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        full = torch.promote_types(x.dtype, torch.float32)
        has = labels != IGNORE
        share = has.to(full) / has.sum(-1, keepdim=True).clamp(min=1)  # (N, A), of each label in its row's loss
        has_loss = has.any(-1, keepdim=True).to(full)
        safe = labels.clamp(min=0)

        device = x.device.type
        products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        total = x.new_zeros((), dtype=full)
        kept: list[tuple[Tensor, Tensor]] = []
        of_x: list[Tensor] = []
        of_weight = torch.zeros_like(weight, dtype=full) if need_weight else None
        of_bias = torch.zeros_like(bias, dtype=full) if bias is not None and need_bias else None
        # Cast here, once: autocast would cast the weight again in every product of every chunk.
        with torch.autocast(device, enabled=False):
            w, b = weight.to(products), None if bias is None else bias.to(products)
            rows = _rows_of_chunk(len(x), 4 * len(weight), device)
            parts = (each.split(rows) for each in (x.to(products), safe, share, has_loss))
            for x_, labels_, share_, has_loss_ in zip(*parts, strict=True):
                z = F.linear(x_, w, b)
                values, indices = z.topk(keep, dim=-1)
                kept.append((values, indices))
                log_p = z.log_softmax(-1, dtype=full)
                del z
                total = total - (log_p.gather(-1, labels_) * share_).sum()
                if not (need_x or need_weight or need_bias):
                    continue
                # The gradient of z, but for rows without a loss, which are left out by what it is multiplied with.
                of_z = log_p.exp_().scatter_add_(-1, labels_, -share_)
                if of_bias is not None:
                    of_bias += (has_loss_.T @ of_z).squeeze(0)
                of_z = of_z.to(products)
                if need_x:
                    of_x.append((of_z @ w) * has_loss_)
                if of_weight is not None:
                    _add_product(of_weight, of_z, x_ * has_loss_.to(products))
        values, indices = (torch.cat(each) for each in zip(*kept, strict=True))
        ctx.save_for_backward(torch.cat(of_x).to(x.dtype) if need_x else None, of_weight, of_bias, x, weight, indices)
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        return total, values, indices

    @staticmethod
    def backward(ctx: Any, of_total: Tensor | None, of_values: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        of_x, of_weight, of_bias, x, weight, indices = ctx.saved_tensors
        scale = 0.0 if of_total is None else of_total
        of_x, of_weight, of_bias = (
            None if each is None else (each * scale).to(dtype)
            for each, dtype in ((of_x, x.dtype), (of_weight, weight.dtype), (of_bias, weight.dtype))
        )
        if of_values is None or not indices.shape[-1]:
            return of_x, of_weight, of_bias, None, None
        of_values = of_values.to(weight.dtype)
        if of_x is not None:
            of_x += F.embedding_bag(indices, weight, per_sample_weights=of_values, mode="sum").to(of_x.dtype)
        if of_weight is not None:
            rows = _rows_of_chunk(len(x), 4 * indices.shape[-1] * x.shape[-1], x.device.type)
            for i, v, x_ in zip(indices.split(rows), of_values.split(rows), x.split(rows), strict=True):
                outer = v.unsqueeze(-1) * x_.to(v.dtype).unsqueeze(-2)  # (rows, K, D)
                of_weight.index_add_(0, i.flatten(), outer.flatten(0, 1))
        if of_bias is not None:
            of_bias.index_add_(0, indices.flatten(), of_values.flatten().to(of_bias.dtype))
        return of_x, of_weight, of_bias, None, None


def _rows_of_chunk(rows: int, bytes_per_row: int, device: str) -> int:
    """Rows that go through at once: as few chunks as `CHUNK_BYTES` allows, all about as large."""
    chunks = -(-rows * bytes_per_row // CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]))
    return max(1, -(-rows // max(1, chunks)))


def _add_product(total: Tensor, of_z: Tensor, x: Tensor) -> None:
    """total (C, D) += of_zᵀ x, the product in their precision, the sum in the total's."""
    if total.dtype == x.dtype:
        total.addmm_(of_z.T, x)
        return
    # In parts: a product as large as the weight would cost more in memory traffic than in arithmetic.
    rows = max(1, CHUNK_BYTES.get(x.device.type, CHUNK_BYTES["cuda"]) // (32 * x.shape[-1]))
    for part, of_part in zip(total.split(rows), of_z.split(rows, dim=1), strict=True):
        part += of_part.T @ x
