"""What saves time and memory gives what the plain way gives, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cocomix import CoCoMixForCausalLM
from cocomix.concepts.teacher import freeze, tapped_residual
from cocomix.models.backbones import fuse_activations
from cocomix.models.losses import IGNORE, Gate
from cocomix.models.plain import plain_head, with_token_loss

CASES = [("gpt2", {}), ("llama", {}), ("qwen3", {}), ("gpt2", {"mixing": "add"}), ("gpt2", {"mixing": "none"})]
GATED = {"gated": True}
KINDS = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt_neox"]


def batch(model: CoCoMixForCausalLM, gated: bool = False) -> dict[str, Any]:
    ids = torch.randint(model.config.vocab_size, (2, 9))
    concept_ids = torch.stack([torch.randperm(model.config.num_concepts)[:3] for _ in range(18)]).view(2, 9, 3)
    concept_ids[0, 1] = IGNORE
    concept_ids[1, 2, 1:] = IGNORE
    gate = {"gate": Gate(4 * torch.rand(2, 9), 0.7)} if gated else {}
    return {"input_ids": ids, "labels": ids, "concept_ids": concept_ids, **gate}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("kind", "settings"), CASES)
def test_losses_without_logits_are_the_losses_of_the_logits(kind, settings, gated, random_model, relative_error):
    model = random_model(kind, **settings).double().train()
    inputs = batch(model, gated)
    plain = model(**inputs, output_concepts=True)
    fused = model(**inputs, output_logits=False)
    assert fused.logits is None and fused.concept_logits is None
    for name in ("loss", "token_loss", "concept_loss"):
        assert relative_error(fused[name], plain[name]) < 1e-12, name
    weights = dict(model.named_parameters())
    of_plain, of_fused = (
        torch.autograd.grad(out.loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        for out in (plain, fused)
    )
    for name, wanted, found in zip(weights, of_plain, of_fused, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("kind", "settings"), [*(case for case in CASES if case[0] != "qwen3"), ("gpt2", None), ("gpt2", GATED)]
)
def test_a_training_step_compiles_without_a_graph_break(kind, settings, random_model, random_teacher):
    """Of CoCoMix, and with settings None of the plain decoder with its fused loss."""
    if settings is None:
        model = with_token_loss(random_teacher(kind)).train()
        ids = torch.randint(model.config.vocab_size, (2, 9))
        inputs = {"input_ids": ids, "labels": ids, "num_items_in_batch": torch.tensor(16)}
    else:
        gated = settings == GATED
        model = random_model(kind, backbone={"num_hidden_layers": 2}, **({} if gated else settings)).train()
        inputs = batch(model, gated)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # a graph break is an error
    weights = list(model.parameters())
    of_compiled, of_plain = (
        torch.autograd.grad(
            run(**inputs, output_logits=False, use_cache=False).loss, weights, allow_unused=True, materialize_grads=True
        )
        for run in (compiled, model)
    )
    for found, wanted in zip(of_compiled, of_plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teachers_gradient_needs_no_logits(kind, random_teacher, relative_error):
    teacher = freeze(random_teacher(kind).double())
    head = plain_head(teacher)
    assert head is not None
    ids = torch.randint(teacher.config.vocab_size, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    wanted = tapped_residual(teacher, ids, 0, mask)
    found = tapped_residual(teacher, ids, 0, mask, head)
    assert torch.equal(found.residual, wanted.residual) and torch.equal(found.has_target, wanted.has_target)
    assert relative_error(found.gradient, wanted.gradient) < 1e-12


def test_a_teacher_whose_logits_are_scaled_has_no_plain_head(random_teacher):
    teacher = freeze(random_teacher("gpt2"))
    teacher.register_forward_hook(lambda _m, _i, out: out.__class__({**out, "logits": 2 * out.logits}))
    assert plain_head(teacher) is None


def test_the_fused_activation_is_gpt2s(random_teacher, relative_error):
    model = random_teacher("gpt2").double()
    ids = torch.randint(model.config.vocab_size, (2, 9))
    spelled_out = [module for module in model.modules() if type(module).__name__ == "NewGELUActivation"]
    assert spelled_out
    wanted = model(ids).logits
    fuse_activations(model)
    assert not [module for module in model.modules() if type(module).__name__ == "NewGELUActivation"]
    assert relative_error(model(ids).logits, wanted) < 1e-12


@pytest.mark.slow  # it compiles
@pytest.mark.parametrize("slot_positions", ["interleaved", "repeat"])
def test_flex_attention_gives_what_sdpa_gives(slot_positions, random_model, monkeypatch, relative_error):
    model = random_model("llama", slot_positions=slot_positions).float().eval()
    flex, calls = ALL_ATTENTION_FUNCTIONS["flex_attention"], []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", lambda *a, **k: calls.append(None) or flex(*a, **k))
    ids = torch.randint(model.config.vocab_size, (2, 16))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        wanted = [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]
        model.set_attn_implementation("flex_attention")
        found = [model(ids).logits, model(ids, attention_mask=mask).logits[mask.bool()]]
    assert len(calls) == 2 * model.config.num_hidden_layers
    for one, other in zip(found, wanted, strict=True):
        assert relative_error(one, other) < 1e-5
