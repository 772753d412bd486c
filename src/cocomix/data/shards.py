"""Store blocks with data for each token in atomic shards, written by any number of processes.

    train/, validation/    Arrow shards with `input_ids` (T,) and the columns of `compute`
    shards/                a record per shard: checksum and counts (`ShardRecord`)

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
from datasets import Dataset, Features, List

from cocomix.common import distributed, files
from cocomix.common.console import ProgressBar, progress_bar, status
from cocomix.common.errors import InputError
from cocomix.data.arrow import open_dataset, quiet

SPLITS_FILE = "dataset_dict.json"
REPAIR = "run cocomix label RECIPE, which recomputes damaged shards only"


class Part(NamedTuple):
    """Results for consecutive blocks."""

    arrays: dict[str, np.ndarray]
    """(blocks, T, …) for each column other than `input_ids`."""
    counts: dict[str, int]
    """Counts over these blocks; they are summed per shard."""


Compute = Callable[[str, int, int], Iterator[Part]]
"""Computes the blocks `start` ≤ i < `stop` of a split, in parts."""


@dataclass(frozen=True)
class ShardRecord:
    """Written after a shard; the shard is intact if it has this checksum."""

    sha256: str
    size_in_bytes: int
    blocks: int
    counts: dict[str, int]


@dataclass(frozen=True)
class Shard:
    """A shard of a split, which may not exist yet.

    Attributes:
        folder: folder of the dataset.
        side: train or validation.
        index, total: this is shard `index` (from 0) of `total`.
    """

    folder: Path
    side: str
    index: int
    total: int

    @property
    def file_name(self) -> str:
        """File name in the convention of `datasets`."""
        return f"data-{self.index:05d}-of-{self.total:05d}.arrow"

    @property
    def path(self) -> Path:
        """The Arrow file."""
        return self.folder / self.side / self.file_name

    @property
    def record_path(self) -> Path:
        """The file of the shard's record."""
        return self.folder / "shards" / f"{self.side}-{self.index:05d}-of-{self.total:05d}.json"

    def record(self) -> ShardRecord | None:
        """Read the record; None if it is missing or unreadable."""
        try:
            return ShardRecord(**files.read_json(self.record_path))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def written(self) -> ShardRecord:
        """Read the record of a shard that is known to be finished."""
        record = self.record()
        assert record is not None, self.record_path
        return record

    def has_its_size(self) -> bool:
        """Check quickly whether the shard was finished and has its recorded size."""
        record = self.record()
        return record is not None and self.path.is_file() and self.path.stat().st_size == record.size_in_bytes

    def is_whole(self) -> bool:
        """Check whether the shard was finished and has its recorded checksum."""
        if not self.has_its_size():
            return False
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == self.written().sha256

    def write(self, columns: Features, arrays: Mapping[str, np.ndarray], counts: dict[str, int]) -> None:
        """Write the shard atomically, with an array (blocks, T, …) for each of `columns`.

        Equal arrays give identical bytes.
        """
        content = _arrow_bytes(columns, arrays)
        self.record_path.unlink(missing_ok=True)
        files.write_bytes(self.path, memoryview(content))
        blocks = len(arrays["input_ids"])
        record = ShardRecord(hashlib.sha256(content).hexdigest(), len(content), blocks, counts)
        files.write_json(self.record_path, asdict(record))


def shards_of(folder: Path, sides: Mapping[str, int]) -> list[Shard]:
    """List the shards of all splits, given the number of shards of each split."""
    return [Shard(folder, side, index, total) for side, total in sides.items() for index in range(total)]


