"""Sparse autoencoders as this program uses them: frozen, and sparse from the encoder on.

N tokens, d_in teacher width, d_sae latents, width latents kept per token.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocomix import fingerprint
from cocomix.errors import InputError

NORM_EPSILON = 1e-5
"""Added to the standard deviation by SAEs that normalise their input (OpenAI's, SAELens' `layer_norm`)."""
ENCODE_BUFFER_BYTES = 128 * 2**20
"""What is dense in an encoding, (chunk, d_sae) pre-activations and their mask, stays below this size."""
MAX_ACTIVE = 256
"""Latents kept per token at most, where the SAE itself sets no limit."""
NORMALISATIONS = ("none", "centre", "layer_norm", "constant_norm_rescale")


class Latents(NamedTuple):
    """Active latents of each token, sparse."""

    values: Tensor
    """(..., width) activations, ≥ 0; 0 where fewer latents are active."""
    indices: Tensor
    """(..., width) latent ids, int64; any valid id where the value is 0."""
    cut: Tensor | None = None
    """(...) bool, where more latents were active than are kept; None where that is not known."""


class SparseAutoencoder(nn.Module):
    """A frozen sparse autoencoder: a = σ(x̂' W_enc + b_enc), x̃ = a W_dec + b_dec, in the units of x.

    One encoder and one decoder with one of two activations σ: TopK keeps the k largest
    pre-activations, then ReLU; a threshold θ ≥ 0 keeps every pre-activation above it. ReLU is θ = 0
    and JumpReLU its own θ. A Gated SAE is one too: its gate W x + b_gate > 0, times exp(r_mag) > 0, is
    a bound on its magnitude m = exp(r_mag) W x + b_mag, so that W_enc = exp(r_mag) W, b_enc = b_mag
    and θ = max(0, b_mag − exp(r_mag) b_gate) give ReLU(m) where the gate is open.

    Args:
        W_enc: (d_in, d_sae); all tensors are held in its precision, and encoding works in it.
        b_enc: (d_sae,).
        W_dec: (d_sae, d_in), one direction per latent.
        b_dec: (d_in,).
        k: latents kept per token, for TopK.
        threshold: θ (d_sae,) ≥ 0, otherwise.
        max_active: latents kept per token at most where a threshold decides, the strongest; with
            TopK it is k.
        normalisation: from x to x̂, undone in the reconstruction. `none`; `centre`: less its mean over
            d_in; `layer_norm`: that, divided by the (unbiased) standard deviation + 1e-5;
            `constant_norm_rescale`: scaled to the norm √d_in.
        subtract_b_dec: x̂' is x̂ − b_dec; otherwise x̂.
        teacher_layer: 0-based block after which it was trained to read, if that is on record.

    Attributes:
        tokens_cut: tokens so far that had more than max_active active latents.

    Raises:
        InputError: weights that are not floating-point, shapes that do not fit, not exactly one of k and threshold, a
            bad setting.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None

    def __init__(
        self,
        *,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        k: int | None = None,
        threshold: Tensor | None = None,
        max_active: int = MAX_ACTIVE,
        normalisation: str = "none",
        subtract_b_dec: bool = True,
        teacher_layer: int | None = None,
    ) -> None:
        super().__init__()
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
        problem = (
            _type_problem(weights)
            or _shape_problem(weights)
            or _setting_problem(k, threshold, max_active, normalisation, len(W_dec))
        )
        if problem:
            raise InputError(problem)
        for name, tensor in weights.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().to(W_enc.dtype).contiguous())
        self.k = k
        self.max_active = min(max_active, self.d_sae) if k is None else k
        self.normalisation = normalisation
        self.subtract_b_dec = subtract_b_dec
        self.teacher_layer = teacher_layer
        self.tokens_cut = 0

    @property
    def d_in(self) -> int:
        """Width of the activations that it reads."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents (concepts)."""
        return self.W_dec.shape[0]

    def fingerprint(self) -> str:
        """Fingerprint of weights and settings: of all that decides what encoding gives."""
        settings = [self.k, self.max_active, self.normalisation, self.subtract_b_dec]
        return fingerprint.hash_json([fingerprint.hash_tensors(self.named_buffers()), settings])

    @torch.no_grad()
    def encode(self, x: Tensor) -> Latents:
        """Active latents (..., width) of x (..., d_in), strongest first, in the weights' precision.

        The width is k for TopK; otherwise the largest number of latents that are active at a token
        of x, at least 1 and at most `max_active`. A surrounding autocast has no effect.
        """
        with torch.autocast(x.device.type, enabled=False):
            rows = self._normalised(x.to(self.W_enc.dtype))[0].reshape(-1, self.d_in)
            if self.subtract_b_dec:
                rows = rows - self.b_dec
            # A threshold needs a mask of one byte beside each pre-activation.
            dense_row = self.d_sae * (rows.element_size() + (self.threshold is not None))
            kept = [self._strongest(part) for part in rows.split(max(1, ENCODE_BUFFER_BYTES // dense_row))]
        values, indices = torch.cat([each.values for each in kept]), torch.cat([each.indices for each in kept])
        cut = (values[:, self.max_active :] > 0).any(-1)
        if self.threshold is not None:
            self._count_cut(cut)
            # Sorted, so a column is in use where any token has that many active.
            width = max(1, int((values[:, : self.max_active] > 0).any(0).sum()))
            values, indices = values[:, :width].contiguous(), indices[:, :width].contiguous()
        shape = (*x.shape[:-1], values.shape[-1])
        return Latents(values.view(shape), indices.view(shape), cut.view(shape[:-1]))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """x̃ (..., d_in): decode the encoding of x."""
        latents = self.encode(x)
        with torch.autocast(x.device.type, enabled=False):
            rows = F.embedding_bag(
                latents.indices.flatten(0, -2),
                self.W_dec,
                per_sample_weights=latents.values.flatten(0, -2),
                mode="sum",
            )
            _, mean, scale = self._normalised(x.to(self.W_enc.dtype))
            return ((rows + self.b_dec).view(x.shape) * scale + mean).to(x.dtype)

    def _strongest(self, rows: Tensor) -> Latents:
        """Latents of rows (N, d_in), strongest first; what is dense here is freed on return.

        With a threshold there is one slot more than `max_active`, where there are so many latents:
        a token whose last slot is active has more of them than are kept.
        """
        before = torch.addmm(self.b_enc, rows, self.W_enc)
        if self.threshold is None:
            top = before.topk(self.max_active, dim=-1)
        else:
            before.masked_fill_(before <= self.threshold, 0.0)
            top = before.topk(min(self.max_active + 1, self.d_sae), dim=-1)
        return Latents(values=top.values.relu_(), indices=top.indices)

    def _count_cut(self, tokens_cut: Tensor) -> None:
        """Count the tokens, (N,) bool, that are active beyond `max_active`; warn of the first."""
        cut = int(tokens_cut.sum())
        if cut and not self.tokens_cut:
            warnings.warn(
                f"{cut} of {len(tokens_cut)} tokens have more than max_active = {self.max_active} active latents; the "
                "strongest are kept: raise max_active to keep all (said once; tokens_cut counts on)",
                stacklevel=2,
            )
        self.tokens_cut += cut

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """x̂, and the mean and scale that undo it."""
        if self.normalisation == "none":
            return x, 0.0, 1.0
        if self.normalisation == "constant_norm_rescale":
            # A token of zeros stays one.
            scale = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / self.d_in**0.5
            return x / scale, 0.0, scale
        mean = x.mean(-1, keepdim=True)
        if self.normalisation == "centre":
            return x - mean, mean, 1.0
        std = x.std(-1, keepdim=True)
        return (x - mean) / (std + NORM_EPSILON), mean, std


def _type_problem(weights: dict[str, Tensor | None]) -> str | None:
    for name, tensor in weights.items():
        if tensor is not None and not tensor.is_floating_point():
            return f"{name} is of type {tensor.dtype}; expected floating-point numbers"
    return None


def _shape_problem(weights: dict[str, Tensor | None]) -> str | None:
    W_enc = weights["W_enc"]
    assert W_enc is not None
    if W_enc.ndim != 2 or 0 in W_enc.shape:
        return f"W_enc has the shape {tuple(W_enc.shape)}; expected (d_in, d_sae)"
    d_in, d_sae = W_enc.shape
    expected = {"b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,), "threshold": (d_sae,)}
    for name, shape in expected.items():
        tensor = weights[name]
        if tensor is not None and tuple(tensor.shape) != shape:
            return f"{name} has the shape {tuple(tensor.shape)}; with W_enc {(d_in, d_sae)} it must be {shape}"
    return None


def _setting_problem(
    k: int | None, threshold: Tensor | None, max_active: int, normalisation: str, d_sae: int
) -> str | None:
    if (k is None) == (threshold is None):
        return "an SAE needs exactly one of k (TopK) and threshold (ReLU, JumpReLU, Gated)"
    if k is not None and not 1 <= k <= d_sae:
        return f"k is {k}; with {d_sae} latents it must be 1 to {d_sae}"
    if threshold is not None and bool((threshold < 0).any()):
        return "threshold has entries below 0; a latent is active above it and never negative, so use 0"
    if max_active < 1:
        return f"max_active is {max_active}; expected 1 or more"
    if normalisation not in NORMALISATIONS:
        return f"normalisation is {normalisation!r}; expected one of {', '.join(NORMALISATIONS)}"
    return None
