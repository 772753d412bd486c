"""Write labels of your own: the id of the next token as the concept, for a next-token head in mid-depth.

After `make quickstart`: python examples/write_labels.py runs/quickstart/corpus runs/next-token-labels
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset

import cocomix
from cocomix.data.packing import load_packed

corpus, folder = Path(sys.argv[1]), Path(sys.argv[2])
packed = load_packed(corpus)


def next_tokens(blocks: Dataset) -> Iterator[np.ndarray]:
    """Yield labels (256, T, 1) for 256 blocks at a time; the last token of a block has none."""
    for batch in blocks.with_format("numpy").iter(256):
        labels = np.full((*batch["input_ids"].shape, 1), -100)
        labels[:, :-1, 0] = batch["input_ids"][:, 1:]
        yield labels


cocomix.write_labels(
    folder, corpus, next_tokens(packed.train), next_tokens(packed.validation), num_concepts=packed.info.vocab_size
)
print(
    f"Labels of {packed.info.train_blocks:,} training blocks are in {folder}. To learn from them:\n"
    f"labels: {{source: {folder}, selection: external, labels_per_token: 1}}"
)
