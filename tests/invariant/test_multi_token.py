"""What holds for a model with several heads, whatever its backbone."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM
from cocomix.objectives import MultiToken

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt_neox")


@pytest.fixture(params=[(kind, 2) for kind in KINDS] + [("gpt2", 1), ("llama", 3)], ids=str)
def model(request, backbone_config, redraw) -> MultiTokenForCausalLM:
    kind, heads = request.param
    config = MultiTokenConfig(backbone_config(kind, num_hidden_layers=4), num_future_tokens=heads)
    made = MultiTokenForCausalLM(config).double().eval()
    redraw(made)
    return made


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 53, (2, 9))


@torch.no_grad()
def test_a_token_changes_no_earlier_prediction_of_any_head(model, ids):
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 53
    pairs = zip(*(model(x, output_all_heads=True).head_logits for x in (ids, changed)), strict=True)
    for before, after in pairs:
        torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after[:, 5], before[:, 5])


@torch.no_grad()
def test_reading_with_a_cache_equals_one_pass(model, ids):
    whole = model(ids).logits
    first = model(ids[:, :5])
    rest = model(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), whole, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_packed_texts_are_read_as_if_each_were_alone(model, ids):
    position_ids = torch.cat([torch.arange(5), torch.arange(4)])[None]
    packed, first, second = (
        model(text, position_ids=positions, output_all_heads=True).head_logits
        for text, positions in ((ids, position_ids), (ids[:, :5], None), (ids[:, 5:], None))
    )
    for row, one, other in zip(packed, first, second, strict=True):
        torch.testing.assert_close(row, torch.cat([one, other], 1), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_padded_generation_equals_generation_one_by_one(model, ids):
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids[:1, :5]], 1)
    batch = torch.cat([ids[1:], padded])
    mask = (batch != 0).long()
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    alone = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    assert together[1, 9:].tolist() == alone[0, 5:].tolist()


def test_the_heads_together_have_the_weights_of_the_backbone(model):
    plain = AutoModelForCausalLM.from_config(model.config.backbone_config)
    assert model.num_parameters() == plain.num_parameters()


def test_all_losses_reach_every_parameter(model, ids):
    objective = MultiToken()
    batch = {"input_ids": ids}
    objective(model.train(), batch, objective.count(batch)).total.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(loaded) is MultiTokenForCausalLM
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    expected = model(ids, output_all_heads=True).head_logits
    for found, wanted in zip(loaded(ids, output_all_heads=True).head_logits, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # where weights lie decides the last bit


@pytest.mark.parametrize("heads", [0, 4])
def test_heads_that_leave_no_trunk_are_refused(heads, backbone_config):
    with pytest.raises(ValueError, match=f"num_future_tokens is {heads}; .*of 4 blocks takes 1 to 3"):
        MultiTokenConfig(backbone_config("gpt2", num_hidden_layers=4), num_future_tokens=heads)
