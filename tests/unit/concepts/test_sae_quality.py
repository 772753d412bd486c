"""The quality figures against a plain computation, at their limits, and as files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset

from cocomix.concepts import sae_quality as module
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.sae_quality import MeasuredSAE, SAEQuality, quality_warnings, sae_quality, write_quality

BLOCKS, BLOCK_SIZE, VOCABULARY, D_IN, D_SAE, LAYER = 9, 8, 53, 32, 80, 1


@pytest.fixture
def teacher(random_teacher):
    return random_teacher("gpt2")


@pytest.fixture
@torch.no_grad()
def ids(teacher) -> torch.Tensor:
    """What the teacher itself would write, so that it has something to lose."""
    ids = torch.randint(VOCABULARY, (BLOCKS, 1))
    while ids.shape[1] < BLOCK_SIZE:
        ids = torch.cat([ids, teacher(ids).logits[:, -1:].argmax(-1)], 1)
    return ids


@pytest.fixture
def blocks(ids) -> Dataset:
    return Dataset.from_dict({"input_ids": ids.tolist()})


def random_sae(**changes) -> SparseAutoencoder:
    weights = {
        "W_enc": torch.randn(D_IN, D_SAE).double() / D_IN,
        "b_enc": torch.randn(D_SAE).double(),
        "W_dec": torch.randn(D_SAE, D_IN).double(),
        "b_dec": torch.randn(D_IN).double(),
        "k": 5,
        **changes,
    }
    return SparseAutoencoder(**weights)


def identity_sae() -> SparseAutoencoder:
    """ReLU(x) − ReLU(−x) is x."""
    eye = torch.eye(D_IN).double()
    return SparseAutoencoder(
        W_enc=torch.cat([eye, -eye], 1),
        b_enc=torch.zeros(2 * D_IN).double(),
        W_dec=torch.cat([eye, -eye]),
        b_dec=torch.zeros(D_IN).double(),
        k=D_IN,
    )


@torch.no_grad()
def plain_loss(teacher, ids, replace) -> float:
    """Nats per token, with the residual stream replaced by hand."""
    handle = teacher.transformer.h[LAYER].register_forward_hook(lambda module, inputs, output: replace(output))
    logits = teacher(ids).logits[:, :-1]
    handle.remove()
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()


@pytest.mark.parametrize("blocks_per_batch", [1, 4, 9])
@pytest.mark.parametrize("kind", ["topk", "threshold"])
def test_figures_equal_a_plain_computation(teacher, ids, blocks, blocks_per_batch, kind):
    sae = random_sae() if kind == "topk" else random_sae(k=None, threshold=torch.rand(D_SAE).double())
    found = sae_quality(teacher, sae, blocks, LAYER, blocks_per_batch)
    quality = found.quality

    with torch.no_grad():
        x = teacher(ids, output_hidden_states=True).hidden_states[LAYER + 1]
    before = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    floor = before.topk(5).values[..., -1:].clamp(min=0) if kind == "topk" else sae.threshold
    is_active = (before >= floor) & (before > 0) if kind == "topk" else before > floor
    latents = before * is_active
    reconstruction = latents @ sae.W_dec + sae.b_dec
    rows = x.flatten(0, 1)
    clean, spliced, zero = (
        plain_loss(teacher, ids, replace) for replace in (lambda x: x, lambda x: reconstruction, torch.zeros_like)
    )

    unexplained = (x - reconstruction).square().sum() / (rows - rows.mean(0)).square().sum()
    assert quality.fraction_variance_unexplained == pytest.approx(unexplained.item(), rel=1e-9)
    assert quality.mean_active == pytest.approx(is_active.sum().item() / ids.numel())
    assert quality.dead_share == pytest.approx(1 - is_active.flatten(0, 1).any(0).double().mean().item())
    each = (rows - reconstruction.flatten(0, 1)).square().sum(0) / (rows - rows.mean(0)).square().sum(0)
    assert quality.dimension_variance_unexplained == pytest.approx(each.mean().item(), rel=1e-5)
    assert quality.teacher_loss == pytest.approx(clean, rel=1e-9)
    assert quality.spliced_loss == pytest.approx(spliced, rel=1e-9)
    assert quality.zero_loss == pytest.approx(zero, rel=1e-9)
    assert quality.loss_recovered == pytest.approx((zero - spliced) / (zero - clean), rel=1e-6)
    assert quality.tokens == ids.numel()
    torch.testing.assert_close(found.frequency, is_active.double().mean((0, 1)))


def test_a_perfect_sae_recovers_all_of_the_loss(teacher, blocks):
    quality = sae_quality(teacher, identity_sae(), blocks, LAYER, 4).quality
    assert quality.loss_recovered == pytest.approx(1.0, abs=1e-9)
    assert quality.fraction_variance_unexplained == pytest.approx(0.0, abs=1e-9)
    assert quality.mean_active == pytest.approx(D_IN)


def test_an_sae_that_gives_zeros_recovers_nothing(teacher, blocks):
    sae = random_sae(W_dec=torch.zeros(D_SAE, D_IN).double(), b_dec=torch.zeros(D_IN).double())
    quality = sae_quality(teacher, sae, blocks, LAYER, 4).quality
    assert quality.loss_recovered == pytest.approx(0.0, abs=1e-9)
    assert quality.fraction_variance_unexplained >= 1


def test_latents_that_are_always_or_never_active_are_counted_so(teacher, blocks):
    always, never = 3, [7, 11]
    b_enc = torch.zeros(D_SAE).double()
    b_enc[always], b_enc[never] = 1e6, -1e6
    found = sae_quality(teacher, random_sae(b_enc=b_enc), blocks, LAYER, 4)
    assert found.frequency.shape == (D_SAE,)
    assert found.frequency[always] == 1
    assert (found.frequency[never] == 0).all()
    assert found.quality.dead_share == pytest.approx((found.frequency == 0).double().mean().item())
    assert found.frequency.sum().item() == pytest.approx(found.quality.mean_active)


def test_no_more_than_enough_tokens_are_read(teacher, blocks, monkeypatch):
    monkeypatch.setattr(module, "EVALUATION_TOKENS", 4 * BLOCK_SIZE - 1)
    found = sae_quality(teacher, random_sae(), blocks, LAYER, 3)
    assert found.quality.tokens == 4 * BLOCK_SIZE


def test_a_batch_costs_three_forward_passes(teacher, blocks):
    passes = []
    teacher.register_forward_hook(lambda *_: passes.append(1))
    sae_quality(teacher, random_sae(), blocks, LAYER, BLOCKS)
    assert len(passes) == 3


@pytest.mark.parametrize(("b_dec", "unexplained"), [(0.0, 0.0), (1.0, 1.0)])
def test_where_nothing_varies_and_nothing_is_lost_there_are_still_figures(teacher, blocks, b_dec, unexplained):
    with torch.no_grad():
        for weight in teacher.parameters():
            weight.zero_()
    sae = random_sae(W_dec=torch.zeros(D_SAE, D_IN).double(), b_dec=torch.full((D_IN,), b_dec).double())
    quality = sae_quality(teacher, sae, blocks, LAYER, 4).quality
    assert quality.fraction_variance_unexplained == unexplained
    assert quality.loss_recovered == 0.0


def measured(frequency: torch.Tensor) -> MeasuredSAE:
    dead = (frequency == 0).double().mean().item()
    return MeasuredSAE(SAEQuality(0.1, dead, frequency.sum().item(), 3.0, 3.1, 6.0, 0.97, 100_000), frequency)


@pytest.mark.parametrize(
    "frequency",
    [10 ** -(torch.rand(500).double() * 4), torch.tensor([0.0, 1.0, 1e-5]).double(), torch.zeros(4).double()],
    ids=["none dead", "some dead", "all dead"],
)
def test_figures_and_histogram_are_written(frequency, tmp_path):
    from matplotlib.image import imread

    write_quality(measured(frequency), tmp_path)
    figures = json.loads((tmp_path / "quality.json").read_text())
    assert figures["loss_recovered"] == 0.97
    assert figures["tokens"] == 100_000
    picture = imread(tmp_path / "latent_frequency.png")
    assert picture.shape[0] > 300
    assert picture.shape[1] > 600
    assert picture[..., :3].std() > 0.05  # not one color


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"dimension_variance_unexplained": None}, []),
        ({"dead_share": 0.51}, ["51% of the SAE's latents are dead"]),
        ({"loss_recovered": 0.89}, ["recovers 89.0% of the teacher's loss"]),
        ({"fraction_variance_unexplained": 1.2}, ["leaves 120% of the variance"]),
        ({"dimension_variance_unexplained": 0.7, "dead_share": 0.97}, ["97% of the", "leaves 70% of the variance"]),
    ],
)
def test_poor_figures_are_warned_of_in_a_line_each_that_names_the_remedy(changes, expected):
    quality = dataclasses.asdict(SAEQuality(0.1, 0.5, 30.0, 3.0, 3.1, 6.0, 0.97, 100_000, 0.2))
    found = quality_warnings(quality | changes)
    assert len(found) == len(expected)
    for line, start in zip(found, expected, strict=True):
        assert start in line
        assert "sae.training_tokens" in line
        assert "\n" not in line


def test_every_latent_is_in_a_bar_of_the_histogram(tmp_path, monkeypatch):
    """The rarest that can be seen, once in all tokens, and one that is always active included."""
    from matplotlib.axes import Axes

    drawn = []
    hist = Axes.hist
    monkeypatch.setattr(Axes, "hist", lambda *args, **kwargs: drawn.append(hist(*args, **kwargs)) or drawn[-1])
    frequency = torch.tensor([0.0, 1e-5, 2e-5, 0.1, 0.5, 1.0]).double()
    write_quality(measured(frequency), tmp_path)
    assert drawn[0][0].sum() == 5
