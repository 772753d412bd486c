"""A small corpus in every form that the program reads."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from cocomix.data.tokenizer import train_tokenizer

Writer = Callable[[Path, Sequence[str]], None]


def _jsonl(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def _write_text_files(path: Path, texts: Sequence[str]) -> None:
    path.mkdir()
    for number, text in enumerate(texts):
        (path / f"{number:05d}.txt").write_bytes(text.encode())


def _write_parquet(path: Path, texts: Sequence[str]) -> None:
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": list(texts)}), path, row_group_size=7)


# Ending of the source -> how to write documents in that form; "" is a folder of text files.
FORMATS: dict[str, Writer] = {
    "": _write_text_files,
    ".jsonl": lambda path, texts: path.write_bytes(_jsonl(texts)) and None,
    ".jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(_jsonl(texts))) and None,
    ".jsonl.zst": lambda path, texts: path.write_bytes(pa.compress(_jsonl(texts), codec="zstd", asbytes=True)) and None,
    ".parquet": _write_parquet,
}


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """300 distinct documents of a few sentences, with line ends and letters of several scripts."""
    rng = random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "while", "rain", "fell", "naïve", "Ωmega", "北京", "🙂"]
    return [f"Document {number}.\r\n" + " ".join(rng.choices(words, k=rng.randint(5, 60))) for number in range(300)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    """`write(texts, name, ending)` -> the source that holds those documents in that form."""

    def write(texts: Sequence[str], name: str = "corpus", ending: str = ".jsonl") -> str:
        path = tmp_path / (name + ending)
        FORMATS[ending](path, texts)
        return str(path)

    return write


@pytest.fixture(scope="session")
def tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    return train_tokenizer(texts, 320)
