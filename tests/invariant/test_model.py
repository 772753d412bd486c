"""What holds for every student, whatever its backbone, its mixing and the place of its mixer.

Nearly all of it runs in float64 on weights far from zero, so that a difference can only be a mistake.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache

import cocomix
from cocomix.models.backbones import decoder_blocks

Model = cocomix.CoCoMixForCausalLM

MIXINGS = {
    "interleave": {"mixing": "interleave"},
    "residual": {"mixing": "interleave", "concept_slot": "residual"},
    "add": {"mixing": "add"},
    "none": {"mixing": "none"},
}
CASES = {
    f"{kind}-{name}-{insert_layer}": (kind, {**settings, "insert_layer": insert_layer})
    for kind in ("gpt2", "llama")
    for name, settings in MIXINGS.items()
    for insert_layer in (0, 1, 2)
    if kind == "llama" or name == "interleave" or insert_layer == 1
}
CASES |= {
    f"llama-repeat-{insert_layer}": ("llama", {"slot_positions": "repeat", "insert_layer": insert_layer})
    for insert_layer in (0, 1, 2)
}
CASES |= {f"{kind}-interleave-1": (kind, {}) for kind in ("qwen2", "qwen3", "olmo2", "gpt_neox")}
PAIR = {"slot_attention": "pair", "slot_positions": "repeat", "concept_slot": "residual"}
CASES |= {
    f"{kind}-pair-{insert_layer}": (
        kind,
        {
            "slot_attention": "pair",
            "slot_positions": "repeat",
            "concept_slot": "residual",
            "insert_layer": insert_layer,
        },
    )
    for kind, insert_layer in (("gpt2", 1), ("llama", 0), ("llama", 1))
}
CASES["gpt2-add-residual-1"] = ("gpt2", {"mixing": "add", "concept_slot": "residual"})
# Windows of three tokens, in all blocks or in the upper ones alone.
SOME_WINDOWS = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}
CASES |= {
    "mistral-window-1": ("mistral", {"backbone": {"sliding_window": 3}}),
    "mistral-window-0": ("mistral", {"backbone": {"sliding_window": 3}, "insert_layer": 0}),
    "mistral-window-add-1": ("mistral", {"backbone": {"sliding_window": 3}, "mixing": "add"}),
    "qwen2-windows-2": ("qwen2", {"backbone": SOME_WINDOWS, "insert_layer": 2}),
    "qwen3-windows-repeat-0": ("qwen3", {"backbone": SOME_WINDOWS, "insert_layer": 0, "slot_positions": "repeat"}),
}
TOLERANCE = 1e-9
LENGTHS = (9, 4, 6)
"""Of the sequences in a padded batch."""
NEW_TOKENS = 5
KINDS = ("gpt2", "llama")


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def model(request, random_model) -> Model:
    kind, settings = request.param
    return random_model(kind, **settings)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 53, (2, 9))


@pytest.fixture
def concept_ids() -> Tensor:
    """(2, 9, 3), one token unlabeled and one with a slot to spare."""
    drawn = torch.rand(2, 9, 40).topk(3).indices
    drawn[0, 2] = drawn[1, 5, 1:] = -100
    return drawn


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def padded(sequences: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask of sequences of different lengths."""
    longest = max(len(sequence) for sequence in sequences)
    rows, masks = [], []
    for sequence in sequences:
        gap = (longest - len(sequence), 0) if side == "left" else (0, longest - len(sequence))
        rows.append(torch.nn.functional.pad(sequence, gap))
        masks.append(torch.nn.functional.pad(torch.ones_like(sequence), gap))
    return torch.stack(rows), torch.stack(masks)


# Causality and the cache


@torch.no_grad()
def test_a_token_changes_its_own_prediction_and_no_earlier_one(model, ids):
    before = model(ids, output_concepts=True)
    for changed in (0, 3, 8):
        other = ids.clone()
        other[:, changed] = 52 - other[:, changed]  # 26 alone stays what it is
        assert (other != ids).any()
        after = model(other, output_concepts=True)
        for name in ("logits", "concept_logits"):
            assert_equal(after[name][:, :changed], before[name][:, :changed])
            assert (after[name][:, changed] - before[name][:, changed]).abs().max() > 1e-3


@torch.no_grad()
def test_reading_in_pieces_with_a_cache_equals_one_pass(model, ids):
    whole = model(ids, output_concepts=True, use_cache=False)
    assert whole.past_key_values is None
    for pieces in ((4, 1, 3, 1), (1,) * 9, (8, 1)):
        cache, found = DynamicCache(), []
        for piece in ids.split(pieces, dim=1):
            found.append(model(piece, past_key_values=cache, use_cache=True, output_concepts=True))
        assert_equal(torch.cat([out.logits for out in found], dim=1), whole.logits)
        assert_equal(torch.cat([out.concept_logits for out in found], dim=1), whole.concept_logits)


