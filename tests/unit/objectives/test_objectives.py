"""What each method minimises, on models of known form."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import CoCoMixConfig, CoCoMixForCausalLM
from cocomix.models.building import BackboneConfig, backbone_config, build_plain
from cocomix.models.divergence import top_tokens
from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM
from cocomix.models.plain import plain_head, with_token_loss
from cocomix.objectives import ConceptMixing, Distillation, MultiToken, NextToken
from cocomix.objectives.distillation import predictor

V, ROWS, T = 31, 3, 8
BACKBONE = {
    "vocab_size": V,
    "n_positions": T,
    "n_embd": 16,
    "n_layer": 4,
    "n_head": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "bos_token_id": None,
    "eos_token_id": None,
}


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return with_token_loss(GPT2LMHeadModel(GPT2Config(**BACKBONE)))


@pytest.fixture
def teacher() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**BACKBONE, initializer_range=0.5)).eval()


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, V, (ROWS, T))}


def test_distillation_is_the_token_loss_and_the_weighted_mean_divergence(model, teacher, batch):
    ids = batch["input_ids"]
    objective = Distillation(weight=0.3, temperature=2.0, teacher=predictor(teacher, V))
    counts = objective.count(batch)
    losses = objective(model, batch, counts)
    plain = NextToken()(model, batch, counts)
    p = F.softmax(teacher(ids).logits[:, :-1] / 2, dim=-1)
    log_q = F.log_softmax(model(ids).logits[:, :-1] / 2, dim=-1)
    mean = (p * (p.log() - log_q)).sum(-1).mean() * 4
    assert losses.parts["token_loss"].item() == pytest.approx(plain.total.item())
    assert losses.parts["kd_loss"].item() == pytest.approx(mean.item(), rel=1e-5)
    assert losses.total.item() == pytest.approx((plain.total + 0.3 * mean).item(), rel=1e-5)


def test_concepts_with_distillation_are_the_sum_of_both(teacher, batch):
    model = CoCoMixForCausalLM(
        CoCoMixConfig(GPT2Config(**BACKBONE), insert_layer=2, num_concepts=9, num_active_concepts=3)
    )
    batch = {**batch, "concept_ids": torch.randint(0, 9, (ROWS, T, 2))}
    distillation = Distillation(weight=0.3, temperature=2.0, teacher=lambda x: teacher(x).logits)
    plain, both = ConceptMixing(), ConceptMixing(distillation=distillation)
    assert both.columns == plain.columns == ("input_ids", "concept_ids")
    assert ConceptMixing(distillation=Distillation()).columns[:3] == ("input_ids", "concept_ids", "teacher_ids")
    counts = both.count(batch)
    alone, found = plain(model, batch, counts), both(model, batch, counts)
    divergence = distillation(model, batch, counts).parts["kd_loss"]
    assert found.parts["kd_loss"].item() == pytest.approx(divergence.item(), rel=1e-6)
    assert found.total.item() == pytest.approx((alone.total + 0.3 * divergence).item(), rel=1e-6)


def test_distillation_leaves_the_teacher_without_gradients(model, teacher, batch):
    objective = Distillation(teacher=lambda x: teacher.requires_grad_(False)(x).logits)
    objective(model, batch, objective.count(batch)).total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["gpt2", "pause", "cohere", "gemma2"])
def test_next_token_prediction_is_the_loss_of_the_logits(batch, model_type):
    """With a plain head, which needs no logits, and with one that scales or caps them."""
    if model_type == "pause":
        model = CoCoMixForCausalLM(CoCoMixConfig(GPT2Config(**BACKBONE), insert_layer=2, content="pause"))
    elif model_type == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**BACKBONE))
    else:
        sizes = BackboneConfig(model_type, 16, 2, 2)
        model = build_plain(backbone_config(sizes, vocab_size=V, block_size=T, eos_token_id=0))
    objective = NextToken()
    ids, counts = batch["input_ids"], objective.count(batch)
    wanted = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    expected = torch.autograd.grad(wanted, list(model.parameters()), allow_unused=True)
    found = objective(with_token_loss(model), batch, counts)
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert found.parts == {"token_loss": found.total.detach()}
    found.total.backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "cohere", "gemma2"])
def test_without_weights_the_configuration_tells_whether_a_head_is_plain(model_type):
    config = backbone_config(BackboneConfig(model_type, 16, 2, 2), vocab_size=V, block_size=T, eos_token_id=0)
    with torch.device("meta"):
        shapes = build_plain(config)
    assert (plain_head(shapes) is None) == (plain_head(build_plain(config)) is None)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_stored_predictions_of_nearly_all_tokens_are_as_good_as_the_teacher(model, teacher, batch, temperature):
    online = Distillation(0.1, temperature, lambda x: teacher(x).logits)
    stored = Distillation(0.1, temperature)
    assert online.columns == ("input_ids",)
    assert stored.columns == ("input_ids", "teacher_ids", "teacher_log_probs", "teacher_log_rest")
    with torch.no_grad():
        top = top_tokens(teacher(batch["input_ids"]).logits, V - 1, temperature)
    columns = {f"teacher_{name}": value for name, value in top._asdict().items()}
    counts = online.count(batch)
    expected, found = online(model, batch, counts), stored(model, {**batch, **columns}, counts)
    assert found.total.item() == pytest.approx(expected.total.item(), rel=1e-6)
    assert found.parts["kd_loss"].item() == pytest.approx(expected.parts["kd_loss"].item(), rel=1e-5)


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_multi_token_losses_are_those_of_each_heads_own_tokens(batch, heads):
    model = MultiTokenForCausalLM(MultiTokenConfig(GPT2Config(**BACKBONE), num_future_tokens=heads))
    ids, objective = batch["input_ids"], MultiToken()
    losses = objective(model, batch, objective.count(batch))
    logits = model(ids, output_all_heads=True).head_logits
    expected = [
        F.cross_entropy(logits[i][:, : T - i - 1].flatten(0, 1), ids[:, i + 1 :].flatten()).item() for i in range(heads)
    ]
    names = ["token_loss", "token_2_loss", "token_3_loss"][:heads]
    assert losses.parts.keys() == set(names)
    assert [losses.parts[name].item() for name in names] == pytest.approx(expected, rel=1e-5)
    assert losses.total.item() == pytest.approx(sum(expected), rel=1e-5)


@pytest.mark.parametrize("method", ["kd", "mtp"])
def test_losses_of_micro_batches_add_up_to_those_of_the_batch(method, teacher, batch):
    if method == "kd":
        model = with_token_loss(GPT2LMHeadModel(GPT2Config(**BACKBONE)))
        objective = Distillation(teacher=lambda x: teacher(x).logits)
    else:
        model = MultiTokenForCausalLM(MultiTokenConfig(GPT2Config(**BACKBONE), num_future_tokens=3))
        objective = MultiToken()
    counts = objective.count(batch)
    whole = objective(model, batch, counts)
    parts = [{"input_ids": batch["input_ids"][:1]}, {"input_ids": batch["input_ids"][1:]}]
    counted = [objective.count(part) for part in parts]
    assert {name: sum(c[name] for c in counted) for name in counts} == counts
    assert sum(objective(model, part, counts).total for part in parts).item() == pytest.approx(whole.total.item())
