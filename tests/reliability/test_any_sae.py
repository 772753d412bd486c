"""Any SAE file is loaded and encodes with finite numbers, or is refused in one line; nothing in it is executed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from cocomix.common.errors import InputError
from cocomix.concepts.sae_loading import load_sae
from property_cases import CASES, DAMAGE, Cases, damaged

D_IN, D_SAE = 4, 8
FLOAT = torch.randn(D_IN, D_SAE, generator=torch.Generator().manual_seed(0))
SAELENS: dict[str, Any] = {
    "architecture": "topk",
    "d_in": D_IN,
    "d_sae": D_SAE,
    "k": 2,
    "dtype": "float32",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"hook_name": "blocks.1.hook_resid_post"},
}
SPARSIFY: dict[str, Any] = {"d_in": D_IN, "num_latents": D_SAE, "k": 2, "activation": "topk", "signed": False}
OPENAI: dict[str, Any] = {"activation": "TopK", "activation_state_dict": {"k": 2, "postact_fn": "ReLU"}}
WEIGHTS = {
    "saelens": {"W_enc": FLOAT, "b_enc": torch.zeros(D_SAE), "W_dec": FLOAT.T, "b_dec": torch.zeros(D_IN)},
    "sparsify": {
        "encoder.weight": FLOAT.T,
        "encoder.bias": torch.zeros(D_SAE),
        "W_dec": FLOAT.T,
        "b_dec": torch.zeros(D_IN),
    },
    "openai": {
        "encoder.weight": FLOAT.T,
        "decoder.weight": FLOAT,
        "latent_bias": torch.zeros(D_SAE),
        "pre_bias": torch.zeros(D_IN),
    },
}
NAMES = st.sampled_from(sorted({name for weights in WEIGHTS.values() for name in weights} | {"threshold", "log_x", ""}))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["standard", "topk", "jumprelu", "gated", "batchtopk", "relu", "layer_norm", "float16", "TopK"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=3,
)
KEYS = st.sampled_from([*SAELENS, *SPARSIFY, *OPENAI, "activation_fn", "activation_fn_kwargs", "hook_point"])
CHANGED_KEYS = st.lists(st.tuples(KEYS, VALUES), max_size=2)
DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64])
SHAPES = st.lists(st.integers(0, 5), max_size=3)
TENSORS = st.one_of(
    st.none(),
    SHAPES.map(torch.zeros),
    st.tuples(st.just((D_IN, D_SAE)), DTYPES).map(lambda made: torch.ones(made[0]).to(made[1])),
    st.sampled_from([float("nan"), float("inf"), -1e38, 0.0]).map(lambda value: torch.full((D_SAE,), value)),
)
CHANGED_TENSORS = st.lists(st.tuples(NAMES, TENSORS), max_size=2)
WHOLE = st.just((0, -1))


class Executed:
    """A pickle that creates a file if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def with_changes(content: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    """Replace values; a tensor of None is left out."""
    found = copy.deepcopy(content) | dict(changes)
    return {key: value for key, value in found.items() if key in content or value is not None}


def write(folder: Path, kind: str, keys: list[Any], tensors: list[Any], how: tuple[int, int]) -> Path:
    """Write an SAE with changed configuration and weights, and damage its file of weights."""
    weights = {
        key: value.contiguous() for key, value in with_changes(WEIGHTS[kind], tensors).items() if value is not None
    }
    if kind == "openai":
        torch.save(with_changes(OPENAI, keys) | weights, folder / "sae.pt")
        path = folder / "sae.pt"
    else:
        (folder / "cfg.json").write_text(json.dumps(with_changes(SAELENS if kind == "saelens" else SPARSIFY, keys)))
        path = folder / ("sae_weights.safetensors" if kind == "saelens" else "sae.safetensors")
        path.write_bytes(save(weights))
    if how[1] >= 0:
        path.write_bytes(damaged(path.read_bytes(), *how))
    return path if kind == "openai" else folder


def loads_or_is_refused(source: Path) -> None:
    try:
        sae = load_sae(source)
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, error
        return
    values: Tensor = sae.encode(torch.ones(3, sae.d_in)).values
    assert values.shape[0] == 3 and not values.isnan().any() and (values >= 0).all()


@pytest.mark.parametrize("cases", CASES)
def test_any_sae(cases: Cases, tmp_path: Path) -> None:
    folder = tmp_path / "sae"

    @cases.settings
    @given(st.sampled_from([*WEIGHTS]), CHANGED_KEYS, CHANGED_TENSORS, WHOLE | DAMAGE)
    def check(kind: str, keys: list[Any], tensors: list[Any], how: tuple[int, int]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loads_or_is_refused(write(folder, kind, keys, tensors, how))

    check()


@pytest.mark.parametrize("cases", CASES)
def test_any_file(cases: Cases, tmp_path: Path) -> None:
    """A configuration of any JSON or bytes, weights of any bytes, pickles, and files of another format."""
    executed = tmp_path / "executed"
    pickles = [pickle.dumps(Executed(executed)), pickle.dumps(dict(OPENAI)), b"\x80\x04.", b"cos\nsystem\n(S'x'\ntR."]
    contents = st.binary(max_size=40) | VALUES.map(json.dumps).map(str.encode) | st.sampled_from(pickles)
    names = st.sampled_from(["cfg.json", "sae_weights.safetensors", "sae.safetensors", "sae.pt"])
    source = tmp_path / "sae"

    @cases.settings
    @given(st.sampled_from([*WEIGHTS]), st.lists(st.tuples(names, contents), min_size=1, max_size=2))
    def check(kind: str, written: list[tuple[str, bytes]]) -> None:
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        write(source, kind, [], [], (0, -1))
        for name, content in written:
            (source / name).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for each in (source, source / "sae.pt"):
                loads_or_is_refused(each)
        assert not executed.exists()

    check()
