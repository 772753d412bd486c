"""Benchmark data: tokenize and pack text, then read blocks and labels as in training.

python benchmarks/data.py
"""

from __future__ import annotations

import random
import statistics
import tempfile
from pathlib import Path

import measuring
import numpy as np
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader

from cocomix.concepts.label_store import features
from cocomix.data.blocks import Blocks, collate
from cocomix.data.packing import load_packed, pack_documents
from cocomix.data.tokenizer import train_tokenizer

WORDS = 20_000


def documents(count: int, words: int) -> list[str]:
    """Generate documents of words from a Zipf distribution, with a fixed seed."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("etaoinshrdlucmfw", k=draw.randint(2, 9))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    return [" ".join(draw.choices(vocabulary, weights, k=words)) for _ in range(count)]


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--documents", type=int, default=2_000)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--labels", type=int, default=4, help="concept labels per token")
    arguments = parser.parse_args()
    texts = documents(arguments.documents, 500)
    tokenizer = train_tokenizer(texts[: len(texts) // 4], 8_192)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        held_out = max(1, len(texts) // 20)
        DatasetDict(
            {
                name: Dataset.from_dict({"text": t})
                for name, t in (("train", texts[held_out:]), ("validation", texts[:held_out]))
            }
        ).save_to_disk(root / "documents")
        packing = [
            measuring.seconds(
                lambda i=i: pack_documents(root / "documents", tokenizer, arguments.block_size, root / f"packed-{i}")
            )
            for i in range(max(1, arguments.repeats // 3))
        ]
        packed = load_packed(root / "packed-0").train
        tokens = len(packed) * arguments.block_size
        labels = np.random.default_rng(0).integers(0, 8_192, (len(packed), arguments.block_size, arguments.labels))
        columns = features(arguments.block_size, arguments.labels, packed.features["input_ids"].feature.dtype, 8_192)
        ids = packed.with_format("numpy")[:]["input_ids"]
        labeled = Dataset.from_dict({"input_ids": ids, "concept_ids": labels.astype("int16")}, features=columns)
        labeled.save_to_disk(root / "labeled")
        stored = Blocks(Dataset.load_from_disk(root / "labeled"), ("input_ids", "concept_ids"))
        reading = {}
        for workers in (0, 1):
            loader = DataLoader(stored, arguments.batch, shuffle=True, collate_fn=collate, num_workers=workers)
            reading[workers] = [
                measuring.seconds(lambda loader=loader: [None for _ in loader]) for _ in range(arguments.repeats)
            ]
    rows = [("tokenize and pack", tokens / statistics.median(packing))]
    rows += [
        (
            f"read blocks with labels, {'in the training process' if not workers else '1 worker'}",
            tokens / statistics.median(taken),
        )
        for workers, taken in reading.items()
    ]
    measuring.finish(arguments, ("part", "tokens/s"), rows, tokens=tokens, text_mb=round(sum(map(len, texts)) / 1e6, 1))


if __name__ == "__main__":
    main()
