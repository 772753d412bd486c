"""FLOPs counted from shapes against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import PretrainedConfig

import cocomix
from cocomix.concepts.teacher import residual_stream
from cocomix.models.building import BackboneConfig, activated_parameters, backbone_config, build_plain
from cocomix.models.experts import experts_per_token
from cocomix.models.flops import forward_flops_per_token, labeling_flops_per_token, training_flops_per_token
from cocomix.models.plain import with_token_loss
from cocomix.objectives import ConceptMixing, Distillation

BLOCK = 64


def plain(model_type: str):
    sizes = BackboneConfig(model_type=model_type, hidden_size=64, num_hidden_layers=4, num_attention_heads=4)
    return backbone_config(sizes, vocab_size=256, block_size=BLOCK, eos_token_id=0)


FORMULAS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}
"""Torch's, which has none of the product that is added in place."""


class FlopSum(TorchDispatchMode):
    """Torch's FLOP formulas, summed. Its own counter tracks modules, which fails on gradients of a leaf."""

    total = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        if formula := FORMULAS.get(function._overloadpacket):
            self.total += formula(*arguments, **(keywords or {}), out_val=result)
        return result


def grouped_queries():
    """A Llama whose keys and values are fewer than its queries, each of a width of its own."""
    sizes = BackboneConfig("llama", 64, 4, 4, options={"num_key_value_heads": 2, "head_dim": 8})
    return backbone_config(sizes, vocab_size=256, block_size=BLOCK, eos_token_id=0)


def counted(model, ids: torch.Tensor, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        logits = model(input_ids=ids, use_cache=False).logits
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
@pytest.mark.parametrize("mixing", [None, "interleave", "add", "none"])
def test_forward_and_training_agree_with_the_counter(model_type: str, mixing: str | None) -> None:
    config = plain(model_type)
    model = build_plain(config)
    if mixing is not None:
        model = cocomix.CoCoMixForCausalLM(
            cocomix.CoCoMixConfig(config, insert_layer=1, num_concepts=512, num_active_concepts=8, mixing=mixing)
        )
    model.set_attn_implementation("eager")  # its matrix products are visible to the counter on any device
    ids = torch.zeros(2, BLOCK, dtype=torch.long)
    assert forward_flops_per_token(model, BLOCK) == pytest.approx(counted(model, ids, False), rel=0.03)
    if mixing != "none":  # the counter sees no backward of an unused concept head
        assert training_flops_per_token(model, BLOCK) == pytest.approx(counted(model, ids, True), rel=0.03)


@pytest.mark.parametrize(
    "settings",
    [
        {"content": "pause"},
        {"content": "hidden_states", "teacher_hidden_size": 48},
        {"content": "hidden_states", "teacher_hidden_size": 48, "mixing": "add"},
    ],
    ids=str,
)
def test_other_contents_agree_with_the_counter(settings) -> None:
    model = cocomix.CoCoMixForCausalLM(cocomix.CoCoMixConfig(plain("llama"), insert_layer=1, **settings))
    model.set_attn_implementation("eager")
    ids = torch.zeros(2, BLOCK, dtype=torch.long)
    assert forward_flops_per_token(model, BLOCK) == pytest.approx(counted(model, ids, False), rel=0.03)
    assert training_flops_per_token(model, BLOCK) == pytest.approx(counted(model, ids, True), rel=0.03)


def test_grouped_queries_agree_with_the_counter() -> None:
    model = build_plain(grouped_queries())
    model.set_attn_implementation("eager")
    ids = torch.zeros(2, BLOCK, dtype=torch.long)
    assert forward_flops_per_token(model, BLOCK) == pytest.approx(counted(model, ids, False), rel=0.03)
    assert training_flops_per_token(model, BLOCK) == pytest.approx(counted(model, ids, True), rel=0.03)


EXPERTS = {
    "mixtral": {"num_local_experts": 8},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 96},
    "gpt_oss": {"num_local_experts": 8, "head_dim": 16},
}


