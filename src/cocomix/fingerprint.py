"""Short names for contents: equal contents have equal fingerprints, on any machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

LENGTH = 32
"""Hexadecimal digits kept of a SHA-256: 128 bits."""


def of_json(value: Any) -> str:
    """Fingerprint of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def of_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Fingerprint of named tensors: names, types, shapes and every value."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:LENGTH]
