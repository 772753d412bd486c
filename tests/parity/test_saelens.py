"""An SAE that SAELens saved gives here what it gives in SAELens."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

from cocomix.concepts.sae import Latents, load_sae

D_IN, D_SAE, K = 24, 90, 12
SETTINGS = [
    pytest.param(
        {
            "normalize_activations": norm,
            "apply_b_dec_to_input": b_dec,
            "rescale_acts_by_decoder_norm": rescale,
        },
        id=f"{norm}-{'with' if b_dec else 'without'}_b_dec-{'rescaled' if rescale else 'as_is'}",
    )
    for norm, b_dec, rescale in product(("none", "layer_norm"), (True, False), (True, False))
]


@torch.no_grad()
def draw(sae: torch.nn.Module) -> None:
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        getattr(sae, name).normal_(std=0.4)
    sae.b_enc -= 4.0  # so that some tokens have fewer than K active latents
    sae.W_dec *= torch.linspace(0.5, 2.0, D_SAE)[:, None]  # so that the norms of the directions matter


def saved_sae(folder: Path, settings: dict, kind: str) -> TopKSAE | TopKTrainingSAE:
    if kind == "inference":
        sae = TopKSAE(TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, device="cpu", **settings))
        draw(sae)
        sae.save_model(folder)
    else:
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K, device="cpu", **settings))
        draw(sae)
        sae.save_inference_model(folder)
    return sae.eval()


def dense(latents: Latents) -> torch.Tensor:
    return torch.zeros(*latents.values.shape[:-1], D_SAE).scatter(-1, latents.indices, latents.values)


@pytest.mark.parametrize("kind", ["inference", "training"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_saved_sae_equals_saelens(settings, kind, tmp_path):
    theirs = saved_sae(tmp_path, settings, kind)
    ours = load_sae(tmp_path)
    assert (ours.d_in, ours.d_sae, ours.k) == (D_IN, D_SAE, K)
    x = torch.randn(3, 20, D_IN) * 2 + 0.5
    with torch.no_grad():
        expected = theirs.encode(x)
        expected = expected.to_dense() if expected.is_sparse else expected
        rebuilt = theirs.decode(expected)
    found = dense(ours.encode(x))
    assert ((expected > 0).sum(-1) < K).any()
    assert torch.equal(found > 0, expected > 0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), rebuilt, rtol=1e-5, atol=1e-5)


def test_the_decoder_directions_reproduce_what_saelens_adds_per_latent(tmp_path):
    """Attribution reads a · W_dec, so that product, and not each of the two, must be SAELens'."""
    theirs = saved_sae(tmp_path, {"rescale_acts_by_decoder_norm": True}, "inference")
    ours = load_sae(tmp_path)
    x = torch.randn(5, D_IN)
    with torch.no_grad():
        rebuilt = theirs(x)
    torch.testing.assert_close(dense(ours.encode(x)) @ ours.W_dec + ours.b_dec, rebuilt, rtol=1e-5, atol=1e-5)