def write_shards(
    folder: Path,
    blocks: Mapping[str, Dataset],
    columns: Mapping[str, Features],
    compute: Compute,
    *,
    blocks_per_shard: int,
    what: str,
    remedy: str,
) -> dict[str, list[Shard]]:
    """Write the missing shards of all splits. Every rank must call this; the ranks share the work.

    Intact shards are kept; damaged ones are reported and recomputed. The caller must ensure that existing shards were
    computed from the same inputs, as `stages.Stage` does, and call `describe` afterwards.

    Args:
        folder: destination.
        blocks: blocks with the column `input_ids`, by split.
        columns: columns of the resulting dataset, by split.
        compute: computes the columns other than `input_ids`.
        blocks_per_shard: number of blocks of all shards but the last of a split.
        what: name of the result, for the progress bar and messages.
        remedy: what to change if the disk is too small.

    Raises:
        InputError: the disk has too little space; finished shards are kept.
    """
    shards = {
        side: shards_of(folder, {side: -(-len(blocks_of_side) // blocks_per_shard)})
        for side, blocks_of_side in blocks.items()
    }
    if distributed.is_main_process():
        for name in (*blocks, "shards"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    every = [shard for side in shards.values() for shard in side]
    _discard_damaged(distributed.shard([shard for shard in every if shard.record_path.is_file()]))
    distributed.barrier()
    missing = [shard for shard in every if shard.record() is None]
    ranges = {shard: _range(shard, len(blocks[shard.side]), blocks_per_shard) for shard in missing}
    if distributed.is_main_process():
        needed = sum(len(ranges[shard]) * _bytes_per_block(columns[shard.side]) for shard in missing)
        _check_space(folder, needed, what, remedy)
    distributed.barrier()  # otherwise a rank would see shards that another has just written

    mine = distributed.shard(missing)
    tokens = sum(len(ranges[shard]) * columns[shard.side]["input_ids"].length for shard in mine)
    with _progress(what, tokens) as progress:
        for done, shard in enumerate(mine):
            start, stop = ranges[shard].start, ranges[shard].stop
            parts = _counted(compute(shard.side, start, stop), progress)
            ids = blocks[shard.side].select_columns("input_ids").with_format("numpy")[start:stop]["input_ids"]
            arrays, counts = _joined(parts)
            try:
                shard.write(columns[shard.side], {"input_ids": ids, **arrays}, counts)
            except OSError as error:
                if not files.is_disk_full(error):
                    raise
                raise InputError(
                    f"no space left for {shard.path}; {done} of the {len(mine)} shards of this process are finished "
                    "and kept: free some space and run the same command again"
                ) from None
    distributed.barrier()
    return shards


def describe(folder: Path, shards: Mapping[str, list[Shard]], columns: Features) -> None:
    """Write the metadata that `datasets` needs to open the shards in `folder`, as splits of one dataset."""
    for side, side_shards in shards.items():
        with tempfile.TemporaryDirectory() as empty:
            with quiet():
                Dataset.from_dict({name: [] for name in columns}, features=columns).save_to_disk(empty)
            state, info = (files.read_json(Path(empty) / name) for name in ("state.json", "dataset_info.json"))
        state["_data_files"] = [{"filename": shard.file_name} for shard in side_shards]
        state["_fingerprint"] = hashlib.sha256(
            "".join(shard.written().sha256 for shard in side_shards).encode()
        ).hexdigest()[:16]  # the default is random, so equal datasets would differ
        files.write_json(folder / side / "state.json", state)
        files.write_json(folder / side / "dataset_info.json", info)
    files.write_json(folder / SPLITS_FILE, _splits(shards))


def open_shards(folder: Path, sides: Mapping[str, int], what: str) -> dict[str, Dataset]:
    """Memory-map the splits in `folder`, given the number of shards of each.

    Raises:
        InputError: a part is missing, truncated, or unreadable.
    """
    for shard in shards_of(folder, sides):
        if not shard.has_its_size():
            raise InputError(f"the shard {shard.path} is missing or truncated; {REPAIR}")
    try:
        return {side: open_dataset(folder / side) for side in sides}
    except ValueError as error:
        raise InputError(f"the {what} in {folder} cannot be read: {error}; {REPAIR}") from None


def all_whole(folder: Path, sides: Mapping[str, int]) -> bool:
    """Check that every shard has its recorded checksum and that `datasets` finds the splits."""
    try:
        described = files.read_json(folder / SPLITS_FILE) == _splits(sides)
    except (FileNotFoundError, ValueError):
        return False
    return described and all(shard.is_whole() for shard in shards_of(folder, sides))


def total_counts(shards: list[Shard]) -> Counter[str]:
    """Sum the counts of finished shards."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(shard.written().counts)
    return total


def _splits(sides: Mapping[str, object]) -> dict[str, list[str]]:
    return {"splits": list(sides)}


def _discard_damaged(shards: list[Shard]) -> None:
    """Delete the records of damaged shards, so that these are recomputed, and report them."""
    for shard in shards:
        if not shard.is_whole():
            status(f"The shard {shard.path} is damaged (its checksum differs from the recorded one) and is recomputed.")
            shard.record_path.unlink(missing_ok=True)


def _range(shard: Shard, blocks: int, blocks_per_shard: int) -> range:
    """Return the indices of a shard's blocks."""
    start = shard.index * blocks_per_shard
    return range(start, min(start + blocks_per_shard, blocks))


def _progress(what: str, tokens: int) -> ProgressBar:
    several = "" if distributed.world_size() == 1 else f", rank 0 of {distributed.world_size()}"
    return progress_bar(
        total=tokens,
        desc=f"{what}{several}",
        unit=" tokens",
        unit_scale=True,
        disable=not distributed.is_main_process(),
    )


def _counted(parts: Iterator[Part], progress: ProgressBar) -> Iterator[Part]:
    for part in parts:
        blocks, tokens = next(iter(part.arrays.values())).shape[:2]
        progress.update(blocks * tokens)
        yield part


def _joined(parts: Iterator[Part]) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    computed = list(parts)
    arrays = {name: np.concatenate([part.arrays[name] for part in computed]) for name in computed[0].arrays}
    counts: Counter[str] = Counter()
    for part in computed:
        counts.update(part.counts)
    return arrays, dict(counts)


def _check_space(folder: Path, needed: int, what: str, remedy: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the {what} need {needed / 1e9:.3g} GB more, but {folder} has {free / 1e9:.3g} GB left; free some space, "
            f"{remedy}"
        )


def _item_and_shape(column: List) -> tuple[np.dtype, int]:
    """Return the dtype of a column's items and their number per block."""
    count = column.length
    while isinstance(column.feature, List):
        column = column.feature
        count *= column.length
    return np.dtype(column.feature.dtype), count


def _bytes_per_block(columns: Features) -> int:
    """Return the size of a block on disk."""
    return sum(item.itemsize * count for item, count in map(_item_and_shape, columns.values()))


def _arrow_bytes(columns: Features, arrays: Mapping[str, np.ndarray]) -> pa.Buffer:
    """Serialize all columns as an Arrow stream for `datasets`."""
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
