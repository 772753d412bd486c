"""What GPUs can do, by the makers' figures; the one table that utilisation and `cocomix plan` read."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Gpu(NamedTuple):
    """A kind of GPU."""

    memory: float
    """Bytes that programs can use, about what CUDA reports of an empty one."""
    half: float
    """Dense matrix products in half precision, FLOPs per second."""
    single: float
    """The same in float32, without TF32, which torch leaves off."""

    def peak(self, precision: str) -> float:
        """FLOPs per second of fp32, or of bf16 and fp16."""
        return self.single if precision == "fp32" else self.half


GIB = 2**30
GPUS = {
    "H200": Gpu(139 * GIB, 989e12, 67e12),
    "H100": Gpu(79 * GIB, 989e12, 67e12),
    "A100": Gpu(79 * GIB, 312e12, 19.5e12),  # the one of 80 GB
    "L40S": Gpu(44 * GIB, 362e12, 91.6e12),
    "L4": Gpu(22 * GIB, 121e12, 30.3e12),
    "RTX 4090": Gpu(23.5 * GIB, 165e12, 82.6e12),
}
"""By words of torch's name of the device."""


def peak_flops(device: torch.device) -> float | None:
    """Half-precision FLOPs per second of a GPU; None of a CPU, or where they are not known."""
    if device.type != "cuda":
        return None
    words = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    return next((gpu.half for name, gpu in GPUS.items() if f" {name} " in words), None)
