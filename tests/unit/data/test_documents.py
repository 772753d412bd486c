from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from transformers import PreTrainedTokenizerFast

from cocomix.data.corpus import CorpusConfig, write_documents
from cocomix.data.documents import DocumentTokens, load_documents
from cocomix.data.packing import load_packed, pack_documents, pack_token_files
from cocomix.data.tokenizer import encode_documents

BLOCK_SIZE = 16


@pytest.fixture
def packed(texts: list[str], write: Callable[..., str], tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A packed corpus with its documents beside it."""
    write_documents(CorpusConfig(write(texts), validation_fraction=0.2), tmp_path / "packed" / "documents")
    pack_documents(tmp_path / "packed" / "documents", tokenizer, BLOCK_SIZE, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("side", ["train", "validation"])
def test_each_token_has_the_document_that_it_was_packed_from(
    side: str, packed: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    documents = load_documents(packed, side)
    assert documents is not None
    written = load_from_disk(str(packed / "documents" / side))
    assert len(documents) == len(written)
    numbers, tokens = [], []
    for number, text in enumerate(written["text"]):
        ids = [*encode_documents(tokenizer, [text])[0], tokenizer.eos_token_id]
        numbers += [number] * len(ids)
        tokens += ids
    assert documents.number_of(np.arange(len(tokens))).tolist() == numbers
    assert documents.ends[-1] == len(tokens)

    blocks = np.array(getattr(load_packed(packed), side)["input_ids"][:])
    assert blocks.ravel().tolist() == tokens[: blocks.size]  # so p is token p % B of block p // B
    assert documents.texts(0, len(documents)) == list(written["text"])
    assert documents.texts(3, 5) == list(written["text"])[3:5]
    assert [documents.source(number) for number in range(len(documents))] == list(written["source"])
    assert documents.source(documents.number_of(np.array([40]))[0]) == written["source"][numbers[40]]


@pytest.mark.parametrize("limit", [1, 3])
def test_the_size_of_batches_changes_no_document(
    limit: int, packed: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cocomix.data.packing._BATCH_DOCUMENTS", limit)
    again = tmp_path / "again"
    (again / "documents").parent.mkdir()
    (again / "documents").symlink_to(packed / "documents")
    pack_documents(again / "documents", tokenizer, BLOCK_SIZE, again)
    found, expected = load_documents(again, "train"), load_documents(packed, "train")
    assert found is not None
    assert expected is not None
    assert found.ends.tolist() == expected.ends.tolist()


def test_a_document_ends_with_its_end_of_text() -> None:
    # Of an empty document only end-of-text is left.
    documents = DocumentTokens(
        Dataset.from_dict({"text": ["ab", "", "c"], "source": ["x", "y", "z"]}), np.array([3, 1, 2])
    )
    assert documents.ends.dtype == np.int64
    assert documents.ends.tolist() == [3, 4, 6]
    assert documents.number_of(np.array([[0, 2, 3], [4, 5, 1]])).tolist() == [[0, 0, 1], [2, 2, 0]]
    assert documents.texts(1, 3) == ["", "c"]
    assert documents.texts(1, 1) == []
    assert [documents.source(number) for number in np.array([2, 0])] == ["z", "x"]


def test_positions_do_not_overflow() -> None:
    lengths = np.full(3, 2**31 - 1, dtype=np.int32)
    documents = DocumentTokens(Dataset.from_dict({"text": ["", "", ""], "source": ["", "", ""]}), lengths)
    assert documents.number_of(np.array([3 * (2**31 - 1) - 1])).tolist() == [2]


def test_token_files_have_no_documents(tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path) -> None:
    tokens = np.array([*chain.from_iterable(encode_documents(tokenizer, texts[:5]))], "<u2")
    source = tmp_path / "tokens"
    source.mkdir()
    for name in ("train.bin", "val.bin"):
        tokens.tofile(source / name)
    pack_token_files(source, tokenizer, BLOCK_SIZE, tmp_path / "packed")
    assert load_documents(tmp_path / "packed", "train") is None
    assert load_documents(tmp_path / "packed", "validation") is None
