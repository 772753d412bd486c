"""The teacher is tapped without a trace, and a token's labels depend on its own sequence only."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, PreTrainedModel

from cocomix import InputError
from cocomix.concepts import attribution as attribution_module
from cocomix.concepts.attribution import ConceptExtractor, ConceptLabels, attribution_scores, select_labels
from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.teacher import (
    check_causal,
    freeze,
    loss_with_residual,
    next_token_targets,
    residual_stream,
    tapped_residual,
)
from cocomix.models.backbones import decoder_blocks

KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "olmo2", "gpt_neox")
LENGTHS = (9, 4, 6)


@pytest.fixture(params=KINDS)
def teacher(request, random_teacher) -> PreTrainedModel:
    return random_teacher(request.param)


@pytest.fixture
def sae() -> SparseAutoencoder:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return SparseAutoencoder(
        W_enc=draw(32, 60), b_enc=draw(60) - 8, W_dec=draw(60, 32), b_dec=draw(32), k=6, normalization="layer_norm"
    )


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 53, (3, 9))


def watch(blocks: nn.ModuleList) -> list[int]:
    """Grows by a block's number each time that block runs."""
    runs: list[int] = []
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    return runs


def assert_same(found: ConceptLabels, expected: ConceptLabels, scale: float = 1.0) -> None:
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.scores * scale, expected.scores, rtol=1e-9, atol=1e-12)


# What is refused


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_teacher_has_not_is_refused(layer, teacher, sae):
    with pytest.raises(InputError, match=f"teacher_layer is {layer}; a teacher of 3 blocks takes 0 to 2"):
        ConceptExtractor(teacher, sae, layer)


def test_an_sae_of_another_width_is_refused(teacher):
    narrow = SparseAutoencoder(
        W_enc=torch.ones(16, 8), b_enc=torch.ones(8), W_dec=torch.ones(8, 16), b_dec=torch.ones(16), k=2
    )
    with pytest.raises(InputError, match="the SAE reads activations of width 16, but the teacher's width is 32"):
        ConceptExtractor(teacher, narrow, 1)


def test_an_unknown_selection_is_refused(teacher, sae):
    with pytest.raises(InputError, match="selection is 'largest'; expected one of attribution, attribution_abs"):
        ConceptExtractor(teacher, sae, 1, selection="largest")


@pytest.mark.parametrize("number", [0, -2])
def test_less_than_one_label_is_refused(number, teacher, sae):
    with pytest.raises(InputError, match=f"labels_per_token is {number}; expected 1 or more"):
        ConceptExtractor(teacher, sae, 1, labels_per_token=number)


# The tap


