"""Sparse autoencoders in training: forward pass, losses, and their form for raw activations.

N tokens, d teacher width, C latents, k active latents per token.

Training reads z = (x − μ) / s, with the mean μ and the standard deviation s of each of the d dimensions. A few massive
dimensions can hold nearly all of the variance of a residual stream; an SAE of x then explains these and nothing else.
In z, every dimension counts alike. The scale is folded into the weights when training ends:

    z W_enc + b_enc            =  (x − b) W_enc / s + b_enc + b_dec W_enc,  with b = μ + s b_dec
    μ + s (a W_dec + b_dec)    =  a (s W_dec) + b

The result is an ordinary SAE of x, with the same latents a. Directions of W_dec have norm 1 in the units of z.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_SCALE = 1e-3
"""Smallest scale of a dimension, relative to the median over dimensions; a constant one would be divided by 0."""
TANH_SCALE, BANDWIDTH, FIRST_THRESHOLD, PRE_ACTIVATION_WEIGHT = 4.0, 2.0, 0.1, 3e-6
"""Anthropic's settings of JumpReLU (Update of January 2025). DeepMind's move the thresholds too slowly for runs of a
few hundred steps: on a teacher of width 128 they left 130 latents active, and these leave 24."""


class InputScaling(NamedTuple):
    """The affine map from activations x to the input z of training."""

    mean: Tensor
    """μ, (d,)."""
    scale: Tensor
    """s, (d,)."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return z = (x − μ) / s, (N, d)."""
        return (x - self.mean) / self.scale


def measure_scaling(activations: Iterator[Tensor], batches: int) -> InputScaling:
    """Measure mean and standard deviation of each dimension on the next `batches` of N activations (N, d)."""
    sums = [torch.stack([x.double().sum(0), x.double().square().sum(0)]) / len(x) for x in islice(activations, batches)]
    mean, squares = torch.stack(sums).mean(0)
    std = (squares - mean.square()).clamp(min=0).sqrt()
    least = MIN_SCALE * std.median()
    return InputScaling(mean.float(), torch.where(std > least, std, least.clamp(min=1e-30)).float())


class StepResult(NamedTuple):
    """What one training step needs and reports."""

    loss: Tensor
    """The loss to minimize, a scalar."""
    unexplained: Tensor
    """Fraction of the variance of z in the batch that is unexplained, a scalar."""
    active: Tensor
    """(C,) number of tokens at which each latent is active."""


