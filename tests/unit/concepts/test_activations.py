"""The stream of activations: every one equally often, in bounded memory, and the same after a resumption."""

from __future__ import annotations

import io
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix.concepts import activations
from cocomix.concepts.activations import ActivationStream
from cocomix.concepts.teacher import freeze

BLOCKS, BLOCK_SIZE, WIDTH = 7, 6, 2
TOKENS = BLOCKS * BLOCK_SIZE


@pytest.fixture
def teacher(monkeypatch):
    """Its "residual stream" is the token itself, twice, so that each activation says where it comes from."""
    monkeypatch.setattr(
        activations, "residual_stream", lambda teacher, ids, layer: ids[..., None].expand(-1, -1, WIDTH).double()
    )
    return GPT2LMHeadModel(GPT2Config(vocab_size=TOKENS, n_positions=BLOCK_SIZE, n_embd=WIDTH, n_layer=1, n_head=1))


def stream_of(teacher, *, tokens_per_step=4, buffer_tokens=20, seed=3) -> ActivationStream:
    blocks = Dataset.from_dict({"input_ids": torch.arange(TOKENS).view(BLOCKS, BLOCK_SIZE).tolist()})
    return ActivationStream(teacher, blocks, 0, tokens_per_step=tokens_per_step, buffer_tokens=buffer_tokens, seed=seed)


def saved(stream: ActivationStream) -> io.BytesIO:
    """Its state, as a file holds it."""
    file = io.BytesIO()
    torch.save(stream.state_dict(), file)
    file.seek(0)
    return file


SIZES = [(4, 20), (4, 4), (4, 7), (5, 23), (13, 26), (1, 50), (20, 100)]
"""Steps that divide the buffer and do not, a buffer of one step, teacher batches of one block and several, a
buffer larger than a round."""


@pytest.mark.parametrize(("tokens_per_step", "buffer_tokens"), SIZES)
def test_a_resumed_stream_gives_the_same_batches_as_an_undisturbed_one(teacher, tokens_per_step, buffer_tokens):
    sizes = {"tokens_per_step": tokens_per_step, "buffer_tokens": buffer_tokens}
    undisturbed = stream_of(teacher, **sizes)
    resumed = stream_of(teacher, **sizes)
    for _ in range(3 * TOKENS // tokens_per_step):
        state = torch.load(saved(resumed), weights_only=True)
        resumed = stream_of(teacher, **sizes)
        resumed.load_state_dict(state)
        expected, found = next(undisturbed), next(resumed)
        assert torch.equal(found, expected)
        assert found.shape == (tokens_per_step, WIDTH)
        assert found.dtype == torch.float32


def test_a_state_is_not_changed_by_what_comes_after(teacher):
    stream = stream_of(teacher)
    next(stream)
    state = stream.state_dict()
    expected = [next(stream) for _ in range(12)]
    later = stream_of(teacher)
    later.load_state_dict(state)
    assert all(torch.equal(next(later), batch) for batch in expected)


@pytest.mark.parametrize(("tokens_per_step", "buffer_tokens"), SIZES)
def test_every_activation_is_served_once_for_each_time_that_it_was_read(teacher, tokens_per_step, buffer_tokens):
    """What was served and what still lies in the stream are whole rounds, and the blocks of the one that is going."""
    stream = stream_of(teacher, tokens_per_step=tokens_per_step, buffer_tokens=buffer_tokens)
    served: Counter[int] = Counter()
    for _ in range(4 * TOKENS // tokens_per_step):
        served.update(next(stream)[:, 0].int().tolist())
        state = stream.state_dict()
        held = torch.cat([state["unserved"], state["waiting"]])[:, 0].int().tolist()
        times = Counter(served)
        times.update(held)
        assert sum(times.values()) == state["round"] * TOKENS + state["blocks_read"] * BLOCK_SIZE
        assert {times[token] for token in range(TOKENS)} <= {state["round"], state["round"] + 1}


def test_batches_mix_blocks_and_their_order_changes_from_round_to_round(teacher):
    stream = stream_of(teacher, tokens_per_step=6, buffer_tokens=36)
    batches = [next(stream)[:, 0].int().tolist() for _ in range(4 * BLOCKS)]
    assert all(len({token // BLOCK_SIZE for token in batch}) > 1 for batch in batches)
    assert batches[:BLOCKS] != batches[BLOCKS : 2 * BLOCKS]


def test_half_of_the_buffer_is_served_before_it_is_filled_up_again(teacher):
    stream = stream_of(teacher, tokens_per_step=4, buffer_tokens=24)
    fillings = []
    for _ in range(9):
        next(stream)
        fillings.append(stream.state_dict()["fillings"])
    assert fillings == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize(("tokens_per_step", "buffer_tokens"), SIZES)
def test_memory_is_bounded_by_the_buffer_and_one_teacher_batch(teacher, tokens_per_step, buffer_tokens):
    stream = stream_of(teacher, tokens_per_step=tokens_per_step, buffer_tokens=buffer_tokens)
    batch = max(1, tokens_per_step // BLOCK_SIZE) * BLOCK_SIZE
    for _ in range(2 * TOKENS // tokens_per_step):
        next(stream)
        held = {tensor.untyped_storage().data_ptr(): tensor for tensor in vars(stream).values() if _is_wide(tensor)}
        assert sum(tensor.untyped_storage().nbytes() for tensor in held.values()) <= (buffer_tokens + batch) * WIDTH * 4
    state = stream.state_dict()
    assert len(state["unserved"]) + len(state["waiting"]) <= buffer_tokens + batch
    assert state["waiting"].untyped_storage().nbytes() == state["waiting"].nbytes  # no more is written than is needed


def _is_wide(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim == 2


def test_another_seed_gives_another_order(teacher):
    assert not torch.equal(next(stream_of(teacher, seed=3)), next(stream_of(teacher, seed=4)))


def test_activations_are_those_of_the_teacher():
    teacher = freeze(GPT2LMHeadModel(GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=2, n_head=2)))
    ids = torch.randint(11, (3, 4))
    stream = ActivationStream(
        teacher, Dataset.from_dict({"input_ids": ids.tolist()}), 0, tokens_per_step=12, buffer_tokens=12, seed=0
    )
    with torch.no_grad():
        expected = teacher(ids, output_hidden_states=True).hidden_states[1].flatten(0, 1)
    found = next(stream)
    torch.testing.assert_close(found[found[:, 0].argsort()], expected[expected[:, 0].argsort()])