def test_extraction_freezes_the_teacher_and_gives_no_weight_a_gradient(teacher, sae, ids):
    teacher.train()
    ConceptExtractor(teacher, sae, 1, selection="attribution")(ids)
    assert not teacher.training
    assert list(teacher.parameters())
    for weight in teacher.parameters():
        assert weight.grad is None
        assert not weight.requires_grad


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_only_the_blocks_above_the_tap_build_a_graph(layer, teacher, ids):
    outputs: list[Tensor] = []

    def note(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    for block in decoder_blocks(teacher):
        block.register_forward_hook(note)
    tapped_residual(freeze(teacher), ids, layer)
    assert len(outputs) == 3
    # These hooks were there first: the tapped block is noted before its output starts the graph.
    assert [output.requires_grad for output in outputs] == [number > layer for number in range(3)]


def test_the_residual_that_the_upper_blocks_read_is_a_leaf(teacher, ids):
    inputs: list[Tensor] = []

    def note(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs.append(args[0] if args else kwargs["hidden_states"])

    decoder_blocks(teacher)[2].register_forward_pre_hook(note, with_kwargs=True)
    tapped_residual(freeze(teacher), ids, 1)
    assert inputs[0].is_leaf
    assert inputs[0].requires_grad


def test_the_result_carries_no_graph_and_the_hooks_are_gone(teacher, ids):
    tapped = tapped_residual(freeze(teacher), ids, 1)
    assert not tapped.residual.requires_grad
    assert not tapped.gradient.requires_grad
    residual_stream(teacher, ids, 1)
    assert all(not block._forward_hooks for block in decoder_blocks(teacher))
    assert not teacher(input_ids=ids).logits.requires_grad


def test_the_gradient_is_the_same_where_gradients_are_switched_off(teacher, ids):
    expected = tapped_residual(freeze(teacher), ids, 1).gradient
    with torch.no_grad():
        found = tapped_residual(teacher, ids, 1).gradient
    assert expected.abs().max() > 0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_residual_stream_runs_no_block_above_the_tap(layer, teacher, ids):
    expected = tapped_residual(freeze(teacher), ids, layer).residual
    runs = watch(decoder_blocks(teacher))
    found = residual_stream(teacher, ids, layer)
    assert runs == list(range(layer + 1))
    assert torch.equal(found, expected)


def test_a_replaced_residual_changes_the_loss_as_the_gradient_says(teacher, ids):
    tapped = tapped_residual(freeze(teacher), ids, 1)
    step = 1e-3 * tapped.gradient / tapped.gradient.norm()
    moved = loss_with_residual(teacher, ids, 1, lambda x: x + step)
    back = loss_with_residual(teacher, ids, 1, lambda x: x - step)
    # Llama's norms are taken in float32, which shows in so small a difference.
    torch.testing.assert_close((moved - back) / 2, (tapped.gradient * step).sum(), rtol=1e-2, atol=0)


def test_a_residual_put_back_unchanged_leaves_the_loss(teacher, ids):
    logits = teacher(input_ids=ids).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
    found = loss_with_residual(freeze(teacher), ids, 1, lambda x: x)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)


def test_labels_by_activation_need_nothing_above_the_tap(teacher, sae, ids):
    tapped = tapped_residual(freeze(teacher), ids, 0)
    latents = sae.encode(tapped.residual)
    expected = select_labels(latents, latents.values, tapped.has_target, 4, "activation")
    extractor = ConceptExtractor(teacher, sae, 0, selection="activation")
    runs = watch(decoder_blocks(teacher))
    assert_same(extractor(ids), expected)
    assert runs == [0]


# Independence of what shares the batch


def test_labels_do_not_depend_on_what_shares_the_batch(teacher, sae, ids):
    extractor = ConceptExtractor(teacher, sae, 1, selection="attribution")
    together = extractor(ids)
    assert (together.ids >= 0).any()
    for row in range(3):
        alone = extractor(ids[row : row + 1])
        # Scores are shares of the mean loss, and the batch has three times as many targets.
        assert_same(ConceptLabels(*(part[row : row + 1] for part in together)), alone, scale=3)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_gets_no_labels_and_changes_none(side, teacher, sae):
    extractor = ConceptExtractor(teacher, sae, 1, selection="attribution")
    sequences = [torch.randint(1, 53, (length,)) for length in LENGTHS]
    input_ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(9 - len(sequence), 9)
        input_ids[row, place], mask[row, place] = sequence, 1
    labels = extractor(input_ids, mask)
    assert (labels.ids[mask == 0] == -100).all()
    assert (labels.scores[mask == 0] == 0).all()
    targets = sum(LENGTHS) - len(LENGTHS)
    for row, sequence in enumerate(sequences):
        real = mask[row].bool()
        alone = extractor(sequence[None])
        padded = ConceptLabels(*(part[row, real][None] for part in labels))
        # Rotary angles are taken in float32, so that a shift by the padding leaves a trace of 1e-7.
        assert torch.equal(padded.ids, alone.ids)
        scale = targets / (len(sequence) - 1)
        torch.testing.assert_close(padded.scores * scale, alone.scores, rtol=1e-4, atol=1e-6)


def test_targets_are_the_next_tokens_where_both_are_real():
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_token_targets(ids).tolist() == [[6, 7, 8, -100]]
    assert next_token_targets(ids, torch.tensor([[1, 1, 1, 0]])).tolist() == [[6, 7, -100, -100]]
    assert next_token_targets(ids, torch.tensor([[0, 1, 1, 1]])).tolist() == [[-100, 7, 8, -100]]


def test_a_batch_of_single_tokens_has_no_labels(teacher, sae):
    labels = ConceptExtractor(teacher, sae, 1, selection="attribution")(torch.tensor([[3], [4]]))
    assert (labels.ids == -100).all()
    assert torch.equal(labels.scores, torch.zeros(2, 1, 4, dtype=torch.float64))


def test_no_token_has_a_label_twice_and_all_labels_are_concepts(teacher, sae, ids):
    labels = ConceptExtractor(teacher, sae, 1, labels_per_token=10, selection="attribution")(ids)
    assert labels.ids.shape == labels.scores.shape == (3, 9, 10)
    assert (labels.ids[..., 6:] == -100).all()  # k is 6
    found = 0
    for of_token in labels.ids.flatten(0, 1).tolist():
        real = [concept for concept in of_token if concept != -100]
        assert len(set(real)) == len(real)
        assert all(0 <= concept < 60 for concept in real)
        found += len(real)
    assert found > 0


# Chunks


@pytest.mark.parametrize("rows_per_chunk", [1, 4])
def test_gathering_in_chunks_equals_gathering_at_once(rows_per_chunk, monkeypatch):
    W_dec, gradient = torch.randn(30, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    latents = Latents(torch.rand(2, 5, 3, dtype=torch.float64), torch.randint(30, (2, 5, 3)))
    whole = attribution_scores(latents, gradient, W_dec)
    chunks: list[int] = []
    einsum = torch.einsum
    monkeypatch.setattr(
        attribution_module.torch,
        "einsum",
        lambda equation, *operands: (chunks.append(len(operands[0])), einsum(equation, *operands))[1],
    )
    monkeypatch.setattr(attribution_module, "GATHER_BUFFER_BYTES", rows_per_chunk * 3 * 12 * 8)
    found = attribution_scores(latents, gradient, W_dec)
    assert len(chunks) == -(-10 // rows_per_chunk)
    assert max(chunks) == rows_per_chunk
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)


# Teachers of any form


def test_a_teacher_with_sliding_windows_is_tapped_as_it_is(random_teacher, sae, ids):
    """What a student cannot be cut from can still teach."""
    windowed, whole = random_teacher("mistral", sliding_window=3), random_teacher("mistral")
    windowed.load_state_dict(whole.state_dict())
    found, other = (
        ConceptExtractor(windowed, sae, 1, selection="attribution")(ids),
        ConceptExtractor(whole, sae, 1, selection="attribution")(ids),
    )
    assert not torch.equal(found.scores, other.scores)


@pytest.mark.parametrize("kind", ["opt", "phi", "gemma2", "mixtral", "falcon", "bloom"])
def test_teachers_that_nothing_here_knows_by_name(kind, redraw, sae, ids):
    """The decoder may lie one level down (OPT), and a block may hold as many experts as there are blocks (Mixtral)."""
    sizes = {
        "vocab_size": 53,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    special = {
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
        "gemma2": {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48},
        "mixtral": {"num_key_value_heads": 2, "intermediate_size": 48, "num_local_experts": 3},
        "bloom": {"n_layer": 3, "n_head": 4},
    }
    config = AutoConfig.for_model(kind, **{**sizes, **special.get(kind, {})})
    teacher = AutoModelForCausalLM.from_config(config).eval()  # experts know no float64
    redraw(teacher)
    labels = ConceptExtractor(teacher, sae.float(), 1, selection="attribution")(ids)
    assert (labels.ids[:, :-1, 0] >= 0).all()
    assert (labels.ids[:, -1] == -100).all()
    whole = teacher(input_ids=ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(residual_stream(teacher, ids, 1), whole)


def test_a_model_without_a_list_of_blocks_cannot_be_tapped(random_teacher, sae):
    teacher = random_teacher()
    del teacher.transformer.h[2]
    with pytest.raises(InputError, match="this teacher cannot be tapped: GPT2Model has 0 lists of 3 blocks"):
        ConceptExtractor(teacher, sae, 1)


def test_an_sae_that_says_where_it_reads_is_held_to_it(random_teacher, sae):
    sae.teacher_layer = 2
    ConceptExtractor(random_teacher(), sae, 2)
    with pytest.raises(InputError, match=r"teacher_layer is 1, but .* the SAE was trained on block 2"):
        ConceptExtractor(random_teacher(), sae, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_bfloat16_teacher_labels_much_like_a_float32_one(kind, random_teacher, sae, ids):
    full = random_teacher(kind).float()
    half = copy.deepcopy(full).bfloat16()
    sae = sae.float()
    found, expected = (
        ConceptExtractor(half, sae, 1, selection="attribution")(ids),
        ConceptExtractor(full, sae, 1, selection="attribution")(ids),
    )
    tapped = tapped_residual(half, ids, 1)
    assert tapped.residual.dtype == tapped.gradient.dtype == torch.bfloat16
    assert torch.equal(found.ids >= 0, expected.ids >= 0)
    same = (found.ids[..., 0] == expected.ids[..., 0])[:, :-1].float().mean()
    assert same > 0.6  # the rounding of bfloat16 decides between near equals


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_labels_are_the_same_inside_autocast(kind, random_teacher, sae, ids):
    """As in a training step in bfloat16."""
    extractor = ConceptExtractor(random_teacher(kind).float(), sae.float(), 1, selection="attribution")
    expected = extractor(ids)
    with torch.autocast("cpu", torch.bfloat16):
        found = extractor(ids)
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)


def test_a_teacher_that_looks_ahead_is_refused(random_teacher, redraw):
    check_causal(random_teacher("llama"), "teacher", "TEACHER")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    encoder = AutoModelForCausalLM.from_config(BertConfig(vocab_size=53, **sizes)).eval()
    redraw(encoder)
    with pytest.raises(InputError, match="the teacher TEACHER is not a causal language model: a later token changes"):
        check_causal(encoder, "teacher", "TEACHER")
