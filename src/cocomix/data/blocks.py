"""Blocks for a `DataLoader`: each batch is one read of the memory-mapped table, without a Python object per row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor


class Blocks(torch.utils.data.Dataset[pa.Table]):
    """Columns of packed blocks.

    Args:
        blocks: packed blocks whose columns have a fixed shape per row.
        columns: names of the columns to read.
    """

    def __init__(self, blocks: Dataset, columns: Sequence[str]) -> None:
        self.rows = blocks.select_columns(list(columns)).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> pa.Table:
        return self.rows[[index]]

    def __getitems__(self, indices: list[int]) -> list[pa.Table]:
        """Return a batch, as `DataLoader` requests it."""
        return [self.rows[indices]]

    def batch(self, start: int, size: int) -> dict[str, Tensor]:
        """Return the columns of the blocks from `start` on, at most `size` of them, as `collate` does."""
        return collate([self.rows[start : start + size]])


def collate(parts: list[pa.Table]) -> dict[str, Tensor]:
    """Stack the columns of all rows to a batch; integers, which are stored in the smallest type, become int64."""
    table = pa.concat_tables(parts)
    return {name: _stacked(table.column(name)) for name in table.column_names}


def stored_columns(blocks: Dataset, start: int, stop: int) -> dict[str, np.ndarray]:
    """Return every column of the blocks `start` to `stop` − 1 as an array (B, ...) of the stored type."""
    table = blocks.with_format("arrow")[start:stop]
    return {name: _array(table.column(name)) for name in table.column_names}


def _array(column: pa.ChunkedArray) -> np.ndarray:
    """Stack a column whose rows have the same shape to (B, ...)."""
    values, shape = column.combine_chunks(), [len(column)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)


def _stacked(column: pa.ChunkedArray) -> Tensor:
    """Return a column as a tensor (B, ...)."""
    array = _array(column)
    return torch.from_numpy(
        array.astype(array.dtype if array.dtype.kind == "f" else np.int64)
    )  # a copy, because the array is a memory map
