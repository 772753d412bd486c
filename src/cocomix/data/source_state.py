"""Record the state of the files that a corpus was read from, to notice when they change."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cocomix.common import files
from cocomix.data.corpus import CorpusConfig
from cocomix.data.sources import HUB_PREFIX, KNOWN_ENDINGS, PYTHON_STDLIB, SourceFile, source_files, walk_files

STATE_FILE = "sources.json"
TOKEN_ENDINGS = (".bin", ".ds")
COMPLETE_BYTES = 1 << 20
"""Files up to this size are hashed completely; of larger ones, this much of the beginning and of the end."""
NAMED = 3
"""Changed files that are named."""


def source_state(config: CorpusConfig) -> dict[str, str]:
    """Return a digest of each local file of the corpus, by recipe key and name; empty for datasets on the Hub.

    The digest covers a file's size and its first and last mebibyte, but not its time of modification.
    """
    return {
        f"{key}/{file.name}": _digest(file.path)
        for key, source in _sources(config).items()
        for file in _files(source)
        if file.path.is_file()
    }


def record_sources(config: CorpusConfig, folder: Path) -> None:
    """Write the state of the sources to the corpus folder."""
    files.write_json(folder / STATE_FILE, source_state(config))


def changed_sources(config: CorpusConfig, folder: Path) -> str | None:
    """Describe how the files of the corpus differ from when `folder` was written; None if they do not.

    None also if a source is gone, or if no state was recorded.
    """
    gone = any(source != PYTHON_STDLIB and not Path(source).exists() for source in _sources(config).values())
    if gone or not (folder / STATE_FILE).is_file():
        return None
    before, now = files.read_json(folder / STATE_FILE), source_state(config)
    changes = [
        f"{name} is {'new' if name not in before else 'missing' if name not in now else 'different'}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
    return ", ".join(changes[:NAMED]) + more if changes else None


def _sources(config: CorpusConfig) -> dict[str, str]:
    named = {"source": config.source, "validation_source": config.validation_source}
    return {key: source for key, source in named.items() if source is not None and not source.startswith(HUB_PREFIX)}


def _files(source: str) -> list[SourceFile]:
    if source == PYTHON_STDLIB:
        return source_files(source)
    path = Path(source)
    return walk_files(path, KNOWN_ENDINGS + TOKEN_ENDINGS) if path.is_dir() else [SourceFile(path.name, path)]


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(f"{size} ".encode() + file.read(COMPLETE_BYTES))
        if size > COMPLETE_BYTES:
            file.seek(-COMPLETE_BYTES, 2)
            digest.update(file.read())
    return digest.hexdigest()
