"""Blocks and what belongs to each of their tokens, in shards that are whole or absent, made by any number of processes.

    train/, validation/    Arrow shards; column `input_ids` (T,) and those of the maker
    shards/                a record of each shard: checksum and counts (`ShardRecord`)

A block has T tokens.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, load_from_disk
from tqdm.auto import tqdm

from cocomix import files, processes
from cocomix.console import status
from cocomix.data.arrow import quiet
from cocomix.errors import InputError

SPLITS_FILE = "dataset_dict.json"
REPAIR = "run cocomix label with its recipe again, which makes just what is damaged anew"


class Part(NamedTuple):
    """What was made of some consecutive blocks."""

    arrays: dict[str, np.ndarray]
    """(blocks, T, …) of each column beside `input_ids`."""
    counts: dict[str, int]
    """Figures of these blocks; those of a shard are their sums."""


Make = Callable[[str, int, int], Iterator[Part]]
"""Makes the blocks `start` ≤ i < `stop` of a side, in parts."""


@dataclass(frozen=True)
class ShardRecord:
    """Written after a shard: the shard is whole if it has this checksum."""

    sha256: str
    size_in_bytes: int
    blocks: int
    counts: dict[str, int]


@dataclass(frozen=True)
class Shard:
    """One shard of a side, there or not.

    Attributes:
        folder: of the whole dataset.
        side: train or validation.
        index, total: it is shard `index` of `total`, from 0.
    """

    folder: Path
    side: str
    index: int
    total: int

    @property
    def file_name(self) -> str:
        """As `datasets` names shards."""
        return f"data-{self.index:05d}-of-{self.total:05d}.arrow"

    @property
    def path(self) -> Path:
        """The Arrow file."""
        return self.folder / self.side / self.file_name

    @property
    def record_path(self) -> Path:
        """The record of the whole shard."""
        return self.folder / "shards" / f"{self.side}-{self.index:05d}-of-{self.total:05d}.json"

    def record(self) -> ShardRecord | None:
        """The record of a finished shard; None if there is none that can be read."""
        try:
            return ShardRecord(**files.read_json(self.record_path))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def written(self) -> ShardRecord:
        """The record of a shard that is known to be finished."""
        record = self.record()
        assert record is not None, self.record_path
        return record

    def has_its_size(self) -> bool:
        """Whether the shard was finished and has the size that it had then: a look, not a proof."""
        record = self.record()
        return record is not None and self.path.is_file() and self.path.stat().st_size == record.size_in_bytes

    def is_whole(self) -> bool:
        """Whether the shard was finished and every byte is as it was then."""
        if not self.has_its_size():
            return False
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.written().sha256

    def write(self, columns: Features, arrays: Mapping[str, np.ndarray], counts: dict[str, int]) -> None:
        """Write the shard, whole or not at all: an array (blocks, T, …) for each of `columns`.

        The same arrays give the same bytes.
        """
        content = _arrow_bytes(columns, arrays)
        self.record_path.unlink(missing_ok=True)
        files.write_bytes(self.path, memoryview(content))
        blocks = len(arrays["input_ids"])
        record = ShardRecord(hashlib.sha256(content).hexdigest(), len(content), blocks, counts)
        files.write_json(self.record_path, asdict(record))


def shards_of(folder: Path, sides: Mapping[str, int]) -> list[Shard]:
    """The shards of all sides, given the number of each side's."""
    return [Shard(folder, side, index, total) for side, total in sides.items() for index in range(total)]


