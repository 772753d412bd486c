"""Fingerprints: equal contents have equal fingerprints on any machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

LENGTH = 32
"""Number of hexadecimal digits kept of a SHA-256 digest: 128 bits."""


def hash_json(value: Any) -> str:
    """Return the fingerprint of a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def hash_tensors(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the fingerprint of named tensors: names, dtypes, shapes and all values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:LENGTH]
