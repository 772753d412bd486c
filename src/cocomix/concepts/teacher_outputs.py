"""Store what a teacher computes at every training token, once for all students.

    INFO_FILE              how it was computed
    train/                 shards (`data.shards`); the column `input_ids` (T,) and one column per output

Only training text is covered, because students learn from no teacher on validation text. T tokens per block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, cast

import numpy as np
import torch
from datasets import Dataset, Features, List
from torch import Tensor
from transformers import PreTrainedModel

from cocomix.common import distributed, files
from cocomix.common.errors import InputError
from cocomix.data.shards import REPAIR, Part, all_whole, describe, open_shards, total_counts, write_shards

SIDE = "train"
Info = TypeVar("Info")


class TeacherOutputs(ABC, Generic[Info]):
    """One kind of output, stored in a folder of its own. Subclasses define what is computed.

    Args:
        teacher: frozen.
        plan: description of the folder; what is measured while it is written is filled in.
        vocab_size: V; logits from this id on belong to no token and are ignored.
    """

    INFO_FILE: ClassVar[str]
    """File that describes the folder."""
    INFO: ClassVar[Any]
    """Its dataclass, with the field `shards`."""
    WHAT: ClassVar[str]
    """Name of the outputs, for the progress bar and messages."""
    REMEDY: ClassVar[str]
    """What to change if the disk is too small."""

    def __init__(self, teacher: PreTrainedModel, plan: Info, vocab_size: int) -> None:
        self.teacher, self.plan, self.vocab_size = teacher, plan, vocab_size

    @abstractmethod
    def columns(self, ids: List) -> Features:
        """Return the columns of the stored dataset; `ids` is the type of the corpus column `input_ids`."""

    @abstractmethod
    def compute(self, tokens: Tensor) -> Part:
        """Return the outputs for tokens (B, T), and counts over them: integers, whose sums depend on no order."""

    @abstractmethod
    def described(self, counts: Counter[str], shards: int) -> Info:
        """Return the completed plan, from the summed counts and the number of shards."""

    def write(self, blocks: Dataset, folder: Path, *, blocks_per_batch: int, blocks_per_shard: int) -> Info:
        """Store the outputs for `blocks`. Every rank must call this; the ranks share the work.

        Args:
            blocks: training blocks.
            folder: destination; complete shards that it already holds are kept.
            blocks_per_batch: blocks that the teacher reads at once.
            blocks_per_shard: blocks per shard.

        Raises:
            InputError: the disk has too little space.
        """
        ids = blocks.select_columns("input_ids").with_format("numpy")
        columns = self.columns(blocks.features["input_ids"])

        @torch.no_grad()
        def parts(_: str, start: int, stop: int) -> Iterator[Part]:
            for first in range(start, stop, blocks_per_batch):
                batch = ids[first : min(first + blocks_per_batch, stop)]["input_ids"].astype(np.int64)
                yield self.compute(torch.from_numpy(batch).to(self.teacher.device))

        shards = write_shards(
            folder,
            {SIDE: blocks},
            {SIDE: columns},
            parts,
            blocks_per_shard=blocks_per_shard,
            what=self.WHAT,
            remedy=self.REMEDY,
        )[SIDE]
        info = self.described(total_counts(shards), len(shards))
        if distributed.is_main_process():
            describe(folder, {SIDE: shards}, columns)
            files.write_json(folder / self.INFO_FILE, asdict(cast(Any, info)))
        return info

    @classmethod
    def load(cls, folder: Path) -> Dataset:
        """Open the training blocks with the outputs; raise InputError if they are damaged."""
        return open_shards(folder, cls._shards(folder), f"teacher's {cls.WHAT}")[SIDE]

    @classmethod
    def is_whole(cls, folder: Path) -> bool:
        """Check that every shard has its recorded checksum and that their description exists."""
        try:
            cls.load(folder)
        except InputError:
            return False
        return all_whole(folder, cls._shards(folder))

    @classmethod
    def _shards(cls, folder: Path) -> dict[str, int]:
        path = folder / cls.INFO_FILE
        try:
            return {SIDE: cls.INFO(**files.read_json(path)).shards}
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise InputError(f"{path} does not describe {cls.WHAT} ({error}); {REPAIR}") from None