def make_shards(
    folder: Path,
    blocks: Mapping[str, Dataset],
    columns: Mapping[str, Features],
    make: Make,
    *,
    blocks_per_shard: int,
    what: str,
    remedy: str,
) -> dict[str, list[Shard]]:
    """Make the shards of all sides that are not there, each process its share; whole ones are kept.

    A shard whose bytes are not those that were written is named and made anew. That whole shards were made from
    the same things is the caller's to know, as `stages.Stage` does. `describe` is to be called afterwards.

    Args:
        folder: where to.
        blocks: column `input_ids`, by side.
        columns: of the dataset that is made, by side.
        make: makes the columns beside `input_ids`.
        blocks_per_shard: of all shards but the last of a side.
        what: is made, for the progress bar and messages.
        remedy: what to change where the disk is too small.

    Raises:
        InputError: the disk is too small, or was full; whole shards are kept.
    """
    shards = {
        side: shards_of(folder, {side: -(-len(blocks_of_side) // blocks_per_shard)})
        for side, blocks_of_side in blocks.items()
    }
    if processes.is_first():
        for name in (*blocks, "shards"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    processes.wait_for_all()
    every = [shard for side in shards.values() for shard in side]
    _discard_damaged(processes.share([shard for shard in every if shard.record_path.is_file()]))
    processes.wait_for_all()
    missing = [shard for shard in every if shard.record() is None]
    ranges = {shard: _range(shard, len(blocks[shard.side]), blocks_per_shard) for shard in missing}
    if processes.is_first():
        needed = sum(len(ranges[shard]) * _bytes_per_block(columns[shard.side]) for shard in missing)
        _check_space(folder, needed, what, remedy)
    processes.wait_for_all()  # only now, or one would see what another has just made

    mine = processes.share(missing)
    tokens = sum(len(ranges[shard]) * columns[shard.side]["input_ids"].length for shard in mine)
    with _progress(what, tokens) as progress:
        for done, shard in enumerate(mine):
            start, stop = ranges[shard].start, ranges[shard].stop
            parts = _counted(make(shard.side, start, stop), progress)
            ids = blocks[shard.side].select_columns("input_ids").with_format("numpy")[start:stop]["input_ids"]
            arrays, counts = _joined(parts)
            try:
                shard.write(columns[shard.side], {"input_ids": ids, **arrays}, counts)
            except OSError as error:
                if not files.is_disk_full(error):
                    raise
                raise InputError(
                    f"no space left for {shard.path}; {done} of the {len(mine)} shards that this process had to make "
                    "are finished and kept: free some space and give the same command again"
                ) from None
    processes.wait_for_all()
    return shards


def describe(folder: Path, shards: Mapping[str, list[Shard]], columns: Features) -> None:
    """Describe the whole shards in `folder` for `datasets`: each side, and both as splits."""
    for side, of_side in shards.items():
        kept = folder / side
        with tempfile.TemporaryDirectory() as empty:
            with quiet():
                Dataset.from_dict({name: [] for name in columns}, features=columns).save_to_disk(empty)
            state, info = (files.read_json(Path(empty) / name) for name in ("state.json", "dataset_info.json"))
        state["_data_files"] = [{"filename": shard.file_name} for shard in of_side]
        state["_fingerprint"] = hashlib.sha256(
            "".join(shard.written().sha256 for shard in of_side).encode()
        ).hexdigest()[:16]  # else a random one, and no two makings would be alike
        files.write_json(kept / "state.json", state)
        files.write_json(kept / "dataset_info.json", info)
    files.write_json(folder / SPLITS_FILE, _splits(shards))


def open_shards(folder: Path, sides: Mapping[str, int], what: str) -> dict[str, Dataset]:
    """The sides of what was made in `folder`, given the number of each side's shards; memory-mapped.

    Raises:
        InputError: something of it is missing, cut off or unreadable.
    """
    for shard in shards_of(folder, sides):
        if not shard.has_its_size():
            raise InputError(f"the shard {shard.path} is missing or cut off; {REPAIR}")
    try:
        return {side: load_from_disk(str(folder / side)) for side in sides}
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"the {what} in {folder} cannot be read: {reason}; {REPAIR}") from None


def all_whole(folder: Path, sides: Mapping[str, int]) -> bool:
    """Whether every shard is as it was written, and `datasets` finds the splits."""
    try:
        described = files.read_json(folder / SPLITS_FILE) == _splits(sides)
    except (FileNotFoundError, ValueError):
        return False
    return described and all(shard.is_whole() for shard in shards_of(folder, sides))


def total_counts(shards: list[Shard]) -> Counter[str]:
    """What was counted in these shards, which are whole."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(shard.written().counts)
    return total


def _splits(sides: Mapping[str, object]) -> dict[str, list[str]]:
    return {"splits": list(sides)}


def _discard_damaged(shards: list[Shard]) -> None:
    """Delete the records of those that are no longer what was written, so that they are made anew; names them."""
    for shard in shards:
        if not shard.is_whole():
            status(f"The shard {shard.path} is damaged (its checksum is not the recorded one) and is made anew.")
            shard.record_path.unlink(missing_ok=True)


def _range(shard: Shard, blocks: int, blocks_per_shard: int) -> range:
    """The blocks of a shard."""
    start = shard.index * blocks_per_shard
    return range(start, min(start + blocks_per_shard, blocks))


def _progress(what: str, tokens: int) -> tqdm:
    several = "" if processes.count() == 1 else f", this of {processes.count()} processes"
    return tqdm(
        total=tokens,
        desc=f"{what}{several}",
        unit=" tokens",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not processes.is_first(),
    )


def _counted(parts: Iterator[Part], progress: tqdm) -> Iterator[Part]:
    for part in parts:
        blocks, tokens = next(iter(part.arrays.values())).shape[:2]
        progress.update(blocks * tokens)
        yield part


def _joined(parts: Iterator[Part]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    made = list(parts)
    arrays = {name: np.concatenate([part.arrays[name] for part in made]) for name in made[0].arrays}
    counts: Counter[str] = Counter()
    for part in made:
        counts.update(part.counts)
    return arrays, dict(counts)


def _check_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the {what} need another {needed / 1e9:.3g} GB, {folder} has {free / 1e9:.3g} GB left; free some space, "
            f"{remedy}"
        )


def _item_and_shape(column: List) -> tuple[np.dtype, int]:
    """The type of a column's items and their number in a block."""
    count = column.length
    while isinstance(column.feature, List):
        column = column.feature
        count *= column.length
    return np.dtype(column.feature.dtype), count


def _bytes_per_block(columns: Features) -> int:
    """What a block takes on disk."""
    return sum(item.itemsize * count for item, count in map(_item_and_shape, columns.values()))


def _arrow_bytes(columns: Features, arrays: Mapping[str, np.ndarray]) -> pa.Buffer:
    """All columns as an Arrow stream that `datasets` reads."""
    schema = columns.arrow_schema
    nested = []
    for field in schema:
        array = arrays[field.name]
        values = pa.array(np.ascontiguousarray(array, dtype=_item_and_shape(columns[field.name])[0]).ravel())
        for length in reversed(array.shape[1:]):
            values = pa.FixedSizeListArray.from_arrays(values, length)
        nested.append(values)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(pa.record_batch(nested, schema=schema))
    return sink.getvalue()
