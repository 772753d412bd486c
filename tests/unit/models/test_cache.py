"""The cache counts tokens, so whatever generation does with it gives what a model without a cache gives."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, QuantizedCache, StaticCache

import cocomix
from cocomix import Steering
from cocomix.models.multi_token import MultiTokenConfig, MultiTokenForCausalLM

PAIR = {"slot_attention": "pair", "slot_positions": "repeat", "concept_slot": "residual"}
WINDOWS = {"sliding_window": 3}
MODELS = {
    "lower-0": ("llama", {"insert_layer": 0}),
    "lower-1": ("gpt2", {"insert_layer": 1}),
    "lower-2": ("llama", {"insert_layer": 2}),
    "pair": ("gpt2", PAIR),
    "add": ("llama", {"mixing": "add", "insert_layer": 0}),
    "windows": ("mistral", {"backbone": WINDOWS}),
}
# Without token 0, which an assistant would take for padding.
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


@pytest.fixture(params=[*MODELS, "heads"])
def model(request, random_model, backbone_config, redraw):
    if request.param in MODELS:
        kind, settings = MODELS[request.param]
        return random_model(kind, **settings)
    config = MultiTokenConfig(backbone_config("mistral", num_hidden_layers=4, **WINDOWS), num_future_tokens=3)
    heads = MultiTokenForCausalLM(config).double().eval()
    redraw(heads)
    return heads


@pytest.fixture
def ids() -> Tensor:
    """(1, 10), with repetitions, from which prompt lookup proposes."""
    return torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])


@pytest.fixture
def padded() -> tuple[Tensor, Tensor]:
    """Two prompts (2, 6), the first padded on the left, and their mask."""
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    return torch.randint(1, 53, (2, 6)), mask


def greedy(model, ids: Tensor, mask: Tensor | None = None, **kwargs: object) -> Tensor:
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **GREEDY, **kwargs)


@torch.no_grad()
def test_a_cropped_cache_continues_as_if_the_tokens_had_not_been_read(model, ids):
    cache = DynamicCache(config=model.config.backbone_config)
    cache.activate_past_recording()  # without it windows forget what a crop would bring back
    model(ids, past_key_values=cache)
    cache.crop(0)
    model(ids[:, :4] + 20, past_key_values=cache)
    assert [cache.get_seq_length(layer) for layer in range(len(cache))] == [14] * len(cache)
    cache.crop(-4)
    assert [cache.get_seq_length(layer) for layer in range(len(cache))] == [10] * len(cache)
    more = torch.tensor([[9, 30, 2]])
    found = model(more, past_key_values=cache).logits
    whole = model(torch.cat([ids, more], 1), use_cache=False).logits
    torch.testing.assert_close(found, whole[:, 10:], rtol=1e-9, atol=1e-9)


def test_assisted_decoding_gives_the_greedy_text(model, ids):
    text = greedy(model, ids, use_cache=False)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=4), text)
    assistant = copy.deepcopy(model)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    passes: list[None] = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    assert torch.equal(greedy(model, ids, assistant_model=assistant), text)
    assert len(passes) == 2  # of three proposed tokens and one more: the assistant's cache is right, too


@pytest.mark.parametrize("beams", [1, 3])
def test_a_static_cache_gives_the_text_of_the_dynamic_one(model, padded, beams):
    steering = {"steering": {3: 9.0}} if getattr(model, "mixes_concepts", False) else {}
    for prompt, mask in (padded, (padded[0], None)):
        text = greedy(model, prompt, mask, num_beams=beams, **steering)
        assert torch.equal(
            greedy(model, prompt, mask, num_beams=beams, cache_implementation="static", **steering), text
        )


STEERINGS = {"interleave": Steering.add({3: 9.0}, positions="generated"), "pair": [{3: 9.0}, None], "windows": None}


@pytest.mark.parametrize("name", STEERINGS)
def test_a_decoding_step_with_a_static_cache_compiles_to_one_graph(random_model, padded, name):
    kind, settings = {"interleave": ("gpt2", {}), **MODELS}[name]
    model, (prompt, mask) = random_model(kind, **settings), padded
    text = greedy(model, prompt, mask, steering=STEERINGS[name])
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    static = {"cache_implementation": "static", "compile_config": compiled}
    assert torch.equal(greedy(model, prompt, mask, steering=STEERINGS[name], **static), text)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # shapes do not change from step to step


@torch.no_grad()
def test_an_empty_static_cache_is_converted(random_model, padded):
    prompt, mask = padded
    model = random_model("llama")
    cache = StaticCache(config=model.config, max_cache_len=20)
    for _ in range(2):
        first = model(prompt, attention_mask=mask, past_key_values=cache)
        assert first.past_key_values is cache
        assert (cache.get_seq_length(), cache.get_seq_length(2), cache.get_max_length()) == (6, 6, 20)
        longer = torch.cat([mask, torch.ones(2, 2, dtype=torch.long)], 1)
        found = model(prompt[:, :2], attention_mask=longer, past_key_values=cache).logits
        whole = model(torch.cat([prompt, prompt[:, :2]], 1), attention_mask=longer, use_cache=False).logits
        torch.testing.assert_close(found, whole[:, 6:], rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="a quantized or static cache cannot be cropped"):
            cache.crop(-1)
        cache.reset()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_returned_cache_continues_its_text(model, padded, beams):
    (prompt, mask), more = padded, torch.randint(1, 53, (2, 3))
    first = greedy(model, prompt, mask, return_dict_in_generate=True)
    text = torch.cat([first.sequences, more], 1)
    mask = torch.cat([mask, torch.ones(2, 11, dtype=torch.long)], 1)
    expected = greedy(model, text, mask, num_beams=beams, use_cache=False)
    first.past_key_values.batch_repeat_interleave(beams)
    found = greedy(model, text, mask, num_beams=beams, past_key_values=first.past_key_values)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_a_plain_cache_is_extended_in_place(random_model, ids):
    model, cache = random_model("llama", insert_layer=0), DynamicCache()
    for piece in ids.split(5, dim=1):
        assert model(piece, past_key_values=cache).past_key_values is cache
    assert cache.get_seq_length() == 10


@torch.no_grad()
def test_a_quantized_cache_rounds_as_that_of_the_backbone(random_teacher, ids):
    plain = random_teacher("llama")
    model = cocomix.CoCoMixForCausalLM.from_backbone(plain, 1, num_concepts=40, num_active_concepts=5)
    read = []
    for each in (model, plain):
        cache = QuantizedCache("fp8", config=each.config)
        read.append(torch.cat([each(piece, past_key_values=cache).logits for piece in ids.split(5, dim=1)], 1))
        assert cache.get_seq_length() == 10
    torch.testing.assert_close(*read, rtol=1e-6, atol=1e-6)
    assert (read[0] - plain(ids).logits).abs().max() > 1e-3
    cache = model(ids, past_key_values=QuantizedCache("fp8", config=model.config)).past_key_values
    with pytest.raises(ValueError, match="a quantized or static cache cannot be cropped"):
        cache.crop(-1)


@torch.no_grad()
def test_an_offloaded_cache_offloads_the_layers_of_both_stacks(random_model, ids, monkeypatch):
    class Stream(nullcontext):
        def wait_stream(self, _other: object) -> None:
            """All is done at once on the CPU."""

    monkeypatch.setattr(torch.cuda, "default_stream", lambda _device: Stream())
    model = random_model("llama")
    cache, offloaded = DynamicCache(config=model.config.backbone_config, offloading=True), []
    cache.prefetch_stream = Stream()
    monkeypatch.setattr(type(cache.layers[0]), "offload", lambda layer: offloaded.append(layer))
    model(ids, past_key_values=cache)
    assert offloaded == cache.layers


def test_caches_of_other_models_are_refused(random_model, random_teacher, ids):
    model = random_model("llama")
    for other, expected in (
        (random_model("llama", insert_layer=2), "comes from a model with other stacks"),
        (random_model("llama", mixing="add"), "comes from a model with other stacks"),
        (random_teacher("llama"), "a DynamicCache with one entry per token, and this model keeps 2"),
    ):
        with pytest.raises(ValueError, match=expected):
            model(ids, past_key_values=other(ids, use_cache=True).past_key_values)
    with pytest.raises(ValueError, match="a Counting of 3 layers; expected a dynamic cache of 3"):
        model(ids, past_key_values=type("Counting", (DynamicCache,), {})())


def test_static_caches_that_do_not_fit_are_refused(random_model, random_teacher, ids):
    model, teacher = random_model("llama"), random_teacher("llama")
    filled = StaticCache(config=teacher.config, max_cache_len=16)
    teacher(ids, past_key_values=filled)
    windows = StaticCache(config=random_model("mistral", backbone=WINDOWS).config, max_cache_len=16)
    for cache in (filled, windows):
        with pytest.raises(ValueError, match="a StaticCache of 3 layers; expected an empty one of 3 without sliding"):
            model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"shape \(1, 17\); expected .* here \(1, 10 to 16\)"):
        cache = StaticCache(config=model.config, max_cache_len=16)
        model(ids, attention_mask=torch.ones(1, 17), past_key_values=cache)
    with pytest.raises(ValueError, match="offloads no static cache; use cache_implementation 'static' or 'offloaded'"):
        greedy(model, ids, cache_implementation="offloaded_static")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="a static cache takes no attention implementation 'flex_attention'"):
        greedy(model, ids, cache_implementation="static")


def test_models_with_several_heads_refuse_what_their_cache_cannot_hold(backbone_config, ids):
    model = MultiTokenForCausalLM(MultiTokenConfig(backbone_config("llama"), num_future_tokens=2))
    with pytest.raises(ValueError, match="output_all_heads runs heads that past_key_values does not hold"):
        model(ids, past_key_values=DynamicCache(), output_all_heads=True)
