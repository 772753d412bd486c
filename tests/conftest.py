"""Shared by all tests: the golden files, and tiny models whose weights are all drawn at random."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

import cocomix
from reference_files import GoldenSet, shared

torch.set_num_threads(1)  # the models are tiny: more threads would only wait for each other

SIZES = {
    "vocab_size": 53,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
CHANGES = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": True},
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2, "sliding_window": None},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "olmo2": {"num_key_value_heads": 2},
    "gpt_neox": {},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test draws the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=["own", "larger"])
def golden(request: pytest.FixtureRequest) -> GoldenSet:
    """Results of the published code, in the repository's own set and in the larger one."""
    return GoldenSet.named(request.param)


@pytest.fixture(scope="session")
def prose() -> Path:
    """A small corpus of English prose."""
    return shared("data/corpus_small")


@pytest.fixture(scope="session")
def local_tasks() -> Path:
    """Definitions of the usual zero-shot tasks on local copies of their data."""
    shared("data/eval")  # skips without the data
    return Path(__file__).parent / "local_tasks"


@pytest.fixture(scope="session")
def backbone_config() -> Callable[..., PretrainedConfig]:
    """backbone_config("llama", num_hidden_layers=2): a tiny configuration of that architecture."""

    def make(kind: str, **changes: object) -> PretrainedConfig:
        return AutoConfig.for_model(kind, **{**SIZES, **CHANGES[kind], **changes})

    return make


@pytest.fixture(scope="session")
def redraw() -> Callable[[nn.Module], None]:
    """Draws every weight anew with a standard deviation of 0.3, so that nothing is 0, 1 or negligible."""

    @torch.no_grad()
    def draw(module: nn.Module) -> None:
        for name, weight in module.named_parameters():
            weight.normal_(std=0.3)
            if weight.dim() == 1 and name.endswith("weight"):  # the gain of a norm
                weight.add_(1.0)

    return draw


@pytest.fixture(scope="session")
def random_model(backbone_config, redraw) -> Callable[..., cocomix.CoCoMixForCausalLM]:
    """random_model("gpt2", mixing="add"): a student of three blocks in float64 with weights far from zero."""

    def make(kind: str = "gpt2", backbone: dict | None = None, **settings: object) -> cocomix.CoCoMixForCausalLM:
        settings = {"insert_layer": 1, "num_concepts": 40, "num_active_concepts": 5, **settings}
        config = cocomix.CoCoMixConfig(backbone_config=backbone_config(kind, **(backbone or {})), **settings)
        model = cocomix.CoCoMixForCausalLM(config).double().eval()
        redraw(model)
        return model

    return make


@pytest.fixture
def random_teacher(backbone_config, redraw) -> Callable[..., PreTrainedModel]:
    """random_teacher("llama"): an ordinary language model of three blocks in float64."""

    def make(kind: str = "gpt2", **changes: object) -> PreTrainedModel:
        teacher = AutoModelForCausalLM.from_config(backbone_config(kind, **changes)).double().eval()
        redraw(teacher)
        return teacher

    return make


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference of two tensors of equal shape, relative to the largest value expected."""

    def compare(found: Tensor, expected: Tensor) -> float:
        assert found.shape == expected.shape
        assert expected.abs().max() > 0
        return ((found - expected).abs().max() / expected.abs().max()).item()

    return compare
