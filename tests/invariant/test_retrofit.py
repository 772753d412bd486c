"""A pretrained decoder becomes a CoCoMix model that at first predicts the same, and goes back while it does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import cocomix

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt_neox")
MIXINGS = ("interleave", "add", "none")
CONCEPTS = {"num_concepts": 40, "num_active_concepts": 5, "concept_loss_weight": 0.5}
Model = cocomix.CoCoMixForCausalLM


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 53, (2, 12))


@pytest.mark.parametrize("insert_layer", [0, 1, 2])
@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_predictions_are_the_backbones(kind, mixing, insert_layer, random_teacher, ids):
    backbone = random_teacher(kind).float()
    model = Model.from_backbone(backbone, insert_layer, mixing=mixing, **CONCEPTS)
    assert model.config.mixing == mixing
    assert largest_difference(model(ids).logits, backbone(ids).logits) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_heads_tied_or_not(kind, tied, random_teacher, ids):
    backbone = random_teacher(kind, tie_word_embeddings=tied)
    model = Model.from_backbone(backbone, 1, **CONCEPTS)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    assert largest_difference(model(ids).logits, backbone(ids).logits) < 1e-9


@torch.no_grad()
def test_a_head_untied_by_hand_stays_so(random_teacher, ids):
    backbone = random_teacher("llama", tie_word_embeddings=True)
    backbone.lm_head.weight = torch.nn.Parameter(2 * backbone.lm_head.weight)
    model = Model.from_backbone(backbone, 1, **CONCEPTS)
    assert not model.config.tie_word_embeddings
    assert largest_difference(model.to_backbone()(ids).logits, backbone(ids).logits) < 1e-9


def test_a_head_with_hooks_is_refused(random_teacher):
    backbone = random_teacher("llama")
    model = Model.from_backbone(backbone, 1, **CONCEPTS)
    for each, convert in ((backbone, lambda: Model.from_backbone(backbone, 1, **CONCEPTS)), (model, model.to_backbone)):
        each.lm_head.register_forward_hook(lambda _module, _inputs, logits: 2 * logits)
        with pytest.raises(ValueError, match="is a Linear or has hooks; expected a plain linear layer"):
            convert()


@torch.no_grad()
def test_padded_generation_says_what_the_backbone_says(random_teacher, ids):
    backbone = random_teacher("llama")
    model = Model.from_backbone(backbone, 1, **CONCEPTS)
    ids[0, :4] = 0
    options = {"attention_mask": (ids != 0).long(), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), backbone.generate(ids, **options))


@pytest.mark.parametrize("mixing", ["add", "none"])
@torch.no_grad()
def test_windows_stay_what_they_are(mixing, random_teacher, ids):
    backbone = random_teacher("mistral", sliding_window=4)
    model = Model.from_backbone(backbone, 1, mixing=mixing, **CONCEPTS)
    assert largest_difference(model(ids).logits, backbone(ids).logits) < 1e-9


def test_windows_and_pairs_are_refused_together(random_teacher):
    with pytest.raises(ValueError, match=r"slot_attention is 'pair', whose mask supports no sliding window.*'mistral'"):
        Model.from_backbone(random_teacher("mistral", sliding_window=4), 1, **CONCEPTS)


def test_the_backbone_is_left_as_it_was(random_teacher, ids):
    backbone = random_teacher("gpt2")
    before = {name: weight.clone() for name, weight in backbone.state_dict().items()}
    config = backbone.config.to_dict()
    model = Model.from_backbone(backbone, 1, **CONCEPTS)
    for weight in model.parameters():
        weight.data.zero_()
    assert all(torch.equal(before[name], weight) for name, weight in backbone.state_dict().items())
    assert backbone.config.to_dict() == config


@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_training_moves_every_weight(mixing, random_teacher, ids):
    model = Model.from_backbone(random_teacher("gpt2"), 1, mixing=mixing, **CONCEPTS).train()
    concept_ids = torch.rand(2, 12, 40).topk(3).indices
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    first = model(ids, labels=ids, concept_ids=concept_ids).loss
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, concept_ids=concept_ids).loss
        loss.backward()
        optimizer.step()
    assert loss < first
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@torch.no_grad()
def test_saved_and_loaded_it_predicts_the_same(random_teacher, ids, tmp_path):
    backbone = random_teacher("llama")
    Model.from_backbone(backbone, 1, **CONCEPTS).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert largest_difference(loaded(ids).logits, backbone(ids).logits) < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_half_precision(dtype, random_teacher):
    model = Model.from_backbone(random_teacher("llama").to(dtype), 1, **CONCEPTS)
    assert {weight.dtype for weight in model.parameters()} == {dtype}


def test_an_attention_kernel_without_masks_is_refused(random_teacher, ids):
    model = Model.from_backbone(random_teacher("llama"), 1, **CONCEPTS)
    model.upper.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="'pair', whose mask the attention implementation 'flex_attention' does not"):
        model(ids)


# Back


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_there_and_back_is_the_same_model(kind, mixing, random_teacher, ids):
    backbone = random_teacher(kind)
    plain = Model.from_backbone(backbone, 1, mixing=mixing, **CONCEPTS).to_backbone()
    assert type(plain) is type(backbone)
    before, after = backbone.state_dict(), plain.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_is_read_above_cannot_be_left_out(random_model, random_teacher):
    with pytest.raises(ValueError, match=r"upper blocks of this model read the concepts .*\(mixing interleave\)"):
        random_model("gpt2").to_backbone()
    model = Model.from_backbone(random_teacher("gpt2"), 1, **CONCEPTS)
    model.mixer.compress_weight.data[3, 5] = 1e-3
    with pytest.raises(ValueError, match="no backbone makes the same predictions"):
        model.to_backbone()
    with pytest.raises(ValueError, match="mixes in pause"):
        random_model("gpt2", content="pause").to_backbone()


@torch.no_grad()
def test_a_model_that_only_predicts_concepts_goes_back_when_trained(random_model, ids):
    model = random_model("llama", mixing="none", insert_layer=0)
    assert largest_difference(model.to_backbone()(ids).logits, model(ids).logits) < 1e-9
