"""Perplexity: every token counted once, from the context that its window leaves it, and bytes as they are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cocomix.common.document import plain_text
from cocomix.common.errors import InputError
from cocomix.data.tokenizer import train_tokenizer
from cocomix.evaluation.perplexity import LossSums, TextLosses, figures, text_losses, windows
from cocomix.reporting.tables import evaluation_tables
from cocomix.training.documents import DocumentLosses

TEXTS = ["The river crosses the stone.", "a", "Ein Löwe öffnet 北京 🙂 — naïve!", "letters and windows " * 6]
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["The river crosses the stone. letters and windows " * 3], 280)


@pytest.fixture
def model(request: pytest.FixtureRequest, random_model, random_teacher) -> PreTrainedModel:
    """A plain or a concept-mixing model for that tokenizer, in float64."""
    backbone = {"vocab_size": 280, "max_position_embeddings": 192}
    if getattr(request, "param", "cocomix") == "plain":
        return random_teacher("gpt2", **backbone)
    return random_model("gpt2", backbone=backbone)


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], **changes) -> TextLosses:
    settings = {"window": 16, "stride": 8, "batch_size": 3, "precision": "fp32", **changes}
    return text_losses(model, tokenizer, texts, **settings)


@torch.no_grad()
def one_at_a_time(model: PreTrainedModel, ids: list[int], context_of: Callable[[int], int]) -> list[float]:
    """The loss of each of the tokens 1 to n, each by a forward pass of its own over its context."""
    losses = []
    for target in range(1, len(ids)):
        context = torch.tensor([ids[target - context_of(target) : target]])
        losses.append(-model(context).logits[0, -1].log_softmax(-1)[ids[target]].item())
    return losses


@pytest.mark.parametrize(("size", "stride"), [(8, 8), (8, 4), (8, 1), (8, 3), (1, 1), (5, 2)])
def test_windows_count_each_prediction_once(size: int, stride: int) -> None:
    for n in range(1, 41):
        found = list(windows(n, size, stride))
        assert [i for w in found for i in range(w.new, w.stop)] == list(range(n))
        assert all(w.stop - w.start == min(n, size) for w in found)
        for w in found:
            for i in range(w.new, w.stop):
                assert i - w.start + 1 >= min(i + 1, size - stride + 1)


@pytest.mark.parametrize("model", ["plain", "cocomix"], indirect=True)
@pytest.mark.parametrize(("window", "stride"), [(128, 64), (8, 8), (8, 3)])
def test_losses_are_those_of_one_token_at_a_time(model, tokenizer, window: int, stride: int) -> None:
    found = measure(model, tokenizer, TEXTS, window=window, stride=stride)
    for number, text in enumerate(TEXTS):
        ids = [tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]
        n = len(ids) - 1

        def context_of(target: int, n: int = n) -> int:
            """By the definition: the first window ends after `window` predictions, the others `stride` later each."""
            end = min(n, window if target <= window else window + -(-(target - window) // stride) * stride)
            return target - max(0, end - window)

        expected = one_at_a_time(model, ids, context_of)
        assert found.documents.tokens[number] == n
        assert found.documents.nll[number] == pytest.approx(sum(expected), rel=1e-5)


def test_every_sum_holds_every_token(model, tokenizer) -> None:
    found = measure(model, tokenizer, TEXTS)
    encoded = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert found.documents.tokens.tolist() == [len(ids) for ids in encoded]
    assert found.document_bytes.tolist() == [len(text.encode()) for text in TEXTS]
    assert found.document_bytes[2] > len(TEXTS[2])
    expected = np.bincount([token for ids in encoded for token in ids], minlength=280)
    assert found.vocabulary.tokens.tolist() == expected.tolist()
    for sums in (found.contexts, found.vocabulary):
        assert sums.tokens.sum() == found.documents.tokens.sum()
        assert sums.nll.sum() == pytest.approx(found.documents.nll.sum())
    assert found.contexts.tokens[0] == len(TEXTS)  # the first token of each, from end-of-text


def test_batches_change_nothing(model, tokenizer) -> None:
    one, many = (measure(model, tokenizer, TEXTS, batch_size=size) for size in (1, 64))
    assert one.documents.nll == pytest.approx(many.documents.nll, rel=1e-6)
    assert one.contexts.nll == pytest.approx(many.contexts.nll, rel=1e-6)
    assert one.fingerprint == many.fingerprint


def test_windows_that_do_not_overlap_are_blocks(model, tokenizer) -> None:
    """Of a document cut into blocks that are read apart, stride = window is what training's validation computes."""
    text = "the stone and the window " * 20
    ids = torch.tensor([tokenizer.eos_token_id, *tokenizer(text)["input_ids"]])
    whole = (len(ids) - 1) // 16 * 16
    text = tokenizer.decode(ids[1 : whole + 1])
    found = measure(model, tokenizer, [text], window=16, stride=16)
    with torch.no_grad():
        logits = model(ids[:whole].view(-1, 16)).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1 : whole + 1], reduction="sum")
    assert found.documents.tokens.tolist() == [whole]
    assert found.documents.nll[0] == pytest.approx(expected.item(), rel=1e-6)


