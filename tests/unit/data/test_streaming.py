"""Streams of blocks: every document once an epoch, by one process, none that is held out, and an exact position."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from cocomix import InputError
from cocomix.data import packing
from cocomix.data.corpus import CorpusConfig, StreamingConfig, is_held_out, write_documents
from cocomix.data.datatrove import check_token_files, read_token_file
from cocomix.data.packing import load_packed, pack_token_documents
from cocomix.data.streaming import BlockStream, open_stream
from cocomix.data.tokenizer import encode_documents, train_tokenizer

FRACTION = 0.1
FORMS = ["", ".jsonl", ".jsonl.zst", ".parquet", "hf:", "tokens"]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a batch of documents ends in the middle of files and of windows."""
    monkeypatch.setattr(packing, "_BATCH_DOCUMENTS", 7)


def write_tokens(folder: Path, files: list[list[list[int]]], dtype: str = "<u2") -> str:
    """Token files as datatrove 0.10.1 writes them, byte for byte (written here, since it is no dependency)."""
    folder.mkdir()
    for number, documents in enumerate(files):
        path = folder / f"{number:05d}_unshuffled.ds"
        path.write_bytes(np.concatenate([np.array(tokens, dtype) for tokens in documents]).tobytes())
        path.with_name(path.name + ".index").write_bytes(np.cumsum([len(d) for d in documents]).astype("<u8").tobytes())
    return str(folder)


@pytest.fixture
def source(texts: list[str], tokenizer: PreTrainedTokenizerFast, write: Callable[..., str], tmp_path: Path) -> Any:
    """`source(form, files)`: the texts in that form, in so many files."""

    def make(form: str, files: int = 4) -> str:
        folder = tmp_path / f"source{form}".replace(":", "")
        parts = [texts[number::files] for number in range(files)]
        if form == "tokens":
            encoded = [[[*ids, tokenizer.eos_token_id] for ids in encode_documents(tokenizer, part)] for part in parts]
            return write_tokens(folder, encoded)
        folder.mkdir()
        for number, part in enumerate(parts):
            write(part, f"{folder.name}/train-{number}", ".parquet" if form == "hf:" else form)
        return f"hf:{folder}" if form == "hf:" else str(folder)

    return make


