"""Data sets of the local tasks, in the form that the harness' own tasks load from the Hugging Face hub.

Each function is the `custom_dataset` of a task. The files are in `../shared/data/eval`, next to the checkout.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "eval"
BLANK = " "
"""A line without text in WikiText."""


def lambada(**_: Any) -> DatasetDict:
    """LAMBADA as OpenAI published it, not tokenized."""
    return DatasetDict(test=_records(DATA / "lambada/lambada_test.jsonl.zst"))


def hellaswag(**_: Any) -> DatasetDict:
    """HellaSwag's validation set, from a copy that joins the two parts of each context in lower case.

    The harness capitalizes the second part, which follows the last full stop. For the 1000 items whose original fields
    are known, the result equals the harness' contexts exactly. The copy has lost blanks at the ends of the endings of
    59 of those items; `hellaswag_1000` has them.
    """
    items = _records(DATA / "hellaswag/hellaswag_val.jsonl.zst")
    return DatasetDict(validation=items.map(lambda item: {"query": _capital(item["ctx"]), "choices": item["endings"]}))


def hellaswag_1000(**_: Any) -> DatasetDict:
    """A random 1000 items of HellaSwag's validation set, in the original fields."""
    return DatasetDict(validation=_records(DATA / "hellaswag/hellaswag_val_1000_original_fields.jsonl.zst"))


def piqa(**_: Any) -> DatasetDict:
    """PIQA's validation set; its labels are in a separate file."""
    items = _records(DATA / "piqa/valid.jsonl")
    labels = (DATA / "piqa/valid-labels.lst").read_text(encoding="utf-8").split()
    return DatasetDict(validation=items.add_column("label", [int(label) for label in labels]))


def arc_easy(**_: Any) -> DatasetDict:
    """ARC-Easy, validation and test."""
    return _arc(validation="ARC-Easy-validation.jsonl", test="ARC-Easy-test.jsonl.zst")


def arc_challenge(**_: Any) -> DatasetDict:
    """ARC-Challenge, validation and test."""
    return _arc(validation="ARC-Challenge-validation.jsonl", test="ARC-Challenge-test.jsonl")


def winogrande(**_: Any) -> DatasetDict:
    """WinoGrande's development set, which the hub calls validation."""
    return DatasetDict(validation=_records(DATA / "winogrande/dev.jsonl"))


def blimp(**_: Any) -> DatasetDict:
    """All 67 paradigms of BLiMP, 1000 pairs each, so the mean over pairs is the mean over paradigms."""
    with zipfile.ZipFile(DATA / "blimp/blimp_data.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jsonl"))
        pairs = [json.loads(line) for name in names for line in archive.read(name).splitlines()]
    columns = ("sentence_good", "sentence_bad", "UID")
    return DatasetDict(train=Dataset.from_list([{name: pair[name] for name in columns} for pair in pairs]))


def wikitext(**_: Any) -> DatasetDict:
    """WikiText-2's test set, one article per document.

    The copy has lost its 1467 blank lines. This restores two for each of the 706 headings, before and after it.
    """
    lines = []
    for line in _lines(DATA / "wikitext2/wiki.test.raw.zst"):
        lines += [BLANK, line, BLANK] if _heading(line) else [line]
    starts = [number for number, line in enumerate(lines) if _heading(line) == 1]
    pages = ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return DatasetDict(test=Dataset.from_dict({"page": pages}))


def _arc(**splits: str) -> DatasetDict:
    return DatasetDict({split: _records(DATA / f"arc/{name}") for split, name in splits.items()})


def _capital(context: str) -> str:
    """Capitalize the last part of a context, with `str.capitalize`, if it starts in lower case."""
    before, stop, last = context.rpartition(". ")
    return before + stop + last.capitalize() if stop and last[:1].islower() else context


def _heading(line: str) -> int:
    """Return the level of a WikiText heading, 0 for any other line."""
    found = re.fullmatch(r"((?:= )+)[^=].*?((?: =)+)", line.strip())
    return len(found[1]) // 2 if found else 0


def _lines(path: Path) -> list[str]:
    with pa.input_stream(str(path)) as stream:  # decompresses by the file extension
        content = stream.read()
    return [line.decode("utf-8") for line in content.splitlines()]  # bytes split at line ends only


def _records(path: Path) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in _lines(path)])
