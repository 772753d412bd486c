"""Benchmark how the cost of a training step with stored labels grows with C, the block size and K.

python benchmarks/scaling.py --shape small
"""

from __future__ import annotations

import dataclasses
import statistics

import measuring
import shapes
import torch
from train_step import Step

VALUES = {
    "concepts": (8_192, 16_384, 32_768, 65_536, 131_072),
    "block_size": (512, 1_024, 2_048, 4_096),
    "active_concepts": (8, 32, 128),
}


def varied(shape: shapes.Shape, axis: str, value: int) -> shapes.Shape:
    """Return `shape` with one value changed; a single block per batch if the block size varies."""
    changed = dataclasses.replace(shape, **{axis: value})
    return dataclasses.replace(changed, batch=1) if axis == "block_size" else changed


def main() -> None:
    parser = measuring.parser(__doc__)
    parser.add_argument("--shape", choices=shapes.SHAPES, default="69m-gpu" if torch.cuda.is_available() else "small")
    parser.add_argument("--axes", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--values", nargs="+", type=int, help="values for the only axis in --axes")
    parser.add_argument("--peak-of", nargs=2, metavar=("AXIS", "VALUE"), help="only print the peak of one point")
    arguments = parser.parse_args()
    shape = shapes.SHAPES[arguments.shape]
    if arguments.peak_of:
        axis, value = arguments.peak_of
        step = Step("cocomix", varied(shape, axis, int(value)), "fp32", compiled=False)
        for _ in range(3):
            step()
        print(measuring.peak_bytes())
        return
    if arguments.values and len(arguments.axes) != 1:
        parser.error("--values requires exactly one axis in --axes")
    rate = measuring.matmul_flops_per_second("fp32")
    rows = []
    for axis in arguments.axes:
        points = {value: varied(shape, axis, value) for value in arguments.values or VALUES[axis]}
        steps = {value: Step("cocomix", point, "fp32", compiled=False) for value, point in points.items()}
        times = measuring.alternating({str(value): step for value, step in steps.items()}, arguments.repeats)
        for value, step in steps.items():
            median = statistics.median(times[str(value)])
            peak = None
            if not arguments.no_memory:
                peak = (
                    measuring.peak_bytes_of(__file__, ["--shape", arguments.shape, "--peak-of", axis, str(value)]) / 1e6
                )
            least = step.flops / rate
            rows.append((axis, value, 1e3 * median, points[value].tokens / median, 1e3 * least, median / least, peak))
    columns = ("axis", "value", "ms", "tokens/s", "ms of its products", "×", "peak MB")
    measuring.finish(arguments, columns, rows, shape=arguments.shape)


if __name__ == "__main__":
    main()