@pytest.fixture
def stream(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Callable[..., BlockStream]:
    """`stream(source, rank, processes)`: the stream of one of several processes."""

    def make(source: str, rank: int = 0, processes: int = 1, **options: Any) -> BlockStream:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        excluded = options.pop("excluded", [])
        settings = {"block_size": 8, "seed": 1, **options}
        blocks = settings.pop("shuffle_blocks", 16)
        config = CorpusConfig(
            source,
            validation_source="elsewhere" if excluded else None,
            validation_fraction=FRACTION,
            streaming=StreamingConfig(shuffle_blocks=blocks),
        )
        return open_stream(config, tokenizer, excluded, **settings)

    return make


def taken(stream: BlockStream, count: int) -> list[list[int]]:
    return [block.tolist() for block in islice(stream, count)]


def documents_of(stream: BlockStream, epochs: int, eos: int) -> list[tuple[int, ...]]:
    """The documents that it reads in so many epochs, before they are cut into blocks and shuffled."""
    found: list[tuple[int, ...]] = []
    for position, tokens in stream._encoded(stream._begin):
        if position.epoch == epochs:
            break
        ends = np.flatnonzero(tokens == eos) + 1
        found += [tuple(part.tolist()) for part in np.split(tokens, ends)[:-1]]
    return found


@pytest.fixture
def wanted(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> Counter[tuple[int, ...]]:
    """The training documents' tokens, of text."""
    kept = [text for text in texts if not is_held_out(hashlib.sha256(text.encode()).digest(), FRACTION)]
    assert 0 < len(kept) < len(texts)
    return Counter((*ids, tokenizer.eos_token_id) for ids in encode_documents(tokenizer, kept))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_each_training_document_is_read_once_an_epoch_by_one_process(
    form, processes, source, stream, wanted, texts, tokenizer
):
    """4 files: of two processes each has two of them, of three each a third of the documents of every file."""
    where = source(form)
    shares = [documents_of(stream(where, rank, processes), 2, tokenizer.eos_token_id) for rank in range(processes)]
    found = Counter(document for share in shares for document in share)
    if form == "tokens":
        every = [(*ids, tokenizer.eos_token_id) for ids in encode_documents(tokenizer, texts)]
        wanted = Counter(
            document
            for document in every
            if not is_held_out(hashlib.sha256(np.array(document, "<u4").tobytes()).digest(), FRACTION)
        )
    assert all(len(share) > 60 for share in shares)
    assert found == Counter({document: 2 for document in wanted})


@pytest.mark.parametrize("processes", [1, 2])
def test_blocks_are_the_tokens_of_the_documents_in_windows_of_random_order(processes, source, stream, texts, tokenizer):
    where = source(".jsonl")
    for rank in range(processes):
        tokens = [t for d in documents_of(stream(where, rank, processes), 3, tokenizer.eos_token_id) for t in d]
        expected = np.array(tokens)[: 3 * 16 * 8].reshape(3, 16, 8).tolist()
        windows = np.array(taken(stream(where, rank, processes), 3 * 16)).reshape(3, 16, 8).tolist()
        assert [sorted(window) for window in windows] == [sorted(window) for window in expected]
        assert all(window != wanted for window, wanted in zip(windows, expected, strict=True))


def test_seeds_and_epochs_have_orders_of_their_own(source, stream, tokenizer):
    where, eos = source(".jsonl"), tokenizer.eos_token_id
    orders = [tuple(documents_of(stream(where, seed=seed), 2, eos)) for seed in range(5)]
    assert tuple(documents_of(stream(where, seed=0), 2, eos)) == orders[0]
    assert len(set(orders)) > 2  # there are only 24 orders of four files
    assert any(order[: len(order) // 2] != order[len(order) // 2 :] for order in orders)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("processes", [1, 3])
def test_it_goes_on_at_the_exact_block(form, processes, source, stream):
    """After any number of blocks, within a window and between two, in the first epoch and later, twice over."""
    where, rank, total = source(form), processes - 1, 1600
    whole = taken(stream(where, rank, processes), total)
    for stop in (0, 1, 15, 16, 17, 500, 1400):
        begun = stream(where, rank, processes)
        found = taken(begun, stop)
        for _ in range(2):
            state = json.loads(json.dumps(begun.state_dict()))
            begun = stream(where, rank, processes)
            begun.load_state_dict(state)
            found += taken(begun, 40)
        assert found == whole[: stop + 80]
    assert state["begin"]["epoch"] > 0


def test_a_window_can_be_longer_than_an_epoch(source, stream, texts, tokenizer):
    blocks = taken(stream(source(".jsonl"), shuffle_blocks=3000), 3000)
    counts = Counter(t for block in blocks for t in block)
    assert counts[tokenizer.eos_token_id] > 1.5 * len(texts)


def test_documents_of_a_validation_source_are_left_out(source, stream, texts, tokenizer):
    found = documents_of(stream(source(""), excluded=texts[:50]), 1, tokenizer.eos_token_id)
    expected = {(*ids, tokenizer.eos_token_id) for ids in encode_documents(tokenizer, texts[50:])}
    assert set(found) == expected


def test_blank_and_unreadable_documents_are_left_out(stream, tmp_path, tokenizer):
    folder = tmp_path / "source"
    folder.mkdir()
    for name, content in {"a.txt": b" \n", "b.txt": b"\xff\xfe", "c.txt": b"", "d.txt": b"The cat sat."}.items():
        (folder / name).write_bytes(content)
    found = documents_of(stream(str(folder), excluded=["none"]), 2, tokenizer.eos_token_id)
    assert [tokenizer.decode(document[:-1]) for document in found] == ["The cat sat."] * 2


def test_a_process_without_documents_says_so(stream, write, tmp_path):
    lonely = stream(write(["The cat sat."]), 1, 2, excluded=["none"])
    with pytest.raises(InputError, match=r"no training documents for one of 2 process\(es\): give more documents"):
        next(iter(lonely))


def test_a_record_without_the_field_is_named(stream, tmp_path):
    path = tmp_path / "source.jsonl"
    path.write_text('{"text": "a b"}\n{"content": "c"}\n')
    with pytest.raises(InputError, match="line 2 has no field 'text'"):
        next(iter(stream(str(path))))


# What is stored of it


def test_a_sample_of_either_side_is_stored(texts, write, tmp_path):
    source = write(texts)
    whole = write_documents(CorpusConfig(source, validation_fraction=FRACTION), tmp_path / "whole")
    limits = StreamingConfig(sample_megabytes=0.005, validation_megabytes=0.001)
    sample = write_documents(CorpusConfig(source, validation_fraction=FRACTION, streaming=limits), tmp_path / "sample")
    assert 5_000 <= sample.train_bytes < 5_600 < whole.train_bytes
    assert 1_000 <= sample.validation_bytes < 1_600 < whole.validation_bytes
    own = write_documents(
        CorpusConfig(source, validation_source=write(texts[100:], "own"), streaming=limits), tmp_path / "own"
    )
    assert own.validation_bytes == sum(
        len(text.encode()) for text in {*texts[100:]}
    )  # whole, and none of it trained on
    assert 5_000 <= own.train_bytes < 5_600


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_a_sample_of_token_files_is_packed(dtype, texts, tokenizer, tmp_path):
    every = [[*ids, tokenizer.eos_token_id] for ids in encode_documents(tokenizer, texts)]
    folder = write_tokens(tmp_path / "tokens", [every[:100], every[100:]], dtype)
    check_token_files(folder, tokenizer)
    assert [d.tolist() for d in read_token_file(Path(folder, "00001_unshuffled.ds"))] == every[100:]
    limits = StreamingConfig(sample_megabytes=1, validation_megabytes=1)
    info = pack_token_documents(
        CorpusConfig(folder, validation_fraction=FRACTION, streaming=limits), tokenizer, 8, tmp_path / "all"
    )
    assert info.train_tokens + info.validation_tokens == sum(map(len, every))
    assert 0.05 < info.validation_tokens / info.train_tokens < 0.2
    packed = load_packed(tmp_path / "all")
    validation = tokenizer.decode(np.array(packed.validation["input_ids"]).ravel()).split("<|endoftext|>")
    assert set(validation[:-1]) < set(texts)
    assert info.bytes_per_token == pytest.approx(len("".join(texts).encode()) / sum(map(len, every)), rel=0.05)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda file, index: index.unlink(), "has no 00000_unshuffled.ds.index next to it"),
        (lambda file, index: file.write_bytes(file.read_bytes()[:-2]), "is it damaged or truncated"),
        (lambda file, index: file.write_bytes(b"\xff" * file.stat().st_size), "holds token id 65535"),
        (lambda file, index: file.write_bytes(b"\x05\0" * (file.stat().st_size // 2)), "not with the tokenizer's end"),
        (lambda file, index: index.write_bytes(index.read_bytes()[:-2]), "not 8 per document"),
        (lambda file, index: index.write_bytes(b""), "not 8 per document"),
        (lambda file, index: index.write_bytes(b"\xff" * 8 + index.read_bytes()[8:]), "begins at token 0 and ends"),
        (lambda file, index: (file.unlink(), file.symlink_to("nowhere")), "is not a regular file"),
        (lambda file, index: (index.rename(index.with_name("0_chunk_shuffled.ds.index")),
                              file.rename(file.with_name("0_chunk_shuffled.ds"))), "holds pieces of documents"),
    ],
)  # fmt: skip
def test_token_files_that_cannot_be_used_are_named(spoil, message, source, tokenizer):
    file = Path(source("tokens"), "00000_unshuffled.ds")
    spoil(file, file.with_name(file.name + ".index"))
    with pytest.raises(InputError, match=message):
        check_token_files(str(file.parent), tokenizer)


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RLIMIT_DATA is Linux's")
@pytest.mark.parametrize("form", ["text", "tokens"])
def test_memory_stays_flat_on_a_corpus_ten_times_larger_than_the_limit(form, tmp_path):
    """The limit is on what a process takes up beyond what it has begun with; a file is 1/40 of the corpus."""
    limit, files = 6 << 20, 40
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=40)) for _ in range(60)]
    tokenizer = train_tokenizer([" ".join(words)] * 2, 3000)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    folder = tmp_path / "source"
    texts = [f"{number} " + " ".join(draw.choices(words, k=200)) for number in range(10 * limit // files // 8000)]
    if form == "tokens":
        encoded = [[*ids, tokenizer.eos_token_id] for ids in encode_documents(tokenizer, texts)]
        copies = 10 * limit // files // sum(2 * len(ids) for ids in encoded) + 1
        write_tokens(folder, [encoded * copies])
    else:
        folder.mkdir()
        (folder / "0.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    size = 0
    for file in list(folder.iterdir()):
        stem, _, ending = file.name.partition(".")
        for number in range(1, files):
            os.link(file, folder / f"{stem}-{number}.{ending}")
        size += files * file.stat().st_size
    assert size >= 10 * limit
    script = Path(__file__).with_name("under_a_limit.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(tmp_path / "tokenizer"), str(limit)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1_000_000
