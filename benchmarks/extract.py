"""Benchmark labeling: tokens per second, and the share of each part.

python benchmarks/extract.py --shape small
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import measuring
import numpy as np
import shapes
import torch

from cocomix.concepts.attribution import attribution_scores, select_labels
from cocomix.concepts.label_store import features
from cocomix.concepts.teacher import tapped_residual
from cocomix.data.shards import Shard


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="69m-gpu" if torch.cuda.is_available() else "small")
    arguments = parser.parse_args()
    shape = shapes.SHAPES[arguments.shape]
    torch.manual_seed(0)
    extract = shapes.extractor(shape, measuring.device())
    ids = shapes.random_batch(shape, measuring.device())["input_ids"]

    tapped = tapped_residual(extract.teacher, ids, shape.teacher_layer, head=extract.head)
    latents = extract.sae.encode(tapped.residual)
    arrays = {"input_ids": ids.cpu().numpy(), "concept_ids": extract(ids).ids.cpu().numpy()}
    columns = features(shape.block_size, shapes.LABELS_PER_TOKEN, "int32", shape.concepts)

    def score() -> None:
        scores = attribution_scores(latents, tapped.gradient, extract.sae.W_dec)
        select_labels(latents, scores, tapped.has_target, shapes.LABELS_PER_TOKEN, "attribution")

    def forward() -> None:
        with torch.no_grad():
            extract.teacher.base_model(input_ids=ids, use_cache=False)

    with tempfile.TemporaryDirectory() as folder:
        shard = Shard(Path(folder), "train", 0, 1)
        for part in (shard.path.parent, shard.record_path.parent):
            part.mkdir(parents=True)

        def write() -> None:
            shard.write(columns, {name: np.asarray(array) for name, array in arrays.items()}, {})

        times = measuring.alternating(
            {
                "teacher forward": forward,
                "teacher forward, head, backward": lambda: tapped_residual(
                    extract.teacher, ids, shape.teacher_layer, head=extract.head
                ),
                "SAE encode": lambda: extract.sae.encode(tapped.residual),
                "scores and selection": score,
                "writing": write,
                "labeling": lambda: extract(ids),
            },
            arguments.repeats,
        )
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    forward_and_backward = medians.pop("teacher forward, head, backward")
    medians["token head, loss and backward"] = forward_and_backward - medians["teacher forward"]
    total = medians.pop("labeling") + medians["writing"]
    rows = [(name, 1e3 * taken, 100 * taken / total) for name, taken in medians.items()]
    rows.append(("all", 1e3 * total, 100.0))
    measuring.finish(
        arguments, ("part", "ms", "%"), rows, shape=arguments.shape, tokens_per_second=round(shape.tokens / total)
    )


if __name__ == "__main__":
    main()
