"""Sparse autoencoders as this program uses them: frozen, and sparse from the encoder on.

N tokens, d_in teacher width, d_sae latents, k latents kept per token.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from cocomix import fingerprint
from cocomix.errors import InputError

NORM_EPSILON = 1e-5
"""Added to the standard deviation by SAEs that normalise their input (OpenAI's, SAELens' `layer_norm`)."""
ENCODE_BUFFER_BYTES = 128 * 2**20
"""The only dense buffer of an encoding, (chunk, d_sae) pre-activations, stays below this size."""


class Latents(NamedTuple):
    """Active latents of each token, sparse."""

    values: Tensor
    """(..., k) activations, ≥ 0; 0 where fewer than k latents are active."""
    indices: Tensor
    """(..., k) latent ids, int64."""


class SparseAutoencoder(nn.Module):
    """A TopK sparse autoencoder: a = ReLU(top k of (x̂ − b_pre) W_enc + b_enc), x̃ = a W_dec + b_dec.

    Args:
        W_enc: (d_in, d_sae).
        b_enc: (d_sae,).
        W_dec: (d_sae, d_in), one direction per latent.
        b_dec: (d_in,).
        k: latents kept per token.
        layer_norm: x̂ is x less its mean, divided by its (unbiased) standard deviation + 1e-5; the
            reconstruction is scaled back. Otherwise x̂ = x.
        subtract_b_dec: b_pre is b_dec; otherwise 0.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self,
        *,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        k: int,
        layer_norm: bool = False,
        subtract_b_dec: bool = True,
    ) -> None:
        super().__init__()
        for name, tensor in {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}.items():
            self.register_buffer(name, tensor.detach().contiguous())
        self.k = k
        self.layer_norm = layer_norm
        self.subtract_b_dec = subtract_b_dec

    @property
    def d_in(self) -> int:
        """Width of the activations that it reads."""
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents (concepts)."""
        return self.W_dec.shape[0]

    def fingerprint(self) -> str:
        """Fingerprint of weights and settings."""
        settings = [self.k, self.layer_norm, self.subtract_b_dec]
        return fingerprint.of_json([fingerprint.of_tensors(self.named_buffers()), settings])

    @torch.no_grad()
    def encode(self, x: Tensor) -> Latents:
        """Active latents of x (..., d_in), computed in the weights' precision."""
        rows = self._normalised(x.to(self.W_enc.dtype))[0].flatten(0, -2)
        if self.subtract_b_dec:
            rows = rows - self.b_dec
        chunk = max(1, ENCODE_BUFFER_BYTES // (self.d_sae * rows.element_size()))
        kept = [torch.addmm(self.b_enc, part, self.W_enc).topk(self.k, dim=-1) for part in rows.split(chunk)]
        shape = (*x.shape[:-1], self.k)
        return Latents(
            values=torch.cat([top.values for top in kept]).relu().view(shape),
            indices=torch.cat([top.indices for top in kept]).view(shape),
        )

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """x̃ (..., d_in): decode the encoding of x."""
        latents = self.encode(x)
        rows = F.embedding_bag(
            latents.indices.flatten(0, -2),
            self.W_dec,
            per_sample_weights=latents.values.flatten(0, -2),
            mode="sum",
        )
        _, mean, scale = self._normalised(x.to(self.W_enc.dtype))
        return ((rows + self.b_dec).view(x.shape) * scale + mean).to(x.dtype)

    def _normalised(self, x: Tensor) -> tuple[Tensor, Tensor | float, Tensor | float]:
        """x̂, and the mean and scale that undo it."""
        if not self.layer_norm:
            return x, 0.0, 1.0
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        return (x - mean) / (std + NORM_EPSILON), mean, std


def load_sae(source: str | Path) -> SparseAutoencoder:
    """Load an SAE: a SAELens folder (`cfg.json`, `sae_weights.safetensors`) or an OpenAI `.pt` file.

    Raises:
        InputError: nothing there, not an SAE, or one of a kind that cannot serve.
    """
    path = Path(source)
    if path.is_dir() and (path / "cfg.json").is_file():
        return _from_saelens(path)
    if path.is_file():
        return _from_openai(path)
    raise InputError(
        f"no SAE at {str(source)!r}: expected a SAELens folder (with cfg.json) or a .pt file of OpenAI's format"
    )


def _from_saelens(folder: Path) -> SparseAutoencoder:
    try:
        config: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
        architecture, norm = config.get("architecture"), config.get("normalize_activations", "none")
    except Exception as error:
        raise _unreadable(folder, "a SAELens folder", error) from None
    if architecture != "topk":
        raise InputError(f"the SAE in {folder} is of architecture {architecture!r}; expected 'topk'")
    if norm not in ("none", "layer_norm"):
        raise InputError(
            f"the SAE in {folder} normalises its input by {norm!r}; expected 'none' or 'layer_norm' "
            "(fold other normalisations into the weights first)"
        )
    try:
        weights = load_file(folder / "sae_weights.safetensors")
        W_enc, b_enc, W_dec, b_dec = (weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
        k = int(config["k"])
    except Exception as error:
        raise _unreadable(folder, "a SAELens folder", error) from None
    if config.get("rescale_acts_by_decoder_norm", False):
        norms = W_dec.norm(dim=-1)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms, W_dec / norms[:, None]
    return SparseAutoencoder(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        k=k,
        layer_norm=norm == "layer_norm",
        subtract_b_dec=config.get("apply_b_dec_to_input", True),
    )


def _from_openai(path: Path) -> SparseAutoencoder:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        activation = state.get("activation")
        W_enc, W_dec = state["encoder.weight"].T, state["decoder.weight"].T
        b_enc, b_dec = state["latent_bias"], state["pre_bias"]
        k = int(state["activation_state_dict"]["k"]) if activation == "TopK" else 0
    except Exception as error:
        raise _unreadable(path, "an SAE in OpenAI's format", error) from None
    if activation != "TopK":
        raise InputError(f"the SAE in {path} has the activation {activation!r}; expected 'TopK'")
    return SparseAutoencoder(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec, k=k, layer_norm=True)


def _unreadable(path: Path, expected: str, error: Exception) -> InputError:
    """For whatever a reader raises when a file is cut off, or is something else."""
    reason = " ".join(f"{type(error).__name__} {error}".split())
    return InputError(f"{path} is not {expected}: {reason[:160]}")