@torch.no_grad()
def test_the_cache_holds_one_entry_per_token_below_the_mixer_and_one_per_slot_above(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    config = model.config
    lower, upper = config.insert_layer, config.num_hidden_layers - config.insert_layer
    above = 18 if config.mixing == "interleave" else 9
    assert [layer.get_seq_length() for layer in cache.layers] == [9] * lower + [above] * upper


def generated(
    model: Model, input_ids: Tensor, mask: Tensor | None = None, use_cache: bool = True, beams: int = 1
) -> Tensor:
    mask = torch.ones_like(input_ids) if mask is None else mask
    out = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        num_beams=beams,
        use_cache=use_cache,
        pad_token_id=0,
    )
    return out[:, input_ids.shape[1] :]


def test_beams_with_the_cache_equal_beams_without(model, ids):
    cached = generated(model, ids, beams=3)
    assert cached.shape == (2, NEW_TOKENS)
    assert torch.equal(cached, generated(model, ids, use_cache=False, beams=3))


@torch.no_grad()
def test_greedy_generation_equals_the_largest_logit_of_a_full_pass(model, ids):
    text = ids
    for _ in range(NEW_TOKENS):
        text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated(model, ids), text[:, 9:])


# Padding


@torch.no_grad()
def test_padding_changes_no_prediction_at_a_real_token(model):
    sequences = [torch.randint(1, 53, (length,)) for length in LENGTHS]
    alone = [model(sequence[None], output_concepts=True) for sequence in sequences]
    for side in ("left", "right"):
        input_ids, mask = padded(sequences, side)
        out = model(input_ids, attention_mask=mask, output_concepts=True)
        for row, expected in enumerate(alone):
            real = mask[row].bool()
            assert_equal(out.logits[row, real], expected.logits[0])
            assert_equal(out.concept_logits[row, real], expected.concept_logits[0])


@torch.no_grad()
def test_left_padded_reading_in_pieces_equals_no_padding(model):
    sequences = [torch.randint(1, 53, (length,)) for length in LENGTHS]
    input_ids, mask = padded(sequences, "left")
    cache, found, seen = DynamicCache(), [], 0
    for piece in input_ids.split((6, 1, 2), dim=1):
        seen += piece.shape[1]
        found.append(model(piece, attention_mask=mask[:, :seen], past_key_values=cache, use_cache=True).logits)
    logits = torch.cat(found, dim=1)
    for row, sequence in enumerate(sequences):
        assert_equal(logits[row, mask[row].bool()], model(sequence[None]).logits[0])


def test_left_padded_generation_equals_generation_one_by_one(model):
    sequences = [torch.randint(1, 53, (length,)) for length in LENGTHS]
    alone = torch.cat([generated(model, sequence[None]) for sequence in sequences])
    for use_cache in (True, False):
        assert torch.equal(generated(model, *padded(sequences, "left"), use_cache=use_cache), alone)


# Several texts in a row


@torch.no_grad()
def test_packed_texts_are_read_as_if_each_were_alone(model):
    texts = [torch.randint(1, 53, (2, length)) for length in LENGTHS]
    position_ids = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    packed = model(torch.cat(texts, 1), position_ids=position_ids, output_concepts=True)
    alone = [model(text, output_concepts=True) for text in texts]
    for name in ("logits", "concept_logits"):
        assert_equal(packed[name], torch.cat([out[name] for out in alone], 1))
    assert packed.past_key_values is None


# Saving


