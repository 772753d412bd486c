"""The judge of steered text against activations and losses computed by hand, text by text."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cocomix.concepts.sae import Latents, SparseAutoencoder
from cocomix.concepts.teacher import residual_stream
from cocomix.data.tokenizer import encode_documents, train_tokenizer
from cocomix.evaluation.steering_judge import Judge, distinct, mean_activations

PROMPTS = ["the red fox ", "a stone"]
CONTINUATIONS = ["jumps over the red fence", " in the river é"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the red fox jumps over the stone in the river"] * 3, 270)


@pytest.fixture
def teacher(random_teacher, tokenizer):
    return random_teacher("llama", vocab_size=len(tokenizer)).float().requires_grad_(False)


@pytest.fixture
def sae() -> SparseAutoencoder:
    shapes = {"W_enc": (32, 20), "b_enc": (20,), "W_dec": (20, 32), "b_dec": (32,)}
    return SparseAutoencoder(**{name: torch.randn(shape) for name, shape in shapes.items()}, k=4)


def activations_by_hand(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """(T, C) dense."""
    before = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    kept = torch.zeros_like(before)
    top = before.topk(4, dim=-1)
    return kept.scatter(-1, top.indices, top.values.relu())


@pytest.mark.parametrize("beginning", [[], [7]])
def test_readings_against_one_text_at_a_time(teacher, tokenizer, sae, beginning: list[int]) -> None:
    watched = [3, 11, 0]
    found = Judge(teacher, tokenizer, sae, 1, watched, beginning)(PROMPTS, CONTINUATIONS)
    for row, (prompt, continuation) in enumerate(zip(PROMPTS, CONTINUATIONS, strict=True)):
        (whole,), (head,) = (encode_documents(tokenizer, [text]) for text in (prompt + continuation, prompt))
        new = whole[len(head) :]
        assert whole[: len(head)] == head and len(new) > 2  # so that what is judged can be said without offsets
        ids = torch.tensor([beginning + whole])
        activations = activations_by_hand(sae, residual_stream(teacher, ids, 1)[0])[-len(new) :, watched]
        assert found.activation[row] == pytest.approx(activations.mean(0).numpy(), rel=1e-4, abs=1e-6)
        assert found.active[row] == pytest.approx((activations > 0).float().mean(0).numpy())
        logprobs = teacher(ids).logits[0].log_softmax(-1)[-len(new) - 1 : -1]
        assert found.nll[row] == pytest.approx(F.nll_loss(logprobs, torch.tensor(new)).item(), rel=1e-4)
        assert found.distinct_1[row] == len(set(new)) / len(new)
        assert found.distinct_2[row] == len(set(pairwise(new))) / (len(new) - 1)


def test_a_token_across_the_border_counts_to_the_continuation(teacher, tokenizer, sae) -> None:
    """«the» is one token of the tokenizer: split between prompt and continuation, it is judged, as the text is read."""
    judge = Judge(teacher, tokenizer, sae, 1, [0])
    ids, _, judged = judge._encode(["red th"], ["e"])
    assert judged[0].tolist() == [False] * (ids.shape[1] - 1) + [True]


def test_what_exceeds_the_context_is_cut_off_in_front(teacher, tokenizer, sae) -> None:
    judge = Judge(teacher, tokenizer, sae, 1, [0], prefix=[7])
    ids, _, judged = judge._encode(["red " * 60], ["fox"])
    assert ids.shape[1] == 64 and ids[0, 0] == 7 and judged[0, -1] and not judged[0, 0]
    _, _, judged = Judge(teacher, tokenizer, sae, 1, [0])._encode(["red"], [" fox" * 80])
    assert judged[0].tolist() == [False] + 63 * [True]


def test_mean_activations_count_judged_tokens_only() -> None:
    latents = Latents(
        values=torch.tensor([[[2.0, 1.0], [4.0, 0.0], [8.0, 1.0]]]), indices=torch.tensor([[[0, 1], [0, 2], [1, 2]]])
    )
    activation, active = mean_activations(latents, torch.tensor([[False, True, True]]), 4)
    assert activation.tolist() == [[2.0, 4.0, 0.5, 0.0]]
    assert active.tolist() == [[0.5, 0.5, 0.5, 0.0]]


def test_distinct() -> None:
    assert distinct([1, 1, 2, 1, 1], 1) == 2 / 5
    assert distinct([1, 1, 2, 1, 1], 2) == 3 / 4
    assert distinct([1], 2) == 1.0
