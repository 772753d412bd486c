"""Text that changes after the corpus was written is noticed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cocomix.common.errors import InputError
from cocomix.data import source_state
from cocomix.data.corpus import CorpusConfig, StreamingConfig
from cocomix.data.source_state import changed_sources, record_sources
from cocomix.pipeline.run import _notice_changed_text

CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "content": (lambda text: (text / "a.txt").write_text("two"), "source/a.txt is different"),
    "end of a large file": (
        lambda text: (text / "deep" / "b.jsonl").write_text("x" * 30 + "y"),
        "source/deep/b.jsonl is different",
    ),
    "new": (lambda text: (text / "c.md").touch(), "source/c.md is new"),
    "missing": (lambda text: (text / "deep" / "b.jsonl").unlink(), "source/deep/b.jsonl is missing"),
    "other files": (lambda text: (text / "notes.pdf").touch(), ""),
    "time": (lambda text: os.utime(text / "a.txt", ns=(1, 1)), ""),
}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(source_state, "COMPLETE_BYTES", 8)
    monkeypatch.setattr(source_state, "EDGE_BYTES", 8)
    folder = tmp_path / "text"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "deep" / "b.jsonl").write_text("x" * 31)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(text: Path, tmp_path: Path, change: str) -> None:
    config = CorpusConfig(source=str(text), validation_source=str(text / "a.txt"))
    assert changed_sources(config, tmp_path) is None  # of a version that recorded nothing
    record_sources(config, tmp_path)
    act, expected = CHANGES[change]
    act(text)
    for file in filter(Path.is_file, text.rglob("*")):  # so that no clock is too coarse
        os.utime(file, ns=(2, 2))
    found = changed_sources(config, tmp_path) or ""
    assert (expected in found and bool(found) == bool(expected)) or (change == "missing" and not found)


def test_a_stored_corpus_warns_and_a_streamed_one_is_refused(text: Path, tmp_path: Path, capsys) -> None:
    config = CorpusConfig(source=str(text))
    stage = SimpleNamespace(folder=tmp_path, is_done=lambda: True)
    pipeline: Any = SimpleNamespace(recipe=SimpleNamespace(corpus=config), corpus_stage=stage)
    record_sources(config, tmp_path)
    (text / "a.txt").write_text("two")
    _notice_changed_text(pipeline, [])
    assert "has changed since" in capsys.readouterr().err
    config.streaming = StreamingConfig()
    with pytest.raises(InputError, match=r"has changed since .*: source/a\.txt is different; restore it"):
        _notice_changed_text(pipeline, [stage])