def reloaded(folder: Path, dtype: torch.dtype | str = "auto") -> Model:
    """The saved model, its weights moved out of the mapped file: where memory is not aligned as torch
    aligns its own, matrix products round differently in the last bit."""
    return copy.deepcopy(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def assert_same_configuration(found: cocomix.CoCoMixConfig, expected: cocomix.CoCoMixConfig) -> None:
    for name in (
        "num_hidden_layers",
        "insert_layer",
        "num_concepts",
        "num_active_concepts",
        "mixing",
        "concept_slot",
        "slot_positions",
        "concept_loss_weight",
        "tie_word_embeddings",
    ):
        assert getattr(found, name) == getattr(expected, name), name
    assert type(found.backbone_config) is type(expected.backbone_config)
    backbones = [config.backbone_config.to_dict() for config in (found, expected)]
    assert {**backbones[0], "dtype": None} == {**backbones[1], "dtype": None}


@torch.no_grad()
def test_a_saved_model_loads_bit_equal(model, ids, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = reloaded(tmp_path)
    assert type(loaded) is Model
    assert loaded.dtype == torch.float64
    assert_same_configuration(loaded.config, model.config)
    assert len(decoder_blocks(loaded.lower)) == model.config.insert_layer
    assert len(decoder_blocks(loaded.upper)) == 3 - model.config.insert_layer
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_model_saved_in_bfloat16_loads_as_such(random_model, ids, tmp_path):
    random_model("llama").save_pretrained(tmp_path / "float64")
    model = reloaded(tmp_path / "float64", torch.bfloat16)
    model.save_pretrained(tmp_path / "bfloat16")
    loaded = reloaded(tmp_path / "bfloat16")
    assert model.dtype == loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(ids).logits, model(ids).logits)


# Gradients


def without_gradient(model: Model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.grad is None or weight.grad.abs().max() == 0}


def test_token_and_concept_loss_reach_every_parameter(model, ids, concept_ids):
    model(ids, labels=ids, concept_ids=concept_ids).loss.backward()
    assert without_gradient(model) == set()


def test_the_token_loss_reaches_the_mixer_only_where_it_mixes(model, ids):
    model(ids, labels=ids).loss.backward()
    mixer_weights = {name for name, _ in model.named_parameters() if name.startswith("mixer.")}
    assert without_gradient(model) == (mixer_weights if model.config.mixing == "none" else set())


def test_the_concept_loss_reaches_all_below_the_mixer_and_only_that(model, ids, concept_ids):
    model(ids, concept_ids=concept_ids).loss.backward()
    reached = {name for name, _ in model.named_parameters()} - without_gradient(model)
    heads = {"mixer.pre_bias", "mixer.predict.weight", "mixer.predict.bias"}
    # A tied head is the token embedding and goes by its name.
    assert reached == heads | {name for name, _ in model.lower.named_parameters(prefix="lower")}


def gradients(model: Model, ids: Tensor, concept_ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids, concept_ids=concept_ids).loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_gradient_checkpointing_gives_equal_gradients(model, ids, concept_ids):
    model.train()
    expected = gradients(model, ids, concept_ids)
    runs: list[str] = []
    for half in ("lower", "upper"):
        for block in decoder_blocks(getattr(model, half)):
            block.mlp.register_forward_pre_hook(lambda *_, half=half: runs.append(half))
    model.gradient_checkpointing_enable()
    found = gradients(model, ids, concept_ids)
    assert len(runs) == 2 * 3  # each block runs again in the backward pass
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert_equal(gradient, expected[name])


# Outputs


@torch.no_grad()
def test_the_total_loss_is_the_token_loss_and_the_weighted_concept_loss(random_model, ids, concept_ids):
    model = random_model(concept_loss_weight=0.7)
    out = model(ids, labels=ids, concept_ids=concept_ids)
    assert_equal(out.loss, out.token_loss + 0.7 * out.concept_loss)
    assert_equal(model(ids, labels=ids).loss, out.token_loss)
    assert_equal(model(ids, concept_ids=concept_ids).loss, 0.7 * out.concept_loss)
    assert model(ids).loss is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_return_dict_the_same_values_come_as_a_tuple(kind, random_model, ids, concept_ids):
    model = random_model(kind)
    out = model(ids, labels=ids, concept_ids=concept_ids, output_concepts=True)
    as_tuple = model(ids, labels=ids, concept_ids=concept_ids, output_concepts=True, return_dict=False)
    assert type(as_tuple) is tuple
    tensors = [value for value in as_tuple if isinstance(value, Tensor)]
    named = [out.loss, out.logits, out.token_loss, out.concept_loss, out.concept_logits, out.last_hidden_state]
    assert len(tensors) == len(named)
    assert all(torch.equal(found, expected) for found, expected in zip(tensors, named, strict=True))


@pytest.mark.parametrize("kept", [1, 4, torch.tensor([0, 5])], ids=["last", "last four", "by index"])
@torch.no_grad()
def test_logits_to_keep_gives_those_positions(kept, random_model, ids):
    model = random_model()
    positions = kept if isinstance(kept, Tensor) else slice(-kept, None)
    assert_equal(model(ids, logits_to_keep=kept).logits, model(ids).logits[:, positions])


@torch.no_grad()
def test_embeddings_in_place_of_ids_give_the_same_logits(model, ids):
    embedded = model.get_input_embeddings()(ids)
    assert_equal(model(inputs_embeds=embedded).logits, model(ids).logits)


def test_losses_of_parts_sum_to_the_loss_of_the_batch(random_model, ids, concept_ids):
    model = random_model()
    whole = model(ids, labels=ids, concept_ids=concept_ids)
    targets, labeled = 2 * 8, 2 * 9 - 1
    parts = [
        model(
            ids[row : row + 1],
            labels=ids[row : row + 1],
            concept_ids=concept_ids[row : row + 1],
            num_items_in_batch=targets,
            num_concept_items_in_batch=labeled,
        )
        for row in (0, 1)
    ]
    assert_equal(parts[0].token_loss + parts[1].token_loss, whole.token_loss)
    assert_equal(parts[0].concept_loss + parts[1].concept_loss, whole.concept_loss)
    assert_equal(parts[0].loss + parts[1].loss, whole.loss)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_attention_kernels_agree(kind, random_model, ids):
    model = random_model(kind)
    expected = model(ids).logits
    assert model.upper.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert model.lower.config._attn_implementation == model.upper.config._attn_implementation == "eager"
    # Transformers' eager attention takes the softmax in float32.
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


# Weights


@pytest.mark.parametrize("insert_layer", [0, 1, 2])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "gpt_neox"])
def test_initial_weights_are_those_of_the_plain_backbone(kind, insert_layer, backbone_config):
    backbone = backbone_config(kind)
    torch.manual_seed(7)
    plain = AutoModel.from_config(copy.deepcopy(backbone))
    torch.manual_seed(7)
    model = Model(
        cocomix.CoCoMixConfig(
            backbone_config=backbone, insert_layer=insert_layer, num_concepts=40, num_active_concepts=5
        )
    )
    blocks = [*decoder_blocks(model.lower), *decoder_blocks(model.upper)]
    for found, expected in zip(blocks, decoder_blocks(plain), strict=True):
        found, expected = found.state_dict(), expected.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    if kind == "gpt2":
        assert torch.equal(model.lower.wpe.weight, plain.wpe.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mixer_starts_as_published(kind, backbone_config):
    config = cocomix.CoCoMixConfig(
        backbone_config=backbone_config(kind, initializer_range=0.05), insert_layer=1, num_concepts=2000
    )
    mixer = Model(config).mixer
    for bias in (mixer.pre_bias, mixer.predict.bias, mixer.compress_bias):
        assert torch.equal(bias, torch.zeros_like(bias))
    for weight in (mixer.predict.weight, mixer.compress_weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.02)
        assert abs(weight.mean().item()) < 1e-3


def test_a_model_has_the_weights_of_its_backbone_the_mixer_and_the_head(model):
    plain = AutoModel.from_config(copy.deepcopy(model.config.backbone_config))
    width, concepts, vocabulary = 32, 40, 53
    mixer_weights = width + concepts * width + concepts
    if model.config.mixing != "none":
        mixer_weights += concepts * width + width
    head = 0 if model.config.tie_word_embeddings else vocabulary * width
    assert model.num_parameters() == plain.num_parameters() + mixer_weights + head
    unread = 0 if model.config.mixing == "none" else (concepts - 5) * width
    assert model.num_activated_parameters() == model.num_parameters() - unread


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_the_token_embedding_exactly_when_tied(kind, tied, random_model, ids, tmp_path):
    model = random_model(kind, backbone={"tie_word_embeddings": tied})
    model.save_pretrained(tmp_path)
    loaded = reloaded(tmp_path)
    for each in (model, loaded):
        assert (each.lm_head.weight is each.get_input_embeddings().weight) == tied
        assert ("lm_head.weight" in dict(each.named_parameters())) != tied
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@torch.no_grad()
def test_the_vocabulary_can_grow(tied, random_model, ids):
    model = random_model(backbone={"tie_word_embeddings": tied})
    before = model(ids).logits
    model.resize_token_embeddings(60)
    assert model.config.vocab_size == 60
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = model(ids, labels=ids)
    assert after.logits.shape == (2, 9, 60)
    assert_equal(after.logits[..., :53], before)
    assert_equal(model(ids, labels=ids, output_logits=False).loss, after.loss)


# Precision


def test_float64_and_bfloat16_run_forward_and_backward(model, ids, concept_ids):
    expected = model(ids, labels=ids, concept_ids=concept_ids)
    assert expected.logits.dtype == expected.loss.dtype == torch.float64
    model.bfloat16()
    out = model(ids, labels=ids, concept_ids=concept_ids)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=0.05)
    out.loss.backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_runs_forward_and_backward(
    kind: str, random_model: Callable[..., Model], ids: Tensor, concept_ids: Tensor
):
    model = random_model(kind).float()
    expected = model(ids, labels=ids, concept_ids=concept_ids).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(ids, labels=ids, concept_ids=concept_ids).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=0.05)
    loss.backward()
    assert without_gradient(model) == set()
