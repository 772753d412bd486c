"""Muon for the matrices of the blocks, in every method, and AdamW for the rest."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch.optim import AdamW, Muon
from transformers import PreTrainedModel

from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM
from cocomix.training.optimizers import MuonWithAdamW, muon_weights

MODELS: dict[str, dict[str, object]] = {
    "pause": {"content": "pause"},
    "cocomix": {},
    "added": {"mixing": "add"},
    "loss only": {"mixing": "none"},
    "hidden states": {"content": "hidden_states", "teacher_hidden_size": 12},
}
"""Settings of models with a mixer. `ntp` and `kd` train a plain model, `mtp` one with heads."""


@pytest.fixture
def build(random_model, random_teacher, backbone_config) -> Callable[[str, str], PreTrainedModel]:
    def model(method: str, backbone: str) -> PreTrainedModel:
        if method == "ntp":
            return random_teacher(backbone).float()
        if method == "mtp":
            return MultiTokenForCausalLM(MultiTokenConfig(backbone_config(backbone), num_future_tokens=2))
        return random_model(backbone, **MODELS[method]).float()

    return model


def optimizer_of(model: PreTrainedModel) -> MuonWithAdamW:
    decayed = {name for name, weight in model.named_parameters() if weight.dim() > 1}
    return MuonWithAdamW(model, decayed, weight_decay=0.1, lr=1e-2)


def kinds(names: list[str]) -> list[str]:
    """Names within a block, without the block's number."""
    return sorted(re.sub(r"^.*\.(h|layers)\.\d+\.", "", name) for name in names)


@pytest.mark.parametrize("backbone", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["ntp", "mtp", *MODELS])
def test_every_weight_is_in_one_group_and_the_blocks_are_in_the_same_as_those_of_ntp(build, method, backbone):
    model = build(method, backbone)
    grouped = [id(weight) for group in optimizer_of(model).param_groups for weight in group["params"]]
    assert sorted(grouped) == sorted(id(weight) for weight in model.parameters())
    muon = muon_weights(model)
    assert kinds([*muon]) == kinds([*muon_weights(build("ntp", backbone))])
    blocks = {name for name, weight in model.named_parameters() if re.search(r"\.(h|layers)\.\d", name)}
    assert muon.keys() == {name for name, weight in model.named_parameters() if name in blocks and weight.dim() == 2}


def test_a_step_is_that_of_muon_and_that_of_adamw(build):
    torch.manual_seed(0)
    model, twin = build("cocomix", "gpt2"), build("cocomix", "gpt2")
    twin.load_state_dict(model.state_dict())
    both = optimizer_of(model)
    matrices, decay, rest = (
        [twin.get_parameter(name) for name, weight in model.named_parameters() if weight in set(group["params"])]
        for group in both.param_groups
    )
    apart = [
        Muon(matrices, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2),
    ]
    for step in range(3):
        for weight, other in zip(model.parameters(), twin.parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            other.grad = weight.grad.clone()
        for group in (group for optimizer in (both, *apart) for group in optimizer.param_groups):
            group["lr"] = 1e-2 / (step + 1)  # as a schedule does
        for optimizer in (both, *apart):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