class TrainableSAE(nn.Module):
    """A sparse autoencoder of z: a = σ(z W_encᵀ + b_enc), ẑ = a W_dec + b_dec.

    `W_enc` is (C, d), so that the rows of the active latents are contiguous. It starts as a copy of `W_dec`
    (arXiv 2406.04093, appendix A.1), and `b_dec` at 0, which is the mean of x.

    Args:
        d_in: d.
        d_sae: C.
        architecture: topk, batchtopk or jumprelu.
        k: number of active latents per token, for topk and batchtopk.
        l0_coefficient: penalty per active latent, for jumprelu.
        auxiliary_weight: weight of the auxiliary loss, for topk and batchtopk.
        threshold_rate: share by which each step moves the threshold of batchtopk to that of its batch.
        dtype: dtype of the encoder's matrix product; everything else is float32.
    """

    threshold: Tensor
    """θ: (d_sae,) for jumprelu, a scalar for batchtopk."""

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        architecture: str,
        *,
        k: int,
        l0_coefficient: float,
        auxiliary_weight: float,
        threshold_rate: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        directions = F.normalize(torch.randn(d_sae, d_in), dim=-1)
        self.W_enc = nn.Parameter(directions.clone())
        self.b_enc = nn.Parameter(torch.zeros(d_sae))
        self.W_dec = nn.Parameter(directions)
        self.b_dec = nn.Parameter(torch.zeros(d_in))
        if architecture == "jumprelu":
            self.threshold = nn.Parameter(torch.full((d_sae,), FIRST_THRESHOLD))
        elif architecture == "batchtopk":
            self.register_buffer("threshold", torch.zeros(()))
        self.architecture, self.k, self.dtype = architecture, k, dtype
        self.l0_coefficient, self.auxiliary_weight = l0_coefficient, auxiliary_weight
        self.threshold_rate = threshold_rate

    def forward(self, z: Tensor, dead: Tensor, progress: float) -> StepResult:
        """Compute the losses of a batch.

        Args:
            z: (N, d) float32.
            dead: ids of the latents that count as dead.
            progress: share of the training that is done, by which the penalty of jumprelu rises.
        """
        if self.architecture == "topk":
            values, indices = self._strongest(z, self.W_enc, self.b_enc, self.k)
            decoded = _decode(values, indices, self.W_dec)
            active = torch.bincount(indices[values > 0], minlength=len(self.W_enc))
        else:
            before = F.linear(z, self.W_enc, self.b_enc)
            latents = self._batch_topk(before) if self.architecture == "batchtopk" else self._jumprelu(before)
            decoded = latents @ self.W_dec
            active = (latents > 0).sum(0)
        error = z - decoded - self.b_dec
        variance = (z - z.mean(0)).square().sum(-1).mean()
        loss = squared_error = error.square().sum(-1).mean()
        if self.architecture == "jumprelu":
            penalty = torch.tanh(TANH_SCALE * latents).sum(-1).mean()
            too_low = (self.threshold[dead] - before[:, dead]).relu().sum(-1).mean()
            loss = loss + progress * self.l0_coefficient * penalty + PRE_ACTIVATION_WEIGHT * too_low
        elif self.auxiliary_weight and len(dead):
            loss = loss + self.auxiliary_weight * self._auxiliary_loss(z, error.detach(), dead)
        return StepResult(loss, (squared_error / variance).detach(), active)

    def _strongest(self, z: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the k largest pre-activations after ReLU, and their ids, (N, k) each."""
        values, indices = _TopK.apply(z, W_enc, b_enc, k, self.dtype)
        return values.relu(), indices

    def _auxiliary_loss(self, z: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        """Return the squared error with which the d / 2 strongest dead latents of each token reconstruct `error`.

        This is AuxK (arXiv 2406.04093, appendix A.2). With fewer dead latents it counts proportionately less.
        """
        wanted = max(1, z.shape[1] // 2)
        k = min(wanted, len(dead))
        values, indices = self._strongest(z, self.W_enc[dead], self.b_enc[dead], k)
        decoded = _decode(values, indices, self.W_dec[dead])
        return (error - decoded).square().sum(-1).mean() * (k / wanted)

    def _batch_topk(self, before: Tensor) -> Tensor:
        """Keep the N · k largest activations of the batch (arXiv 2412.06410), and follow the smallest of them."""
        positive = before.relu().flatten()
        top = positive.topk(self.k * len(before), sorted=False)
        least = top.values.detach()
        least = torch.where(least > 0, least, torch.inf).min()
        found = least.isfinite()
        self.threshold = self.threshold + self.threshold_rate * torch.where(found, least - self.threshold, 0.0)
        return torch.zeros_like(positive).scatter(0, top.indices, top.values).view_as(before)

    def _jumprelu(self, before: Tensor) -> Tensor:
        # Below 0 the threshold would pass negative pre-activations.
        self.threshold.data.clamp_(min=0.0)
        return _JumpReLU.apply(before, self.threshold)

    @torch.no_grad()
    def match_scale(self, z: Tensor) -> None:
        """Scale the encoder: its pre-activations of z (N, d) vary alike, and the k strongest reconstruct z best.

        Without the first, latents whose random direction has little variance in z would be dead from the start. The
        second is appendix A.1 of arXiv 2406.04093.
        """
        self.W_enc.div_(F.linear(z, self.W_enc).std(0).clamp(min=1e-30).unsqueeze(-1))
        values, indices = self._strongest(z, self.W_enc, self.b_enc, self.k)
        decoded = _decode(values, indices, self.W_dec)
        self.W_enc.mul_((z * decoded).sum() / decoded.square().sum().clamp(min=1e-30))

    @torch.no_grad()
    def revive(self, z: Tensor, dead: Tensor) -> None:
        """Raise the bias of each dead latent until it is among the k strongest at the token of z where it is closest.

        The auxiliary loss gives dead latents a direction, but where little is left to reconstruct it also keeps their
        activations too small to ever be among the k strongest. Afterwards the main loss trains them.
        """
        floor = self._strongest(z, self.W_enc, self.b_enc, self.k)[0].amin(-1, keepdim=True)
        before = F.linear(z, self.W_enc[dead], self.b_enc[dead])
        self.b_enc[dead] += (1.01 * floor - before).amin(0)  # a little above, for rounding

    @torch.no_grad()
    def constrain_gradient(self) -> None:
        """Remove the part of the gradient that only changes the norms of the decoder's directions."""
        grad = self.W_dec.grad
        assert grad is not None
        grad -= (grad * self.W_dec).sum(-1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def constrain_weights(self) -> None:
        """Restore the norm 1 of the decoder's directions."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-30))

    @torch.no_grad()
    def unscaled(self, scaling: InputScaling) -> dict[str, Tensor]:
        """Return the weights of the same SAE of raw activations x, in SAELens' shapes."""
        mean, scale = scaling
        weights = {
            "W_enc": (self.W_enc / scale).T,
            "b_enc": self.b_enc + self.W_enc @ self.b_dec,
            "W_dec": self.W_dec * scale,
            "b_dec": mean + scale * self.b_dec,
        }
        if self.architecture != "topk":
            weights["threshold"] = self.threshold.clamp(min=0.0).expand(len(self.W_enc))
        return {name: tensor.float().cpu().contiguous().clone() for name, tensor in weights.items()}


def _decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Return Σ_j values[n, j] · W_dec[indices[n, j]], (N, d). Only the rows of active latents are read."""
    # Float32 under any autocast: CUDA has no bfloat16 gradient of weighted bags.
    return F.embedding_bag(indices, W_dec, per_sample_weights=values, mode="sum")


class _TopK(torch.autograd.Function):
    """The k largest pre-activations of each token. Its backward pass reads the k active latents only."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        before = F.linear(z.to(dtype), W_enc.to(dtype), b_enc.to(dtype))
        values, indices = before.topk(k, dim=-1, sorted=False)
        ctx.save_for_backward(z, indices)
        ctx.latents = len(W_enc)
        ctx.mark_non_differentiable(indices)
        return values.float(), indices

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        z, indices = ctx.saved_tensors
        grad_W_enc = _summed_by_latent(gradients[0], indices, z, ctx.latents)
        grad_b_enc = _summed_by_latent(gradients[0], indices, torch.ones_like(z[:, :1]), ctx.latents)
        return None, grad_W_enc, grad_b_enc.squeeze(-1), None, None


def _summed_by_latent(weights: Tensor, indices: Tensor, rows: Tensor, latents: int) -> Tensor:
    """Return (latents, d): for each latent the sum over its tokens n of weights[n, j] · rows[n].

    This is the gradient of a weighted bag with respect to its table.
    """
    with torch.enable_grad():
        table = rows.new_zeros(latents, rows.shape[1], requires_grad=True)
        bags = F.embedding_bag(indices, table, per_sample_weights=weights.contiguous(), mode="sum")
    return torch.autograd.grad(bags, table, rows)[0]


class _JumpReLU(torch.autograd.Function):
    """x where x > θ, else 0, with straight-through gradients of θ and x in a band around θ (arXiv 2407.14435)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(x, threshold)
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, threshold = ctx.saved_tensors
        near = (threshold / BANDWIDTH) * ((x - threshold).abs() < BANDWIDTH / 2) * gradients[0]
        return (x > threshold) * gradients[0] + near, -near.sum(0)
