"""The SAE in training: sparse gradients, scaled inputs, revival of dead latents, and its form for raw activations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.trainable_sae import InputScaling, TrainableSAE, measure_scaling

N, D, C, K = 64, 16, 48, 4
NONE = torch.tensor([], dtype=torch.long)


def new_sae(architecture: str = "topk", **changes) -> TrainableSAE:
    torch.manual_seed(0)
    settings = {"k": K, "l0_coefficient": 0.2, "auxiliary_weight": 1 / 32, "threshold_rate": 0.1, **changes}
    return TrainableSAE(D, C, architecture, **settings)


def mixtures(tokens: int, seed: int = 1) -> Tensor:
    """Sums of three of 32 directions, with a mean, and two dimensions a thousand times as wide as the others."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(32, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    chosen = torch.rand(tokens, 32, generator=generator).topk(3).indices
    x = (directions[chosen] * (1 + torch.rand(tokens, 3, 1, generator=generator))).sum(1) + 5
    return x * torch.tensor([1000.0, 1000.0, *[1.0] * (D - 2)])


def trained(scaling: InputScaling, steps: int = 250, **changes) -> TrainableSAE:
    sae = new_sae(**changes)
    optimizer = torch.optim.Adam(sae.parameters(), lr=5e-3)
    for step in range(steps):
        sae(scaling(mixtures(256, seed=10 + step)), NONE, step / steps).loss.backward()
        sae.constrain_gradient()
        optimizer.step()
        optimizer.zero_grad()
        sae.constrain_weights()
    return sae


def loaded(sae: TrainableSAE, scaling: InputScaling) -> SparseAutoencoder:
    return SparseAutoencoder(**sae.unscaled(scaling), **({"k": sae.k} if sae.architecture == "topk" else {}))


