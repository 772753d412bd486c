from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, List, Value, load_from_disk
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast

from cocomix.common.errors import InputError
from cocomix.data.corpus import CorpusConfig, write_documents
from cocomix.data.packing import PackedInfo, load_packed, pack_documents, pack_token_files
from cocomix.data.tokenizer import encode_documents, tokenizer_fingerprint, train_tokenizer

BLOCK_SIZE = 16


@pytest.fixture
def documents(texts: list[str], write: Callable[..., str], tmp_path: Path) -> Path:
    write_documents(CorpusConfig(write(texts), validation_fraction=0.2), tmp_path / "documents")
    return tmp_path / "documents"


def texts_of(documents: Path, side: str) -> list[str]:
    return list(load_from_disk(str(documents / side))["text"])


def tokens_of(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[int]:
    """All documents end to end, written the plain way."""
    return [*chain.from_iterable([*tokens, tokenizer.eos_token_id] for tokens in encode_documents(tokenizer, texts))]


def blocks(dataset: Dataset) -> np.ndarray:
    return np.array(dataset["input_ids"][:])


def write_token_files(folder: Path, train: list[int], validation: list[int]) -> Path:
    folder.mkdir()
    np.array(train, "<u2").tofile(folder / "train.bin")
    np.array(validation, "<u2").tofile(folder / "val.bin")
    return folder


def test_blocks_are_the_documents_end_to_end(
    documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    info = pack_documents(documents, tokenizer, BLOCK_SIZE, tmp_path / "packed")
    packed = load_packed(tmp_path / "packed")
    train = tokens_of(tokenizer, texts_of(documents, "train"))
    validation = tokens_of(tokenizer, texts_of(documents, "validation"))
    for tokens, dataset in ((train, packed.train), (validation, packed.validation)):
        found = blocks(dataset)
        assert found.shape == (len(tokens) // BLOCK_SIZE, BLOCK_SIZE)
        assert found.ravel().tolist() == tokens[: found.size]

    assert packed.info == info
    assert (info.block_size, info.vocab_size) == (BLOCK_SIZE, 320)
    assert (info.train_tokens, info.validation_tokens) == (len(train), len(validation))
    assert (info.train_blocks, info.validation_blocks) == (len(packed.train), len(packed.validation))
    assert info.train_dropped_tokens == len(train) % BLOCK_SIZE
    assert info.validation_dropped_tokens == len(validation) % BLOCK_SIZE
    text_bytes = sum(len(text.encode()) for text in texts_of(documents, "validation"))
    assert info.bytes_per_token == pytest.approx(text_bytes / len(validation))
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert json.loads((tmp_path / "packed" / "corpus.json").read_text()) == asdict(info)


@pytest.mark.parametrize("name", ["_BATCH_DOCUMENTS", "_BATCH_CHARACTERS"])
@pytest.mark.parametrize("limit", [1, 3, 100])
def test_the_size_of_batches_changes_nothing(
    name: str,
    limit: int,
    documents: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # 128 tokens are more than most documents have, so that blocks span batches.
    expected = pack_documents(documents, tokenizer, 128, tmp_path / "a")
    monkeypatch.setattr(f"cocomix.data.packing.{name}", limit)
    assert pack_documents(documents, tokenizer, 128, tmp_path / "b") == expected
    assert np.array_equal(blocks(load_packed(tmp_path / "b").train), blocks(load_packed(tmp_path / "a").train))


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")]
)
def test_the_smallest_type_that_fits_the_vocabulary(
    vocab_size: int,
    dtype: str,
    documents: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cocomix.data.packing.vocabulary_size", lambda _: vocab_size)
    largest = vocab_size - 1
    monkeypatch.setattr("cocomix.data.packing.encode_documents", lambda _, texts: [[largest] * 8] * len(texts))
    pack_documents(documents, tokenizer, 9, tmp_path / "packed")
    packed = load_packed(tmp_path / "packed")
    assert packed.train.features == {"input_ids": List(Value(dtype), length=9)}
    assert blocks(packed.train)[:2].tolist() == [[largest] * 8 + [0]] * 2


def test_slices_come_as_arrays(documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pack_documents(documents, tokenizer, BLOCK_SIZE, tmp_path / "packed")
    train = load_packed(tmp_path / "packed").train
    expected = blocks(train)[3:9]
    as_numpy = train.with_format("numpy")[3:9]["input_ids"]
    assert as_numpy.shape == (6, BLOCK_SIZE)
    assert np.array_equal(as_numpy, expected)
    as_torch = train.with_format("torch")[3:9]["input_ids"]
    assert as_torch.dtype == torch.int64
    assert np.array_equal(as_torch.numpy(), expected)


def test_token_files_equal_packed_documents(
    documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_text = pack_documents(documents, tokenizer, BLOCK_SIZE, tmp_path / "a")
    assert of_text.text_changed == 0
    expected = replace(of_text, text_changed=None)
    sides = [tokens_of(tokenizer, texts_of(documents, side)) for side in ("train", "validation")]
    source = write_token_files(tmp_path / "bin", *sides)
    assert pack_token_files(source, tokenizer, BLOCK_SIZE, tmp_path / "b") == expected
    monkeypatch.setattr("cocomix.data.packing._FILE_TOKENS", 37)
    assert pack_token_files(source, tokenizer, BLOCK_SIZE, tmp_path / "c") == expected
    for name in ("b", "c"):
        packed, wanted = load_packed(tmp_path / name), load_packed(tmp_path / "a")
        assert np.array_equal(blocks(packed.train), blocks(wanted.train))
        assert np.array_equal(blocks(packed.validation), blocks(wanted.validation))


def test_a_tokenizer_that_changes_the_text_is_reported(
    documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lower = copy.deepcopy(tokenizer)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    info = pack_documents(documents, lower, BLOCK_SIZE, tmp_path / "packed")
    text = "".join(texts_of(documents, "validation"))
    capitals = sum(character != character.lower() for character in text)
    assert info.text_changed == pytest.approx(capitals / len(text))
    assert "of the characters of the validation text. Its bits per byte" in capsys.readouterr().err
    assert load_packed(tmp_path / "packed").info == info


def test_bytes_per_token_of_a_file_without_end_of_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tokens,) = encode_documents(tokenizer, ["Naïve 🙂 rain fell"])
    source = write_token_files(tmp_path / "bin", tokens, tokens)
    info = pack_token_files(source, tokenizer, 2, tmp_path / "packed")
    assert info.bytes_per_token == pytest.approx(len("Naïve 🙂 rain fell".encode()) / len(tokens))


def test_the_fingerprint_depends_on_blocks_only(
    documents: Path, tokenizer: PreTrainedTokenizerFast, texts: list[str], tmp_path: Path
) -> None:
    def pack(name: str, block_size: int = 8, tokenizer: PreTrainedTokenizerFast = tokenizer) -> PackedInfo:
        return pack_documents(documents, tokenizer, block_size, tmp_path / name)

    base = pack("a")
    assert pack("b") == base
    assert pack("c", block_size=16).fingerprint != base.fingerprint
    other = pack("d", tokenizer=train_tokenizer(texts, 300))
    assert other.fingerprint != base.fingerprint
    assert other.tokenizer_fingerprint != base.tokenizer_fingerprint


def test_too_little_text_for_one_block_is_refused(
    documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    tokens = len(tokens_of(tokenizer, texts_of(documents, "validation")))
    assert pack_documents(documents, tokenizer, tokens, tmp_path / "just").validation_blocks == 1
    with pytest.raises(InputError, match=rf"validation.* {tokens} tokens.*block of {tokens + 1}:.*lower block_size"):
        pack_documents(documents, tokenizer, tokens + 1, tmp_path / "packed")
    with pytest.raises(InputError, match=r"train split.*block of 1000000:"):
        pack_documents(documents, tokenizer, 1_000_000, tmp_path / "packed")
    with pytest.raises(InputError, match="not a packed corpus"):
        load_packed(tmp_path / "packed")
    with pytest.raises(InputError, match="block_size is 1: give at least 2"):
        pack_documents(documents, tokenizer, 1, tmp_path / "packed")


def test_token_files_of_the_wrong_form_are_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write_token_files(tmp_path / "bin", [1, 2, 3, 4], [1, 2, 320, 319])

    def assert_refused(*words: str) -> None:
        with pytest.raises(InputError) as caught:
            pack_token_files(source, tokenizer, 2, tmp_path / "packed")
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in words), caught.value

    assert_refused("val.bin", "token id 320", "below 320", "the tokenizer that the file was written with")
    (source / "val.bin").write_bytes(b"\1\0\2")
    assert_refused("val.bin", "3 bytes", "16-bit", "even")
    (source / "val.bin").write_bytes(b"")
    assert_refused("val.bin", "0 bytes", "16-bit")
    (source / "val.bin").unlink()
    assert_refused("val.bin", "there is no token file")


@pytest.mark.parametrize("kind", ["<u4", "<i8", ".npy", "llm.c"])
def test_token_files_of_another_form_are_refused(kind: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    source = write_token_files(tmp_path / "bin", [1, 2, 3, 4] * 300, [1, 2, 3, 4])
    ids = np.array([5, 0, 7, 319, 1])
    with (source / "train.bin").open("wb") as file:
        if kind == ".npy":
            np.save(file, ids.astype("<u2"))
        elif kind == "llm.c":
            np.array([20240520, 1, len(ids), *[0] * 253], "<i4").tofile(file)
            ids.astype("<u2").tofile(file)
        else:
            ids.astype(kind).tofile(file)
    words = {"<u4": "32 or 64 bits", "<i8": "32 or 64 bits", ".npy": "a NumPy array", "llm.c": "llm.c's token files"}
    with pytest.raises(InputError, match=rf"train.bin.*{words[kind]}.*uint16"):
        pack_token_files(source, tokenizer, 2, tmp_path / "packed")


def test_ids_that_16_bits_cannot_hold_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_token_files(tmp_path / "bin", [1, 2, 3, 4], [1, 2, 3, 4])
    monkeypatch.setattr("cocomix.data.packing.vocabulary_size", lambda _: 65537)
    with pytest.raises(InputError, match="16-bit token ids, but the tokenizer's ids go up to 65536"):
        pack_token_files(source, tokenizer, 2, tmp_path / "packed")


def test_a_folder_that_is_no_whole_packed_corpus_is_refused(
    documents: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def assert_refused(folder: Path, *words: str) -> None:
        with pytest.raises(InputError) as caught:
            load_packed(folder)
        assert "\n" not in str(caught.value)
        assert all(word in str(caught.value) for word in (str(folder), *words)), caught.value

    assert_refused(tmp_path / "missing", "not a packed corpus", "corpus.json")
    assert_refused(documents, "not a packed corpus", "corpus.json")
    packed = tmp_path / "packed"
    info = pack_documents(documents, tokenizer, BLOCK_SIZE, packed)
    (packed / "corpus.json").write_text(json.dumps({**asdict(info), "train_blocks": 1}))
    assert_refused(packed, f"{info.train_blocks} train", "states 1", "pack it again")
    (packed / "corpus.json").write_text(json.dumps({"block_size": 8}))
    assert_refused(packed, "not a packed corpus")
    (packed / "corpus.json").write_text("[1]")
    assert_refused(packed, "not a packed corpus")
    (packed / "corpus.json").write_text(json.dumps(asdict(info)))
    assert load_packed(packed).info == info
    (packed / "validation" / "state.json").unlink()
    assert_refused(packed, "not a packed corpus")
