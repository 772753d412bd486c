"""Supervision weighted by where the teacher knows better, against a plain computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from cocomix import CoCoMixConfig, CoCoMixForCausalLM
from cocomix.models.losses import concept_losses
from cocomix.models.plain import with_token_loss
from cocomix.objectives import ConceptMixing, Distillation, TeacherGate, WeightSchedule
from cocomix.objectives.distillation import predictor

V, ROWS, T, C = 31, 3, 8, 9
SIZES = GPT2Config(vocab_size=V, n_positions=T, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None)
GATE = TeacherGate(0.5)


@pytest.fixture
def teacher() -> PreTrainedModel:
    sizes = GPT2Config(**{**SIZES.to_dict(), "initializer_range": 0.5})
    return GPT2LMHeadModel(sizes).eval().requires_grad_(False)


@pytest.fixture
def batch(teacher: PreTrainedModel) -> dict[str, Tensor]:
    ids = torch.randint(0, V, (ROWS, T))
    labels = torch.randint(0, C, (ROWS, T, 2))
    labels[0, 1] = labels[1, :, 1] = -100
    return {"input_ids": ids, "concept_ids": labels, "teacher_losses": next_token_losses(teacher, ids).half()}


def next_token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(ROWS, T), 0 at the last token of a block."""
    found = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    return F.pad(found.detach(), (0, 1))


def weights_of(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    return torch.sigmoid((next_token_losses(model, batch["input_ids"]) - batch["teacher_losses"]) / 0.5)


def student(**options: Any) -> CoCoMixForCausalLM:
    config = CoCoMixConfig(SIZES, insert_layer=1, num_concepts=C, num_active_concepts=3, **options)
    return CoCoMixForCausalLM(config).eval()


def gradients(total: Tensor, model: PreTrainedModel) -> list[Tensor]:
    return list(torch.autograd.grad(total, list(model.parameters()), allow_unused=True, materialize_grads=True))


def divergences(model: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> Tensor:
    """(ROWS, T − 1) at temperature 2."""
    log_p, log_q = (F.log_softmax(each(ids).logits[:, :-1] / 2, dim=-1) for each in (teacher, model))
    return 4 * (log_p.exp() * (log_p - log_q)).sum(-1)


def test_the_divergence_of_each_token_counts_as_the_teacher_is_better(teacher, batch):
    model, ids = with_token_loss(GPT2LMHeadModel(SIZES).eval()), batch["input_ids"]
    objective = Distillation(3.0, 2.0, predictor(teacher, V), gate=GATE)
    assert objective.columns == ("input_ids", "teacher_losses")
    found = objective(model, batch, objective.count(batch))
    weights = weights_of(model, batch)[:, :-1]
    kd = (weights * divergences(model, teacher, ids)).sum() / (ROWS * (T - 1))  # tokens, not the sum of the weights
    token = F.cross_entropy(model(ids).logits[:, :-1].transpose(1, 2), ids[:, 1:])
    assert found.parts["kd_loss"].item() == pytest.approx(kd.item(), rel=1e-5)
    assert found.parts["mean_gate"].item() == pytest.approx(weights.mean().item(), rel=1e-5)
    assert found.total.item() == pytest.approx((token + 3 * kd).item(), rel=1e-5)
    for one, other in zip(gradients(found.total, model), gradients(token + 3 * kd, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mixing", ["interleave", "none"])
@pytest.mark.parametrize("distills", [False, True])
def test_so_does_the_concept_loss(mixing, distills, teacher, batch):
    model, ids = student(mixing=mixing, concept_loss_weight=0.7), batch["input_ids"]
    kd = Distillation(3.0, 2.0, predictor(teacher, V)) if distills else None
    objective = ConceptMixing(distillation=kd, gate=GATE)
    counts = objective.count(batch)
    found = objective(model, batch, counts)
    output = model(ids, output_concepts=True)
    weights, labeled = weights_of(model, batch), (batch["concept_ids"] >= 0).any(-1)
    assert torch.equal(weights[:, -1], torch.full((ROWS,), 0.5))
    concept = (weights * concept_losses(output.concept_logits, batch["concept_ids"])).sum() / labeled.sum()
    wanted = F.cross_entropy(output.logits[:, :-1].transpose(1, 2), ids[:, 1:]) + 0.7 * concept
    if distills:
        wanted = wanted + 3 * (weights[:, :-1] * divergences(model, teacher, ids)).mean()
    assert found.parts["concept_loss"].item() == pytest.approx(concept.item(), rel=1e-5)
    assert found.parts["mean_gate"].item() == pytest.approx(weights[:, :-1].mean().item(), rel=1e-5)
    assert found.total.item() == pytest.approx(wanted.item(), rel=1e-5)
    for one, other in zip(gradients(found.total, model), gradients(wanted, model), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stored_predictions", [False, True])
def test_losses_computed_in_the_step_are_the_stored_ones(stored_predictions, teacher, batch):
    predict, model = predictor(teacher, V), student()
    kd = None if stored_predictions else Distillation(teacher=predict)
    stored, online = (ConceptMixing(distillation=kd, gate=TeacherGate(0.5, each)) for each in (None, predict))
    assert online.columns == ("input_ids", "concept_ids") and stored.columns == (*online.columns, "teacher_losses")
    one, other = (each(model, batch, each.count(batch)) for each in (stored, online))
    torch.testing.assert_close(one.total, other.total)
    torch.testing.assert_close(one.parts["mean_gate"], other.parts["mean_gate"])


def test_a_gate_without_anything_to_weigh_is_left_out(batch):
    off = WeightSchedule("constant", 0.5, 1.0)
    kd = Distillation(schedule=off)
    objective = ConceptMixing(distillation=kd, weight=1.0, schedule=off, gate=GATE).at(0.0)
    del batch["teacher_losses"]
    assert "mean_gate" not in objective(student(), batch, objective.count(batch)).parts


def test_a_gate_needs_the_losses_of_the_student(batch):
    model = student()
    with pytest.raises(ValueError, match="gate was given without labels, whose loss it needs; give both"):
        model(batch["input_ids"], gate=GATE(batch))
