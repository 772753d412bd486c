"""The text of single tokens."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from cocomix.data.pieces import token_pieces
from cocomix.data.tokenizer import encode_documents, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sat on the mat"] * 3, 280)  # all but a few letters are single bytes


@pytest.mark.parametrize("text", ["北京", "שלום", "the naïve 🙂 cat", "don\ufffdt", "e\u0301🙂🙂", "the cat"])
def test_a_token_in_a_character_shows_the_whole_character(text: str, tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = encode_documents(tokenizer, [text])
    pieces = token_pieces(tokenizer, ids)
    bytes_of = [len(tokenizer.convert_ids_to_tokens(token)) for token in ids]  # a character of a token is a byte
    ends = [sum(bytes_of[: at + 1]) for at in range(len(ids))]
    for piece, size, end in zip(pieces, bytes_of, ends, strict=True):
        before = text.encode()[: end - size].decode(errors="ignore")
        assert text[len(before) :].startswith(piece)
        assert len(piece.encode()) >= size


def test_what_the_tokens_do_not_finish_stays_a_sign(tokenizer: PreTrainedTokenizerFast) -> None:
    (ids,) = encode_documents(tokenizer, ["a🙂"])
    assert token_pieces(tokenizer, ids[:3]) == ["a", "\ufffd", "\ufffd"]
