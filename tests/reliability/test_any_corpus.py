"""Any file in a corpus is read, skipped and counted, or refused in one line."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocomix.common.errors import InputError
from cocomix.data import sources
from cocomix.data.corpus import CorpusConfig, write_documents
from property_cases import CASES, DAMAGE, Cases, damaged

PLAIN = {f"{index}.txt": f"A plain document, number {index}.".encode() for index in range(8)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
LINES = st.one_of(
    JSON.map(json.dumps).map(str.encode),
    st.text(max_size=20).map(lambda text: json.dumps({"text": text}).encode()),
    st.sampled_from(
        [b"", b"{", b'{"text": "\\ud800"}', b'{"text": 1e999}', b"[" * 9999, b'{"text": "a", "text": "b"}']
    ),
    st.binary(max_size=20),
)
RECORDS = st.lists(LINES, max_size=5).map(b"\n".join)


def as_parquet(rows: list[Any]) -> bytes:
    written = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), written)
    return written.getvalue()


TABLES = st.one_of(
    st.lists(st.none() | st.text(max_size=9), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.lists(st.binary(max_size=9), min_size=1, max_size=4),
).map(as_parquet)
FILES = st.one_of(
    st.tuples(st.sampled_from(["a.txt", "a.md", "a.py"]), st.binary(max_size=60)),
    st.tuples(st.just("a.txt"), st.text(max_size=60).map(lambda text: text.encode("utf-16"))),
    st.tuples(st.just("a.jsonl"), RECORDS),
    st.tuples(st.just("a.jsonl.gz"), st.builds(lambda text, how: damaged(gzip.compress(text), *how), RECORDS, DAMAGE)),
    st.tuples(st.just("a.jsonl.zst"), st.binary(max_size=60)),
    st.tuples(st.just("a.parquet"), st.builds(lambda table, how: damaged(table, *how), TABLES, DAMAGE)),
)


@pytest.mark.parametrize("cases", CASES)
def test_any_file(cases: Cases, tmp_path: Path) -> None:
    source, folder = tmp_path / "text", tmp_path / "out"

    @cases.settings
    @given(FILES)
    def check(file: tuple[str, bytes]) -> None:
        for used in (source, folder):
            shutil.rmtree(used, ignore_errors=True)
            used.mkdir()
        for name, content in [*PLAIN.items(), file]:
            (source / name).write_bytes(content)
        try:
            found = write_documents(CorpusConfig(source=str(source), validation_fraction=0.3), folder)
        except InputError as error:
            assert len(str(error).splitlines()) == 1 and file[0] in str(error)
            return
        documents = found.train_documents + found.validation_documents
        assert documents >= len(PLAIN) and len(found.unreadable_examples) <= found.unreadable_files

    check()


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz"])
def test_a_document_without_end_is_refused_before_it_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an archive of a few megabytes that expands to gigabytes."""
    limit = 1 << 16
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", limit)
    content = b" " * (1 << 25)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"{name}.* is larger than \d+ MiB, too large for one document"):
        write_documents(CorpusConfig(source=str(tmp_path)), tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23
