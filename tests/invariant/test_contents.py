"""What is mixed in can be other things than concepts: causal, cached, saved and trained all the same."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from cocomix.models.losses import hidden_state_loss

HIDDEN = {"content": "hidden_states", "teacher_hidden_size": 24}
CASES = [
    ("gpt2", {"content": "pause"}),
    ("gpt2", {"content": "pause", "mixing": "add"}),
    ("llama", {"content": "pause", "concept_slot": "residual", "slot_positions": "repeat"}),
    ("gpt2", HIDDEN),
    ("llama", {**HIDDEN, "concept_slot": "residual", "regression_loss": "cosine"}),
    ("llama", {**HIDDEN, "mixing": "add", "regression_loss": "l1"}),
    ("gpt2", {**HIDDEN, "mixing": "none"}),
]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def model(request, random_model):
    kind, settings = request.param
    return random_model(kind, **settings)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 53, (2, 9))


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.randn(2, 9, 24, dtype=torch.float64)


@torch.no_grad()
def test_a_token_changes_no_earlier_prediction(model, ids):
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 53
    before, after = model(ids).logits, model(changed).logits
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(after[:, 5], before[:, 5])


@torch.no_grad()
def test_generation_with_the_cache_equals_generation_without(model, ids):
    options = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@torch.no_grad()
def test_a_saved_model_loads_as_it_was(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert (loaded.config.content, loaded.config.mixing) == (model.config.content, model.config.mixing)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_losses_reach_every_parameter(model, ids, targets):
    asked = {"teacher_hidden_states": targets} if model.config.content == "hidden_states" else {}
    out = model(ids, labels=ids, **asked)
    out.loss.backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()] == []
    if asked:
        expected = out.token_loss + model.config.concept_loss_weight * out.hidden_loss
        assert out.loss.item() == pytest.approx(expected.item())


def test_no_weight_is_kept_that_a_token_does_not_use(model):
    assert model.num_activated_parameters() == model.num_parameters()


def test_the_slot_of_a_pause_holds_the_learned_vector(random_model, ids):
    model = random_model("gpt2", content="pause")
    h = torch.randn(2, 9, 32, dtype=torch.float64)
    slots = model.mixer(h).hidden_states
    assert torch.equal(slots[:, 0::2], h)
    assert torch.equal(slots[:, 1::2], model.mixer.vector.expand_as(h))


def test_hidden_state_losses_are_what_their_names_say(targets):
    predicted = torch.randn_like(targets)
    cos = (predicted * targets).sum(-1) / predicted.norm(dim=-1) / targets.norm(dim=-1)
    expected = {
        "l1": (predicted - targets).abs().mean(),
        "l2": ((predicted - targets) ** 2).mean(),
        "cosine": (1 - cos).mean(),
    }
    for kind, value in expected.items():
        assert hidden_state_loss(predicted, targets, kind).item() == pytest.approx(value.item())
        parts = [hidden_state_loss(predicted[i : i + 1], targets[i : i + 1], kind, 18) for i in range(2)]
        assert sum(parts).item() == pytest.approx(value.item())


@pytest.mark.parametrize(
    ("settings", "asked", "message"),
    [
        ({}, {"teacher_hidden_states": torch.zeros(2, 9, 24)}, "teacher_hidden_states was given, but .* concepts"),
        ({"content": "pause"}, {"output_concepts": True}, "output_concepts was given, but .* mixes in pause"),
        (HIDDEN, {"concept_ids": torch.zeros(2, 9, 1).long()}, "concept_ids was given, but .* hidden_states"),
    ],
)
def test_what_a_model_does_not_predict_is_refused(settings, asked, message, random_model, ids):
    with pytest.raises(ValueError, match=message):
        random_model("gpt2", **settings)(ids, **asked)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"content": "pause", "mixing": "none"}, "mixing is 'none' with content 'pause'"),
        ({"content": "hidden_states"}, "teacher_hidden_size is None"),
        ({"content": "thoughts"}, "content is 'thoughts'; expected one of concepts, hidden_states, pause"),
        ({**HIDDEN, "regression_loss": "l3"}, "regression_loss is 'l3'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message, random_model):
    with pytest.raises(ValueError, match=message):
        random_model("gpt2", **settings)
