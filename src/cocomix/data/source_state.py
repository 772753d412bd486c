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
"""Files up to this size are hashed completely."""
EDGE_BYTES = 1 << 16
"""Of larger files, this much of the beginning and of the end is hashed."""
NAMED = 3
"""Changed files that are named."""


def record_sources(config: CorpusConfig, folder: Path) -> None:
    """Write size, time of modification and digest of each local file of the corpus to its folder."""
    state = {name: [*_stamp(path), _digest(path)] for name, path in _files(config).items()}
    files.write_json(folder / STATE_FILE, state)


def changed_sources(config: CorpusConfig, folder: Path) -> str | None:
    """Describe how the files of the corpus differ from when `folder` was written; None if they do not.

    None also if a source is gone, or if no state was recorded. Only files with another size or time of modification are
    read; a new time alone, as of a copy, does not count.
    """
    gone = any(source != PYTHON_STDLIB and not Path(source).exists() for source in _sources(config).values())
    if gone or not (folder / STATE_FILE).is_file():
        return None
    before, now = files.read_json(folder / STATE_FILE), _files(config)
    changes = [f"{name} is new" for name in now if name not in before]
    changes += [f"{name} is missing" for name in before if name not in now]
    for name in before.keys() & now.keys():
        *stamp, digest = before[name]
        if stamp != _stamp(now[name]) and digest != _digest(now[name]):
            changes.append(f"{name} is different")
    more = f" and {len(changes) - NAMED} more" if len(changes) > NAMED else ""
    return ", ".join(sorted(changes)[:NAMED]) + more if changes else None


def _sources(config: CorpusConfig) -> dict[str, str]:
    named = {"source": config.source, "validation_source": config.validation_source}
    if config.sources is not None:
        named |= {"source": None, **{f"sources[{i}]": each.source for i, each in enumerate(config.sources)}}
    return {key: source for key, source in named.items() if source is not None and not source.startswith(HUB_PREFIX)}


def _files(config: CorpusConfig) -> dict[str, Path]:
    """Return the regular files of the corpus, by recipe key and name."""
    listed = {key: _listed(source) for key, source in _sources(config).items()}
    return {f"{key}/{file.name}": file.path for key in listed for file in listed[key] if file.path.is_file()}


def _listed(source: str) -> list[SourceFile]:
    if source == PYTHON_STDLIB:
        return source_files(source)
    path = Path(source)
    return walk_files(path, KNOWN_ENDINGS + TOKEN_ENDINGS) if path.is_dir() else [SourceFile(path.name, path)]


def _stamp(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns]


def _digest(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.sha256(
            f"{size} ".encode() + file.read(COMPLETE_BYTES if size <= COMPLETE_BYTES else EDGE_BYTES)
        )
        if size > COMPLETE_BYTES:
            file.seek(-EDGE_BYTES, 2)
            digest.update(file.read())
    return digest.hexdigest()