def test_text_that_spells_end_of_text_is_text(model, tokenizer) -> None:
    found = measure(model, tokenizer, [f"a{END}b"])
    assert found.vocabulary.tokens[tokenizer.eos_token_id] == 0
    assert found.document_bytes.tolist() == [2 + len(END)]


@pytest.mark.parametrize("model", ["plain", "cocomix"], indirect=True)
def test_bf16_is_autocast_of_the_same_weights_for_every_model(model, tokenizer) -> None:
    model = model.float()
    text = "letters and stone"
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model(ids[:, :-1]).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    half, full = (measure(model, tokenizer, [text], precision=p).documents.nll[0] for p in ("bf16", "fp32"))
    assert half == pytest.approx(expected, rel=1e-6)
    assert half != full
    assert half == pytest.approx(full, rel=0.1)


def test_no_text_and_no_number(model, tokenizer) -> None:
    with pytest.raises(InputError, match="no text"):
        measure(model, tokenizer, [])
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(InputError, match="is not finite"):
        measure(model, tokenizer, TEXTS)


def test_a_text_that_the_tokens_do_not_give_back(model, tokenizer) -> None:
    assert measure(model, tokenizer, TEXTS).text_changed == 0
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "end": 1, "the": 2, "river": 3}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    lossy = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="end")
    found = measure(model, lossy, ["The river", "the river", "stone!"])
    assert found.text_changed == pytest.approx((1 + 0 + 6) / (9 + 9 + 6))
    evaluation = {"kind": "text", "name": "t.txt", "settings": {"text": "abc", "window": 16, "stride": 8}}
    evaluation |= {"figures": figures(found, np.ones(4)), "settings": {**evaluation["settings"], "precision": "fp32"}}
    tables = "\n".join(map(plain_text, evaluation_tables({"mine": [evaluation]})))
    assert "mine: Decoding the tokens does not restore 29.17% of the characters of t.txt. Its bits per byte" in tables
    letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"end": 0, "a": 1}, [])), eos_token="end")
    with pytest.raises(InputError, match="the tokenizer produces no tokens"):
        measure(model, letters, ["stone"])


def sums(nll: list[float], tokens: list[int]) -> LossSums:
    return LossSums(np.array(nll), np.array(tokens))


def test_figures() -> None:
    losses = TextLosses(
        DocumentLosses(np.array([6.0, 24.0]), np.array([4, 8])),
        np.array([10, 50]),
        sums([3, 2, 4, 6, 5, 10], [2, 1, 2, 2, 2, 3]),
        sums([10, 0, 5, 15], [2, 0, 2, 8]),
        "abc",
        0.25,
    )
    found = figures(losses, np.array([0, 3, 1, 999_996]))
    assert (found["documents"], found["tokens"], found["bytes"]) == (2, 12, 60)
    assert found["loss"] == pytest.approx(30 / 12)
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    assert found["bits_per_byte"] == pytest.approx(30 / math.log(2) / 60)
    assert found["text_changed"] == 0.25
    buckets = [(b["from"], b["to"], b["tokens"], b["loss"]) for b in found["by_context"]]
    assert buckets == [(1, 1, 2, 1.5), (2, 2, 1, 2.0), (3, 4, 4, 2.5), (5, 6, 5, 3.0)]
    buckets = [(b["from"], b["to"], b["tokens"], b["loss"]) for b in found["by_frequency"]]
    assert buckets == [(0, 0, 2, 5.0), (1, 10, 2, 2.5), (10000, None, 8, 1.875)]


@pytest.mark.parametrize("count", [60, 1000])
def test_the_interval_is_that_of_a_mean_over_documents(count: int) -> None:
    """Against the standard error of a ratio of sums, long documents weighing more."""
    draw = np.random.default_rng(0)
    tokens = draw.integers(20, 200, count)
    nll = tokens * (3 + 0.5 * draw.standard_normal(count))
    losses = TextLosses(DocumentLosses(nll, tokens), 4 * tokens, sums([1], [1]), sums([1], [1]), "", 0.0)
    found = figures(losses, np.ones(1))
    error = math.sqrt(((nll - found["loss"] * tokens) ** 2).sum()) / tokens.sum()
    expected = (found["loss"] - 1.96 * error, found["loss"] + 1.96 * error)
    assert found["loss_interval"] == pytest.approx(expected, abs=0.3 * error)
    assert found["loss_interval"][0] < 3 < found["loss_interval"][1]


def test_few_documents_have_no_interval() -> None:
    nll, tokens = np.arange(5.0), np.full(5, 4)
    losses = TextLosses(DocumentLosses(nll, tokens), 4 * tokens, sums([6], [4]), sums([6], [4]), "", 0.0)
    found = figures(losses, np.ones(1))
    assert found["loss_interval"] is found["perplexity_interval"] is found["bits_per_byte_interval"] is None
