"""Write dataset folders batch by batch, with bounded memory and without the Hugging Face cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from cocomix.common.errors import error_message

if TYPE_CHECKING:
    from datasets import Dataset


@contextmanager
def dataset_writer(folder: Path, schema: pa.Schema) -> Iterator[pa.RecordBatchStreamWriter]:
    """Yield a writer of record batches, which become a folder for `datasets.load_from_disk` when the block ends.

    The batches are first streamed to a temporary Arrow file next to `folder`. If the block raises, that file remains
    and `folder` is not created.
    """
    from datasets import Dataset

    folder.parent.mkdir(parents=True, exist_ok=True)
    stream = folder.with_name(folder.name + ".arrow")
    with pa.OSFile(str(stream), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        yield writer
    with quiet():
        Dataset.from_file(str(stream)).save_to_disk(str(folder))
    stream.unlink()


def open_dataset(folder: Path) -> Dataset:
    """Memory-map a dataset folder; ValueError in one line if it is damaged.

    `datasets` raises errors of any class for metadata that it does not expect.
    """
    from datasets import load_from_disk

    try:
        return load_from_disk(str(folder))
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {error_message(error)}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Disable the progress bars of `datasets`: copying is short compared to computing the batches."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
