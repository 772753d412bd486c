"""Benchmark SAE training: tokens per second of complete steps, with the teacher's activations, and the SAE's share.

python benchmarks/sae_training.py --shape small
"""

from __future__ import annotations

import statistics

import measuring
import shapes
import torch
from datasets import Dataset

from cocomix.concepts.activations import ActivationStream
from cocomix.concepts.sae_training import SAEConfig, SAETrainer
from cocomix.concepts.teacher import freeze

STEPS = 8
"""Steps per round: one filling of the buffer."""


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="69m-gpu" if torch.cuda.is_available() else "small")
    parser.add_argument("--tokens-per-step", type=int, help="activations per optimizer step; by default half a batch")
    arguments = parser.parse_args()
    shape, device = shapes.SHAPES[arguments.shape], measuring.device()
    torch.manual_seed(0)
    tokens = arguments.tokens_per_step or shape.tokens // 2
    teacher = freeze(shapes.extractor(shape, device).teacher)
    if device.type == "cuda":
        teacher = teacher.to(torch.bfloat16)
    ids = torch.randint(shape.vocabulary, (64, shape.block_size))
    config = SAEConfig(
        teacher_layer=shape.teacher_layer,
        d_sae=shape.concepts,
        k=shapes.ACTIVE_LATENTS,
        training_tokens=1000 * tokens,
        tokens_per_step=tokens,
        buffer_tokens=2 * STEPS * tokens,
    )
    stream = ActivationStream(
        teacher,
        Dataset.from_dict({"input_ids": ids.tolist()}),
        shape.teacher_layer,
        tokens_per_step=tokens,
        buffer_tokens=config.buffer_tokens,
        seed=0,
    )
    trainer = SAETrainer(teacher, config, stream)
    trainer.begin()

    def steps() -> None:
        for _ in range(STEPS):
            trainer.run_step()

    def activations() -> None:
        for _ in range(STEPS):
            next(stream)

    times = measuring.alternating({"steps": steps, "activations": activations}, arguments.repeats)
    taken, reading = (statistics.median(times[name]) / STEPS for name in ("steps", "activations"))
    row = (shape.concepts, 1e3 * taken, tokens / taken, None if arguments.no_memory else measuring.peak_bytes() / 1e6)
    measuring.finish(
        arguments,
        ("latents", "ms", "tokens/s", "peak MB"),
        [row],
        shape=arguments.shape,
        shares={"activations": reading / taken, "SAE": 1 - reading / taken},
    )


if __name__ == "__main__":
    main()