def unexplained(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """Of each dimension, (d,)."""
    return (x - sae.reconstruct(x)).square().sum(0) / (x - x.mean(0)).square().sum(0)


def test_the_gradients_of_topk_are_those_of_dense_operations():
    sae, z = new_sae(), torch.randn(N, D)
    dead = torch.arange(0, C, 3)
    sae(z, dead, 0.0).loss.backward()
    found = {name: weight.grad.clone() for name, weight in sae.named_parameters()}
    sae.zero_grad()

    def dense_topk(W_enc: Tensor, b_enc: Tensor, k: int) -> Tensor:
        before = z @ W_enc.T + b_enc
        top = before.topk(k)
        return torch.zeros_like(before).scatter(1, top.indices, top.values.relu())

    error = z - dense_topk(sae.W_enc, sae.b_enc, K) @ sae.W_dec - sae.b_dec
    revived = dense_topk(sae.W_enc[dead], sae.b_enc[dead], D // 2) @ sae.W_dec[dead]
    loss = error.square().sum(-1).mean() + (error.detach() - revived).square().sum(-1).mean() / 32
    loss.backward()
    torch.testing.assert_close(found, {name: weight.grad for name, weight in sae.named_parameters()})


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_the_sae_of_raw_activations_has_the_latents_and_reconstructions_of_the_scaled_one(architecture):
    x = mixtures(512)
    scaling = measure_scaling(iter([x]), 1)
    sae = new_sae(architecture)
    with torch.no_grad():
        for weight in (sae.b_enc, sae.b_dec):
            weight.normal_(std=0.1)
        sae.threshold = torch.nn.Parameter(torch.rand(C)) if architecture == "jumprelu" else torch.tensor(0.5)
    z = scaling(x).double()
    before = z @ sae.W_enc.T.double() + sae.b_enc
    if architecture == "topk":
        latents = torch.zeros_like(before).scatter(1, before.topk(K).indices, before.topk(K).values.relu())
    else:
        latents = before * (before > sae.threshold)
    raw = loaded(sae, scaling)
    found = raw.encode(x)
    dense = torch.zeros(512, C).scatter_add(1, found.indices, found.values)
    torch.testing.assert_close(dense.double(), latents.detach(), atol=1e-4, rtol=1e-4)
    decoded = latents @ sae.W_dec.double() + sae.b_dec
    torch.testing.assert_close(scaling(raw.reconstruct(x)).double(), decoded.detach(), atol=1e-3, rtol=1e-3)


def test_scaling_is_mean_and_deviation_and_a_constant_dimension_stays_finite():
    x = torch.randn(300, 4) * torch.tensor([1.0, 50.0, 2.0, 0.0]) + 7
    mean, scale = measure_scaling(iter([*x.split(100), x + 100]), 3)
    torch.testing.assert_close(mean, x.mean(0))
    torch.testing.assert_close(scale[:3], x.std(0, correction=0)[:3])
    assert 0 < scale[3] < 0.01


def test_massive_dimensions_do_not_hide_the_others():
    x = mixtures(2048, seed=2)
    one_scale = InputScaling(x.mean(0), (x - x.mean(0)).square().sum(-1).mean().sqrt().expand(D) / D**0.5)
    scaled, plain = (
        unexplained(loaded(trained(scaling), scaling), x) for scaling in (measure_scaling(iter([x]), 1), one_scale)
    )
    assert plain[:2].max() < 0.01  # all that the total figure shows
    assert plain[2:].mean() > 0.9
    assert scaled.max() < 0.5


def test_the_auxiliary_loss_teaches_dead_latents_only():
    z = torch.randn(N, D)
    dead = torch.tensor([5, 9])
    with_it, without = new_sae(), new_sae(auxiliary_weight=0.0)
    for sae in (with_it, without):
        with torch.no_grad():
            sae.b_enc[dead] = -100.0  # never among the strongest
        sae(z, dead, 0.0).loss.backward()
    changed = (with_it.W_dec.grad != without.W_dec.grad).any(-1)
    assert not without.W_dec.grad[dead].any()
    assert not changed[torch.ones(C, dtype=torch.bool).index_fill(0, dead, False)].any()
    with torch.no_grad():
        with_it.b_enc[dead] = 0.0
    with_it.zero_grad()
    with_it(z, dead, 0.0).loss.backward()
    assert with_it.W_dec.grad[dead].any()


def test_a_revived_latent_is_active_at_the_token_where_it_was_closest():
    sae, z = new_sae(), torch.randn(N, D)
    dead = torch.tensor([5, 9])
    with torch.no_grad():
        sae.b_enc[dead] = torch.tensor([-3.0, -100.0])
    before = sae(z, NONE, 0.0).active
    sae.revive(z, dead)
    after = sae(z, NONE, 0.0).active
    assert not before[dead].any()
    assert (after[dead] >= 1).all()
    assert (after[dead] <= 3).all()
    assert after.sum() == before.sum() == N * K


def test_training_keeps_the_directions_at_norm_one():
    scaling = measure_scaling(iter([mixtures(512)]), 1)
    sae = trained(scaling, steps=5)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(C))


def test_latents_start_equally_likely_however_little_varies_in_their_direction():
    sae, z = new_sae(), torch.randn(2000, D) * torch.linspace(0.05, 1, D)
    sae.match_scale(z)
    deviations = (z @ sae.W_enc.T).std(0)
    torch.testing.assert_close(deviations, deviations.mean().expand(C))


def test_the_encoder_is_scaled_to_reconstruct_best():
    sae, z = new_sae(), torch.randn(N, D)
    errors = []
    for factor in (1.0, 0.9, 1.1):
        sae = new_sae()
        sae.match_scale(z)
        with torch.no_grad():
            sae.W_enc *= factor
        errors.append(sae(z, NONE, 0.0).unexplained.item())
    assert errors[0] == min(errors)


def test_a_bfloat16_product_trains_in_float32():
    scaling = measure_scaling(iter([mixtures(512)]), 1)
    sae = trained(scaling, dtype=torch.bfloat16)
    assert {weight.dtype for weight in sae.parameters()} == {torch.float32}
    assert unexplained(loaded(sae, scaling), mixtures(512, seed=3)).mean() < 0.5
