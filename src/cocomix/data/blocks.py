"""Blocks for a `DataLoader`: a batch is read at once from the memory-mapped table, with no Python object per row."""

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
        blocks: with columns of fixed shape per row.
        columns: those that are read.
    """

    def __init__(self, blocks: Dataset, columns: Sequence[str]) -> None:
        self.rows = blocks.select_columns(list(columns)).with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> pa.Table:
        return self.rows[[index]]

    def __getitems__(self, indices: list[int]) -> list[pa.Table]:
        """A `DataLoader` asks for its batches here."""
        return [self.rows[indices]]


def collate(parts: list[pa.Table]) -> dict[str, Tensor]:
    """Rows as a batch, every column stacked; integers as int64 (stored, they are as small as they can be)."""
    table = pa.concat_tables(parts)
    return {name: _stacked(table.column(name)) for name in table.column_names}


def _stacked(column: pa.ChunkedArray) -> Tensor:
    """(B, ...) of a column whose rows all have one shape."""
    values, shape = column.combine_chunks(), [len(column)]
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
    array = values.to_numpy(zero_copy_only=False).reshape(shape)
    return torch.from_numpy(array.astype(array.dtype if array.dtype.kind == "f" else np.int64))  # a copy: this is a map
