"""Teacher, SAE and attribution compute what the published code computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix.concepts.attribution import ConceptExtractor, ConceptLabels, attribution_scores
from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.sae_loading import load_sae
from cocomix.concepts.teacher import TappedResidual, freeze, tapped_residual
from reference_files import GoldenSet


def dense(latents: Latents, values: Tensor, d_sae: int) -> Tensor:
    return values.new_zeros(*values.shape[:-1], d_sae).scatter(-1, latents.indices, values)


class Case:
    """The golden case in one precision and with one source of the SAE, and our results for it."""

    def __init__(self, golden: GoldenSet, dtype: torch.dtype, sae_from: str) -> None:
        tensors = golden.tensors("attribution_a")
        settings = golden.record("attribution_a")["config"]
        self.expected = golden.expected("attribution_a", dtype)
        self.dtype = dtype
        self.relative = 2e-5 if dtype == torch.float32 else 1e-7 if golden.rounded else 1e-10
        self.input_ids = tensors["io/input_ids"]
        self.layer = settings["layer_index"]

        keys = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        self.teacher = GPT2LMHeadModel(GPT2Config(**{key: settings[key] for key in keys})).to(dtype)
        weights = {key.removeprefix("hf/"): value for key, value in tensors.items() if key.startswith("hf/")}
        self.teacher.load_state_dict(weights)
        freeze(self.teacher)
        self.sae = load_sae(golden.folder / "attribution_a_sae_openai.pt")
        if sae_from == "weights":
            self.sae = SparseAutoencoder(
                W_enc=tensors["sae/encoder.weight"].T.to(dtype),
                b_enc=tensors["sae/latent_bias"].to(dtype),
                W_dec=tensors["sae/decoder.weight"].T.to(dtype),
                b_dec=tensors["sae/pre_bias"].to(dtype),
                k=settings["sae_k"],
                normalization="layer_norm",
            )

    def tapped(self) -> TappedResidual:
        return tapped_residual(self.teacher, self.input_ids, self.layer)

    def labels(self) -> ConceptLabels:
        return ConceptExtractor(self.teacher, self.sae, self.layer, labels_per_token=4, selection="attribution")(
            self.input_ids
        )


@pytest.fixture(params=["float32-pt", "float32-weights", "float64-weights"])
def case(request, golden) -> Case:
    dtype, sae_from = request.param.split("-")
    return Case(golden, getattr(torch, dtype), sae_from)


def test_the_residual_stream_equals_the_published_one(case, relative_error):
    residual = case.tapped().residual
    assert residual.dtype == case.dtype
    # TransformerLens centers what is written to the stream: it differs by the mean of each row.
    centered = residual - residual.mean(-1, keepdim=True)
    assert relative_error(centered, case.expected["out/resid"]) < case.relative
    if "out/resid_hf" in case.expected:
        assert relative_error(residual, case.expected["out/resid_hf"]) < case.relative


def test_the_gradient_of_the_mean_loss_equals_the_published_one(case, relative_error):
    tapped = case.tapped()
    gradient = tapped.gradient / tapped.has_target.sum()
    assert relative_error(gradient, case.expected["out/grad"]) < case.relative


def test_the_latents_equal_the_published_ones(case, relative_error):
    latents = case.sae.encode(case.tapped().residual)
    found, expected = dense(latents, latents.values, case.sae.d_sae), case.expected["out/latents"]
    assert torch.equal(found > 0, expected > 0)
    assert relative_error(found, expected) < case.relative
    assert ((expected > 0).sum(-1) < case.sae.k).any()  # the ReLU within TopK has something to do


def test_the_attribution_scores_equal_the_published_ones(case, relative_error):
    tapped = case.tapped()
    latents = case.sae.encode(tapped.residual)
    scores = attribution_scores(latents, tapped.gradient / tapped.has_target.sum(), case.sae.W_dec)
    found = dense(latents, scores, case.sae.d_sae)
    assert relative_error(found, case.expected["out/attribution"]) < case.relative


def test_the_labels_equal_the_published_ones_wherever_those_are_defined(case):
    labels = case.labels()
    defined = case.expected["out/top4_val"] > 0
    assert defined.sum() > 50
    assert torch.equal(labels.ids[defined], case.expected["out/top4_idx"][defined])
    scale = case.expected["out/top4_val"].max().item()
    torch.testing.assert_close(
        labels.scores[defined],
        case.expected["out/top4_val"][defined],
        rtol=0,
        atol=case.relative * scale,
    )


def test_the_last_position_has_no_labels(case):
    labels = case.labels()
    assert (labels.ids[:, -1] == -100).all()
    assert (labels.scores[:, -1] == 0).all()
    assert (labels.ids[:, :-1] >= 0).any(-1).float().mean() > 0.9
