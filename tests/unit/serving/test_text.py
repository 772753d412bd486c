"""Text that grows token by token."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cocomix.serving.text import GrowingText

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte."""
    backend = Tokenizer(models.BPE({byte: number for number, byte in enumerate(BYTES)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def grown(tokenizer: PreTrainedTokenizerFast, text: str, *stops: str) -> tuple[list[str], str]:
    """Return the text after each token until the end, and the held back rest."""
    growing, parts = GrowingText(tokenizer, [], stops), []
    for token in tokenizer(text)["input_ids"]:
        parts.append(growing.add(token))
        if growing.stopped:
            break
    return parts, growing.end()


def test_characters_of_several_tokens_arrive_complete(tokenizer):
    assert grown(tokenizer, "né🙂!") == (["n", "", "é", "", "", "", "🙂", "!"], "")


def test_a_stop_string_and_what_may_become_one_is_held_back(tokenizer):
    assert grown(tokenizer, "abcabdz", "abd") == (["", "", "abc", "", "", ""], "")
    assert grown(tokenizer, "aab", "aac") == (["", "", "aab"], "")
    assert grown(tokenizer, "xab", "abc") == (["x", "", ""], "ab")


def test_the_stop_string_that_begins_first_counts(tokenizer):
    assert grown(tokenizer, "one.two;", "wo", ".two", "e.tw!") == (["o", "n", "", "", "", "", "e"], "")


def test_a_space_before_the_first_word_is_kept():
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert GrowingText(tokenizer, [0]).add(1) == " b"
