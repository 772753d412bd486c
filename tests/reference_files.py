"""Files with results that the tests compare with: the golden sets, and the folders next to the repository."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

TESTS = Path(__file__).resolve().parent


def shared(name: str) -> Path:
    """Return a folder next to the repository; without it the test skips, but fails in CI."""
    folder = TESTS.parents[1] / "shared" / name
    if not folder.is_dir():
        reason = f"no {name} next to the repository: {folder}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@dataclass(frozen=True)
class GoldenSet:
    """Results of the published code; the repository's own are float64 values rounded to float32."""

    folder: Path
    rounded: bool

    @classmethod
    def named(cls, name: str) -> GoldenSet:
        """Return the repository's `own` set or the `larger` one next to it."""
        return {
            "own": lambda: cls(TESTS / "golden", rounded=True),
            "larger": lambda: cls(shared("golden"), rounded=False),
        }[name]()

    def record(self, case: str) -> dict[str, Any]:
        return json.loads((self.folder / f"{case}.json").read_text())

    def tensors(self, case: str) -> dict[str, Tensor]:
        """Return inputs and float32 weights, with the tied heads that the own set leaves out."""
        tensors = load_file(self.folder / f"{case}.safetensors")
        for prefix in ("param", "hf"):
            embedding = tensors.get(f"{prefix}/transformer.wte.weight")
            if embedding is not None:
                tensors.setdefault(f"{prefix}/lm_head.weight", embedding.clone())
        return tensors

    def expected(self, case: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the values to reproduce in this precision."""
        if self.rounded:
            tensors = self.tensors(case)
            return {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        suffix = "_f64" if dtype == torch.float64 else ""
        return load_file(self.folder / f"{case}{suffix}.safetensors")