@pytest.mark.parametrize("model_type", EXPERTS)
@pytest.mark.parametrize("split", [False, True])
def test_experts_count_as_far_as_a_token_uses_them(model_type: str, split: bool) -> None:
    options = {**EXPERTS[model_type], "num_experts_per_tok": 2}
    sizes = BackboneConfig(model_type, 64, 2, 4, options)
    config = backbone_config(sizes, vocab_size=256, block_size=BLOCK, eos_token_id=0)
    model = build_plain(config)
    if split:
        model = cocomix.CoCoMixForCausalLM(
            cocomix.CoCoMixConfig(config, insert_layer=1, num_concepts=512, num_active_concepts=8, mixing="add")
        )
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    ids = torch.randint(256, (2, BLOCK))
    assert forward_flops_per_token(model, BLOCK) == pytest.approx(counted(model, ids, False), rel=0.03)
    experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
    compress = (512 - 8) * 64 if split else 0
    assert activated_parameters(model) == model.num_parameters() - experts * 6 // 8 - compress


def test_a_configuration_without_the_number_of_experts_per_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has experts, but none of num_experts_per_tok, .* gives the number"):
        experts_per_token(PretrainedConfig())


def test_distillation_agrees_with_the_counter() -> None:
    """A step of kd, its objective's own call: the student's three passes and the teacher's one."""
    student = with_token_loss(build_plain(plain("llama")))
    teacher = build_plain(plain("gpt2")).requires_grad_(False)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    objective = Distillation(teacher=lambda ids: teacher(input_ids=ids, use_cache=False).logits)
    batch = {"input_ids": torch.zeros(2, BLOCK, dtype=torch.long)}
    with FlopSum() as counter:
        objective(student, batch, objective.count(batch)).total.backward()
    expected = training_flops_per_token(student, BLOCK) + forward_flops_per_token(teacher, BLOCK)
    assert expected == pytest.approx(counter.total / batch["input_ids"].numel(), rel=0.03)


@pytest.mark.parametrize("mixing", ["interleave", "add", "none"])
def test_a_step_of_cocomix_agrees_with_the_counter(mixing: str) -> None:
    """The objective's own call, with its losses that build no logits."""
    config = cocomix.CoCoMixConfig(
        plain("llama"), insert_layer=1, num_concepts=512, num_active_concepts=8, mixing=mixing
    )
    model, objective = cocomix.CoCoMixForCausalLM(config), ConceptMixing()
    model.set_attn_implementation("eager")
    ids = torch.zeros(2, BLOCK, dtype=torch.long)
    batch = {"input_ids": ids, "concept_ids": torch.zeros(2, BLOCK, 4, dtype=torch.long)}
    with FlopSum() as counter:
        objective(model, batch, objective.count(batch)).total.backward()
    assert training_flops_per_token(model, BLOCK) == pytest.approx(counter.total / ids.numel(), rel=0.03)


@pytest.mark.parametrize("heads", [1, 3])
def test_several_heads_agree_with_the_counter(heads: int) -> None:
    model = cocomix.MultiTokenForCausalLM(cocomix.MultiTokenConfig(plain("gpt2"), num_future_tokens=heads))
    model.set_attn_implementation("eager")
    ids = torch.zeros(2, BLOCK, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, output_all_heads=True)
    assert forward_flops_per_token(model, BLOCK) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.03)


def test_the_blocks_up_to_the_tap_agree_with_the_counter() -> None:
    teacher = build_plain(plain("gpt2"))
    teacher.set_attn_implementation("eager")
    ids = torch.zeros(2, BLOCK, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        residual_stream(teacher, ids, 1)
    found = forward_flops_per_token(teacher, BLOCK, up_to_layer=1)
    assert found == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.03)


@pytest.mark.parametrize("selection", ["attribution", "activation"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_labeling_agrees_with_the_counter(model_type: str, selection: str) -> None:
    teacher = build_plain(plain(model_type))
    teacher.set_attn_implementation("eager")
    sae = cocomix.SparseAutoencoder(
        W_enc=torch.randn(64, 512), b_enc=torch.zeros(512), W_dec=torch.randn(512, 64), b_dec=torch.zeros(64), k=8
    )
    extractor = cocomix.ConceptExtractor(teacher, sae, teacher_layer=1, selection=selection)
    ids = torch.randint(0, 256, (2, BLOCK))
    with FlopSum() as counter:
        extractor(ids)
    expected = counter.total / ids.numel()
    found = labeling_flops_per_token(teacher, 1, 512, 8, BLOCK, selection).total
    assert found == pytest.approx(expected, rel=0.03)
