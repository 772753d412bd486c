"""A fingerprint changes with whatever it names, and with nothing else."""

from __future__ import annotations

import copy

import pytest
import torch

from cocomix.common import fingerprint
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import teacher_fingerprint

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def of(tensors: dict[str, torch.Tensor]) -> str:
    return fingerprint.hash_tensors(tensors.items())


@pytest.mark.parametrize(
    "changed",
    [
        {**TENSORS, "b": torch.tensor([1.0, 1.0, 1.0, 1.0000001])},
        {**TENSORS, "b": torch.ones(4, dtype=torch.float64)},
        {**TENSORS, "a": TENSORS["a"].view(3, 2)},
        {**TENSORS, "b": torch.ones(5)},
        {"a": TENSORS["a"], "c": TENSORS["b"]},
        {"a": TENSORS["a"]},
        {**TENSORS, "c": torch.zeros(0)},
        {**TENSORS, "b": torch.tensor([1.0, 1.0, 1.0, -1.0])},
    ],
    ids=["value", "type", "shape", "size", "name", "missing", "one more", "sign"],
)
def test_tensors_that_differ_have_another_fingerprint(changed):
    assert of(changed) != of(TENSORS)


def test_tensors_in_another_order_or_memory_layout_have_the_same_fingerprint():
    assert of({"b": TENSORS["b"], "a": TENSORS["a"]}) == of(TENSORS)
    transposed = TENSORS["a"].T.contiguous().T
    assert not transposed.is_contiguous()
    assert of({**TENSORS, "a": transposed}) == of(TENSORS)
    assert of({**TENSORS, "a": TENSORS["a"].clone().requires_grad_()}) == of(TENSORS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.bool])
def test_tensors_of_any_type_and_scalars_have_a_fingerprint(dtype):
    zero, one = torch.zeros((), dtype=dtype), torch.ones((), dtype=dtype)
    assert of({"a": zero}) != of({"a": one})
    assert len(of({"a": zero})) == fingerprint.LENGTH


def test_json_values_are_named_by_content_and_not_by_order():
    value = {"a": [1, 2], "b": {"c": None, "d": "é"}}
    assert fingerprint.hash_json(value) == fingerprint.hash_json({"b": {"d": "é", "c": None}, "a": [1, 2]})
    for other in ({**value, "a": [2, 1]}, {**value, "a": [1, "2"]}, {**value, "e": None}):
        assert fingerprint.hash_json(other) != fingerprint.hash_json(value)


def test_fingerprints_are_the_same_on_every_machine():
    """Recorded once: a change here makes every labeled corpus refuse its own teacher."""
    assert fingerprint.hash_json({"a": 1}) == "015abd7f5cc57a2dd94b7590f04ad808"
    assert of(TENSORS) == "b8a7fb5a46dda2bc31c51eb485f0e569"


def test_an_sae_is_named_by_weights_and_settings():
    def sae(**changes: object) -> SparseAutoencoder:
        weights = {
            "W_enc": torch.arange(12.0).view(3, 4),
            "b_enc": torch.zeros(4),
            "W_dec": torch.arange(12.0).view(4, 3),
            "b_dec": torch.zeros(3),
        }
        settings = {"k": 2} if "threshold" not in changes else {}
        return SparseAutoencoder(**{**weights, **settings, **changes})

    others = [
        sae(k=3),
        sae(normalization="layer_norm"),
        sae(normalization="centre"),
        sae(threshold=torch.zeros(4)),
        sae(threshold=torch.ones(4)),
        sae(threshold=torch.ones(4), max_active=3),
        sae(subtract_b_dec=False),
        sae(b_enc=torch.ones(4)),
        sae(b_dec=torch.ones(3)),
        sae(W_dec=torch.ones(4, 3)),
        sae(W_enc=torch.ones(3, 4)),
    ]
    assert sae().fingerprint() == sae().fingerprint() == sae(teacher_layer=3).fingerprint()
    assert len({each.fingerprint() for each in [sae(), *others]}) == 1 + len(others)


def test_a_teacher_is_named_by_its_weights(random_teacher):
    teacher = random_teacher("gpt2")
    other = copy.deepcopy(teacher)
    assert teacher_fingerprint(other) == teacher_fingerprint(teacher)
    with torch.no_grad():
        other.transformer.h[2].mlp.c_fc.bias[0] += 1e-6
    assert teacher_fingerprint(other) != teacher_fingerprint(teacher)
