"""Blocks as a DataLoader reads them."""

from __future__ import annotations

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from torch.utils.data import DataLoader

from cocomix.data.blocks import Blocks, collate

IDS = np.arange(12).reshape(4, 3)
LABELS = np.arange(24).reshape(4, 3, 2) - 100
LOG_PROBS = (np.arange(12).reshape(4, 3) / 4).astype("float32")
FEATURES = Features(
    {
        "input_ids": List(Value("uint16"), length=3),
        "concept_ids": List(List(Value("int16"), length=2), length=3),
        "log_probs": List(Value("float32"), length=3),
        "unread": Value("string"),
    }
)


def stored() -> Dataset:
    columns = {"input_ids": IDS, "concept_ids": LABELS.astype("int16"), "log_probs": LOG_PROBS, "unread": list("abcd")}
    return Dataset.from_dict(columns, features=FEATURES)


def test_a_loader_gives_stacked_columns_of_the_rows_it_asks_for() -> None:
    blocks = Blocks(stored().select([3, 1, 2]), ["input_ids", "concept_ids", "log_probs"])
    batches = list(DataLoader(blocks, batch_size=2, collate_fn=collate))
    assert len(blocks) == 3 and [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert batches[0].keys() == {"input_ids", "concept_ids", "log_probs"}
    for name, all_rows in (("input_ids", IDS), ("concept_ids", LABELS), ("log_probs", LOG_PROBS)):
        found = torch.cat([batch[name] for batch in batches])
        assert torch.equal(found, torch.from_numpy(all_rows[[3, 1, 2]]))
        assert found.dtype == (torch.float32 if name == "log_probs" else torch.int64)


def test_one_row_at_a_time_is_the_same() -> None:
    blocks = Blocks(stored(), ["concept_ids"])
    one = collate([blocks[2]])["concept_ids"]
    assert torch.equal(one, torch.from_numpy(LABELS[2:3]))
    one += 1  # a copy: the stored labels stay
    assert torch.equal(collate([blocks[2]])["concept_ids"], torch.from_numpy(LABELS[2:3]))
