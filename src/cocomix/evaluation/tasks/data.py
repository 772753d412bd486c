"""The data of the offline tasks: local files, in the form that the harness' own tasks get from the Hugging Face hub.

Each function is a task's `custom_dataset`. `data` is the folder of the evaluation sets, which
`cocomix evaluate --data FOLDER` or `lm_eval --metadata data=FOLDER` passes here, with the rest of a task's metadata.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict

_BLANK = " "
"""A line without text in WikiText."""


def lambada(data: str = "", **_: Any) -> DatasetDict:
    """LAMBADA as OpenAI published it, not tokenised."""
    return DatasetDict(test=_records(_file(data, "lambada/lambada_test.jsonl.zst")))


def hellaswag(data: str = "", **_: Any) -> DatasetDict:
    """HellaSwag's whole validation set, from a copy that joins the parts of a context in lower case.

    The harness begins the second part with a capital; it is what follows the last full stop. On the 1000 items whose
    original fields are known this gives the harness' contexts to the letter. The copy has lost blanks at the ends of 59
    of those items' endings, which `hellaswag_1000` keeps.
    """
    items = _records(_file(data, "hellaswag/hellaswag_val.jsonl.zst"))
    return DatasetDict(validation=items.map(lambda item: {"query": _capital(item["ctx"]), "choices": item["endings"]}))


def hellaswag_1000(data: str = "", **_: Any) -> DatasetDict:
    """A random 1000 items of HellaSwag's validation set, in the original fields."""
    return DatasetDict(validation=_records(_file(data, "hellaswag/hellaswag_val_1000_original_fields.jsonl.zst")))


def piqa(data: str = "", **_: Any) -> DatasetDict:
    """PIQA's validation set, whose labels are in a file of their own."""
    items = _records(_file(data, "piqa/valid.jsonl"))
    labels = _file(data, "piqa/valid-labels.lst").read_text(encoding="utf-8").split()
    return DatasetDict(validation=items.add_column("label", [int(label) for label in labels]))


def arc_easy(data: str = "", **_: Any) -> DatasetDict:
    """ARC-Easy, validation and test."""
    return _arc(data, validation="ARC-Easy-validation.jsonl", test="ARC-Easy-test.jsonl.zst")


def arc_challenge(data: str = "", **_: Any) -> DatasetDict:
    """ARC-Challenge, validation and test."""
    return _arc(data, validation="ARC-Challenge-validation.jsonl", test="ARC-Challenge-test.jsonl")


def winogrande(data: str = "", **_: Any) -> DatasetDict:
    """WinoGrande's development set, which the hub calls validation."""
    return DatasetDict(validation=_records(_file(data, "winogrande/dev.jsonl")))


def blimp(data: str = "", **_: Any) -> DatasetDict:
    """All 67 paradigms of BLiMP, 1000 pairs each: the mean over pairs is the mean over paradigms."""
    with zipfile.ZipFile(_file(data, "blimp/blimp_data.zip")) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jsonl"))
        pairs = [json.loads(line) for name in names for line in archive.read(name).splitlines()]
    columns = ("sentence_good", "sentence_bad", "UID")
    return DatasetDict(train=Dataset.from_list([{name: pair[name] for name in columns} for pair in pairs]))


def wikitext(data: str = "", **_: Any) -> DatasetDict:
    """WikiText-2's test set, an article a document.

    The copy has lost its 1467 lines of a blank; two for each of the 706 headings, before and after, are put back.
    """
    lines = []
    for line in _lines(_file(data, "wikitext2/wiki.test.raw.zst")):
        lines += [_BLANK, line, _BLANK] if _heading(line) else [line]
    starts = [number for number, line in enumerate(lines) if _heading(line) == 1]
    pages = ["\n".join(lines[a:b]) for a, b in zip(starts, [*starts[1:], len(lines)], strict=True)]
    return DatasetDict(test=Dataset.from_dict({"page": pages}))


def _arc(data: str, **splits: str) -> DatasetDict:
    return DatasetDict({split: _records(_file(data, f"arc/{name}")) for split, name in splits.items()})


def _capital(context: str) -> str:
    """The context with its last part capitalised, as Python's `str.capitalize` does, where it begins in lower case."""
    before, stop, last = context.rpartition(". ")
    return before + stop + last.capitalize() if stop and last[:1].islower() else context


def _heading(line: str) -> int:
    """The level of a WikiText heading, 0 of another line."""
    found = re.fullmatch(r"((?:= )+)[^=].*?((?: =)+)", line.strip())
    return len(found[1]) // 2 if found else 0


def _file(data: str, name: str) -> Path:
    path = Path(data, name)
    if not data or not path.is_file():
        given = f"{path} is not there" if data else "no folder is given"
        raise FileNotFoundError(
            f"the offline tasks read local evaluation sets, and {given}; give cocomix evaluate --data FOLDER, or "
            "lm_eval --metadata data=FOLDER"
        )
    return path


def _lines(path: Path) -> list[str]:
    with pa.input_stream(str(path)) as stream:  # decompresses by the name's ending
        content = stream.read()
    return [line.decode("utf-8") for line in content.splitlines()]  # of bytes: only at line ends


def _records(path: Path) -> Dataset:
    return Dataset.from_list([json.loads(line) for line in _lines(path)])
