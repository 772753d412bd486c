"""Tests by device: their CPU part runs in the default suite, their CUDA part (marker `gpu`) by `make test-gpu`."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products; read when CUDA starts

from collections.abc import Iterator

import pytest
import torch

from cocomix.concepts.sae import SparseAutoencoder

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=["cpu", CUDA])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Only deterministic kernels, for bit equality."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def sae() -> SparseAutoencoder:
    """A TopK autoencoder of the tiny teachers' residual stream after block 1."""
    W_enc = torch.randn(32, 64)
    return SparseAutoencoder(
        W_enc=W_enc,
        b_enc=torch.randn(64),
        W_dec=W_enc.T.contiguous(),
        b_dec=torch.zeros(32),
        k=8,
        normalization="layer_norm",
        teacher_layer=1,
    )
