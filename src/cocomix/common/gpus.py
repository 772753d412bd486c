"""Memory and peak throughput of GPUs, by the vendors' figures; used for utilization and `cocomix plan`."""

from __future__ import annotations

from typing import NamedTuple

import torch

from cocomix.common.units import GIB


class Gpu(NamedTuple):
    """A GPU model."""

    memory: float
    """Bytes available to programs, about what CUDA reports for an idle GPU."""
    half: float
    """Peak of dense matrix products in half precision, FLOPs per second."""
    single: float
    """The same in float32 without TF32, which torch disables by default."""

    def peak(self, precision: str) -> float:
        """Return the peak FLOPs per second in fp32, bf16 or fp16."""
        return self.single if precision == "fp32" else self.half


GPUS = {
    "H200": Gpu(139 * GIB, 989e12, 67e12),
    "H100": Gpu(79 * GIB, 989e12, 67e12),
    "A100": Gpu(79 * GIB, 312e12, 19.5e12),  # the 80 GB version
    "L40S": Gpu(44 * GIB, 362e12, 91.6e12),
    "L4": Gpu(22 * GIB, 121e12, 30.3e12),
    "RTX 4090": Gpu(23.5 * GIB, 165e12, 82.6e12),
}
"""By a part of the device name that torch reports."""


def peak_flops(device: torch.device) -> float | None:
    """Return the half-precision peak of a GPU, FLOPs per second; None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    words = f" {torch.cuda.get_device_name(device).replace('-', ' ')} "
    return next((gpu.half for name, gpu in GPUS.items() if f" {name} " in words), None)
