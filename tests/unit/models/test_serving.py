"""Serving engines that run models of Transformers take students with one slot per token: their calls, imitated."""

from __future__ import annotations

import pytest
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import cocomix

KERNEL = "vllm"


class AttentionInstance:
    """The attention of one layer, as an engine has it: keys and values of all requests in one cache."""

    def __init__(self) -> None:
        self.keys, self.values, self.places = [], [], []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, places: Tensor, scaling: float) -> Tensor:
        """Attend from (1, heads, T, d) to the earlier entries of the same request; places (T, 2): request, position."""
        assert query.shape[0] == 1 and query.shape[2] == key.shape[2] == len(places), "T tokens reach every layer"
        groups = query.shape[1] // key.shape[1]
        for kept, new in ((self.keys, key), (self.values, value)):
            kept.append(new.repeat_interleave(groups, dim=1))
        self.places.append(places)
        seen = torch.cat(self.places)
        mask = (places[:, None, 0] == seen[None, :, 0]) & (places[:, None, 1] >= seen[None, :, 1])
        scores = query @ torch.cat(self.keys, 2).transpose(2, 3) * scaling
        return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ torch.cat(self.values, 2)


def engine_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: None, **given: object):
    """Dispatch to the instance of the block that asks, and return (T, D), as registered attention of an engine does."""
    scaling = given.get("scaling") or query.shape[-1] ** -0.5
    instance = given["attention_instances"][module.layer_idx]
    return instance(query, key, value, given["places"], scaling)[0].transpose(0, 1).flatten(1), None


@pytest.fixture
def kernel():
    ALL_ATTENTION_FUNCTIONS[KERNEL] = engine_attention
    yield KERNEL
    del ALL_ATTENTION_FUNCTIONS[KERNEL]


class Engine:
    """Builds a model from its configuration, loads its weights, and runs several requests in one row."""

    def __init__(self, config: PretrainedConfig, weights: dict[str, Tensor], kernel: str) -> None:
        assert config.get_text_config() is config, "else engines take it for a multimodal model"
        config.get_text_config()._attn_implementation = kernel
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModel.from_config(config, dtype=torch.float64)
        head = weights.pop("lm_head.weight", None)
        self.model.load_state_dict(weights, assign=True)
        self.model.eval()
        self.head = self.model.get_input_embeddings().weight if head is None else head
        self.attention = {layer: AttentionInstance() for layer in range(config.num_hidden_layers)}

    def step(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Logits (T, V) of the tokens (T,) that requests add."""
        outputs = self.model(
            input_ids=tokens[None],
            inputs_embeds=None,
            use_cache=False,
            position_ids=places[None, :, 1],
            attention_instances=self.attention,
            places=places,
            return_dict=False,
        )
        assert outputs[0].shape[:2] == (1, len(tokens))
        return outputs[0][0] @ self.head.T


def places(*requests: tuple[int, range]) -> Tensor:
    return torch.tensor([(request, position) for request, span in requests for position in span])


@torch.no_grad()
@pytest.mark.parametrize("mixing", ["add", "none"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_an_engine_computes_the_logits_of_the_model(kind, mixing, random_model, kernel, tmp_path):
    model = random_model(kind, mixing=mixing)
    model.save_pretrained(tmp_path)
    weights = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    engine = Engine(AutoConfig.from_pretrained(tmp_path), weights, kernel)
    texts = torch.randint(1, 53, (2, 9))
    expected = model(texts).logits
    prompts = engine.step(torch.cat([texts[0, :6], texts[1, :4]]), places((0, range(6)), (1, range(4))))
    torch.testing.assert_close(prompts, torch.cat([expected[0, :6], expected[1, :4]]), rtol=1e-9, atol=1e-9)
    for step in range(3):  # each request reads one token
        found = engine.step(
            torch.stack([texts[0, 6 + step], texts[1, 4 + step]]),
            places((0, range(6 + step, 7 + step)), (1, range(4 + step, 5 + step))),
        )
        torch.testing.assert_close(
            found, torch.stack([expected[0, 6 + step], expected[1, 4 + step]]), rtol=1e-9, atol=1e-9
        )


def test_interleaved_models_are_refused_with_the_reason(random_model, kernel):
    model = random_model("llama")
    model.set_attn_implementation(kernel)
    with pytest.raises(ValueError, match=r"attention_instances: an argument for .* this model has 2 above its mixer"):
        model(torch.ones(1, 3, dtype=torch.long), attention_instances={})
    with pytest.raises(
        ValueError, match=r"mixing is 'interleave', which keeps two cache entries .* and vllm keeps one"
    ):
        AutoModel.from_config(model.config)


@torch.no_grad()
@pytest.mark.parametrize("mixing", ["add", "interleave"])
def test_the_base_model_is_saved_with_the_model_and_returns_its_states(mixing, random_model, tmp_path):
    model, ids = random_model("llama", mixing=mixing), torch.arange(1, 7).view(2, 3)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert type(base) is cocomix.CoCoMixModel
    found = base(ids, output_concepts=True, output_hidden_states=True, steering={3: 9.0})
    expected = model(ids, output_concepts=True, output_hidden_states=True, steering={3: 9.0})
    assert torch.equal(model.lm_head(found.last_hidden_state), expected.logits)
    assert torch.equal(found.concept_logits, expected.concept_logits)
    assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
    with pytest.raises(TypeError, match="unknown arguments: labels"):
        base(ids, labels=ids)
    base.save_pretrained(tmp_path / "base")
    again = AutoModel.from_pretrained(tmp_path / "base", dtype=torch.float64)
    assert torch.equal(again(ids).last_hidden_state, base(ids).last_hidden_state)


def test_settings_of_the_backbone_are_settings_of_the_model(backbone_config):
    config = cocomix.CoCoMixConfig(backbone_config("qwen3"), insert_layer=1)
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "rope_parameters", "layer_types"):
        assert getattr(config, name) == getattr(config.backbone_config, name)
    assert "head_dim" not in config.to_dict(), "saved once, with the backbone"
    assert getattr(config, "vision_config", None) is None
    config.vocab_size = 60
    assert config.backbone_config.vocab_size == 60
