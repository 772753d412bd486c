"""Frozen sparse autoencoders with sparse encodings.

N tokens, d_in teacher width, d_sae latents, width latents kept per token.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cocomix.common import fingerprint
from cocomix.common.errors import InputError
from cocomix.models.linear_loss import largest

NORM_EPSILON = 1e-5
"""Added to the standard deviation by SAEs that normalize their input (OpenAI's, SAELens' `layer_norm`)."""
ENCODE_BUFFER_BYTES = {"cpu": 2**27, "cuda": 2**30}
"""Upper bound for the dense part of an encoding, by device type: (chunk, d_sae) pre-activations and their mask."""
MAX_ACTIVE = 256
"""Default maximum of latents per token for SAEs without a k."""
NORMALIZATIONS = ("none", "centre", "layer_norm", "constant_norm_rescale")


class Latents(NamedTuple):
    """Sparse activations of each token."""

    values: Tensor
    """(..., width) activations ≥ 0, padded with 0 where fewer latents are active."""
    indices: Tensor
    """(..., width) latent ids, int64; an arbitrary valid id where the value is 0."""
    cut: Tensor | None = None
    """(...) bool, True where more latents were active than are kept; None if unknown."""


class SparseAutoencoder(nn.Module):
    """A frozen sparse autoencoder: a = σ(x̂' W_enc + b_enc), x̃ = a W_dec + b_dec, in the units of x.

    One encoder and one decoder with one of two activations σ. TopK keeps the k largest pre-activations and applies
    ReLU. A threshold θ ≥ 0 keeps every pre-activation above it: ReLU is θ = 0, and JumpReLU learns θ. A gated SAE has
    this form too: its gate W x + b_gate > 0, times exp(r_mag) > 0, is a bound on its magnitude
    m = exp(r_mag) W x + b_mag. Hence W_enc = exp(r_mag) W, b_enc = b_mag, and θ = max(0, b_mag − exp(r_mag) b_gate)
    give ReLU(m) where the gate is open.

    Args:
        W_enc: (d_in, d_sae). Its dtype becomes that of all tensors and of encoding.
        b_enc: (d_sae,).
        W_dec: (d_sae, d_in), one direction per latent.
        b_dec: (d_in,).
        k: number of latents kept per token, for TopK.
        threshold: θ (d_sae,) ≥ 0, for the other architectures.
        max_active: with a threshold, the maximum number of latents kept per token, strongest first. Ignored by TopK.
        normalization: how x̂ is computed from x; undone in the reconstruction. `none`; `centre`: subtract the mean
            over d_in; `layer_norm`: also divide by the (unbiased) standard deviation + 1e-5;
            `constant_norm_rescale`: scale to the norm √d_in.
        subtract_b_dec: if True, x̂' is x̂ − b_dec, else x̂.
        teacher_layer: 0-based block after which the SAE was trained to read, if known.

    Attributes:
        tokens_cut: number of tokens so far with more than `max_active` active latents.

    Raises:
        InputError: weights are not floating-point, shapes do not match, k and threshold are not exclusive, or a
            setting is invalid.
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
        normalization: str = "none",
        subtract_b_dec: bool = True,
        teacher_layer: int | None = None,
    ) -> None:
        super().__init__()
        weights = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, "threshold": threshold}
        problem = (
            _type_problem(weights)
            or _shape_problem(weights)
            or _setting_problem(k, threshold, max_active, normalization, len(W_dec))
        )
        if problem:
            raise InputError(problem)
        for name, tensor in weights.items():
            self.register_buffer(name, None if tensor is None else tensor.detach().to(W_enc.dtype).contiguous())
        self.k = k
        self.max_active = min(max_active, self.d_sae) if k is None else k
        self.normalization = normalization
        self.subtract_b_dec = subtract_b_dec
        self.teacher_layer = teacher_layer
        self.tokens_cut = 0

    @property
    def d_in(self) -> int:
        """Width of the input."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents (concepts)."""
        return self.W_dec.shape[0]

    def extra_repr(self) -> str:
        """Return sizes and settings, which `print(sae)` shows."""
        kept = f"k={self.k}" if self.k is not None else f"threshold, max_active={self.max_active}"
        return f"d_in={self.d_in}, d_sae={self.d_sae}, {kept}, teacher_layer={self.teacher_layer}"

    def fingerprint(self) -> str:
        """Return the fingerprint of weights and settings, which together determine the encoding."""
        settings = [self.k, self.max_active, self.normalization, self.subtract_b_dec]
        return fingerprint.hash_json([fingerprint.hash_tensors(self.named_buffers()), settings])

    def compile_encoder(self) -> None:
        """Compile the matrix product and the choice of the strongest latents."""
        self._strongest = torch.compile(self._strongest)  # type: ignore[method-assign]

    @torch.no_grad()
    def encode(self, x: Tensor) -> Latents:
        """Encode x (..., d_in) to active latents (..., width), strongest first, in the dtype of the weights.

        The width is k for TopK. Otherwise it is the largest number of active latents of a token, at least 1 and at
        most `max_active`. A surrounding autocast has no effect.
        """
        with torch.autocast(x.device.type, enabled=False):
            rows = self._normalized(x.to(self.W_enc.dtype))[0].reshape(-1, self.d_in)
            if self.subtract_b_dec:
                rows = rows - self.b_dec
            # A threshold needs a mask, which adds one byte per pre-activation.
            dense_row = self.d_sae * (rows.element_size() + (self.threshold is not None))
            buffer = ENCODE_BUFFER_BYTES.get(x.device.type, ENCODE_BUFFER_BYTES["cuda"])
            kept = [self._strongest(part) for part in rows.split(max(1, buffer // dense_row))]
        values, indices = torch.cat([each.values for each in kept]), torch.cat([each.indices for each in kept])
        cut = (values[:, self.max_active :] > 0).any(-1)
        if self.threshold is not None:
            self._count_cut(cut)
            # Values are sorted, so a column is used if any token has that many active latents.
            width = max(1, int((values[:, : self.max_active] > 0).any(0).sum()))
            values, indices = values[:, :width].contiguous(), indices[:, :width].contiguous()
        shape = (*x.shape[:-1], values.shape[-1])
        return Latents(values.view(shape), indices.view(shape), cut.view(shape[:-1]))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode x; return x̃ (..., d_in)."""
        return self.decode(self.encode(x), x)

    @torch.no_grad()
    def decode(self, latents: Latents, x: Tensor) -> Tensor:
        """Decode the latents of x (..., d_in), whose scale a normalizing SAE needs; return x̃ (..., d_in)."""
        with torch.autocast(x.device.type, enabled=False):
            rows = F.embedding_bag(
                latents.indices.flatten(0, -2),
                self.W_dec,
                per_sample_weights=latents.values.flatten(0, -2),
                mode="sum",
            )
            _, mean, scale = self._normalized(x.to(self.W_enc.dtype))
            return ((rows + self.b_dec).view(x.shape) * scale + mean).to(x.dtype)

    def _strongest(self, rows: Tensor) -> Latents:
        """Encode rows (N, d_in), strongest first; dense intermediates are freed on return.

        With a threshold there is one slot more than `max_active`, if d_sae allows: a token whose last slot is active
        has more active latents than are kept.
        """
        before = torch.addmm(self.b_enc, rows, self.W_enc)
        if self.threshold is None:
            values, indices = largest(before, self.max_active)
        else:
            before.masked_fill_(before <= self.threshold, 0.0)
            values, indices = largest(before, min(self.max_active + 1, self.d_sae))
        return Latents(values=values.relu_(), indices=indices)

    def _count_cut(self, tokens_cut: Tensor) -> None:
        """Count the tokens (N,) with more than `max_active` active latents; warn the first time."""
        cut = int(tokens_cut.sum())
        if cut and not self.tokens_cut:
            warnings.warn(
                f"{cut} of {len(tokens_cut)} tokens have more than max_active = {self.max_active} active latents; the "
                "strongest are kept; raise max_active to keep all (shown once; see tokens_cut)",
                stacklevel=2,
            )
        self.tokens_cut += cut

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """Return x̂, and the mean and scale that undo the normalization."""
        if self.normalization == "none":
            return x, 0.0, 1.0
        if self.normalization == "constant_norm_rescale":
            # A token of zeros remains zero.
            scale = x.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny) / self.d_in**0.5
            return x / scale, 0.0, scale
        mean = x.mean(-1, keepdim=True)
        if self.normalization == "centre":
            return x - mean, mean, 1.0
        std = x.std(-1, keepdim=True)
        return (x - mean) / (std + NORM_EPSILON), mean, std


def _type_problem(weights: dict[str, Tensor | None]) -> str | None:
    for name, tensor in weights.items():
        if tensor is not None and not tensor.is_floating_point():
            return f"{name} has the dtype {tensor.dtype}; expected a floating-point dtype"
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
    k: int | None, threshold: Tensor | None, max_active: int, normalization: str, d_sae: int
) -> str | None:
    if (k is None) == (threshold is None):
        return "an SAE needs exactly one of k (TopK) and threshold (ReLU, JumpReLU, Gated)"
    if k is not None and not 1 <= k <= d_sae:
        return f"k is {k}; with {d_sae} latents it must be 1 to {d_sae}"
    if threshold is not None and bool((threshold < 0).any()):
        return "threshold has negative entries; activations are never negative, so use 0 instead"
    if max_active < 1:
        return f"max_active is {max_active}; expected 1 or more"
    if normalization not in NORMALIZATIONS:
        return f"normalization is {normalization!r}; expected one of {', '.join(NORMALIZATIONS)}"
    return None
