"""The teacher of a pipeline is loaded once, and FLOPs are counted without its weights."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix.models.flops import forward_flops_per_token
from cocomix.models.loading import load_causal_lm
from cocomix.pipeline import artifacts as pipelines
from cocomix.pipeline.artifacts import Pipeline
from cocomix.pipeline.recipe import Recipe, TeacherConfig


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The sources that a pipeline loads."""
    found: list[object] = []

    def load(source, dtype=None):
        found.append(source)
        return load_causal_lm(source, dtype)

    monkeypatch.setattr(pipelines, "load_causal_lm", load)
    return found


def test_it_is_loaded_once_counted_on_the_meta_device_and_freed(tmp_path: Path, loads: list[object]) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=1)).save_pretrained(tmp_path)
    pipeline = Pipeline(Recipe("x", "out", teacher=TeacherConfig(str(tmp_path))))
    shapes = pipeline.teacher_shapes
    assert shapes.device.type == "meta"
    assert loads == []

    teacher = weakref.ref(pipeline.teacher())
    assert pipeline.teacher() is teacher()
    assert loads == [str(tmp_path)]
    assert forward_flops_per_token(shapes, 8) == forward_flops_per_token(pipeline.teacher(), 8) > 0
    assert forward_flops_per_token(shapes, 8, 0) == forward_flops_per_token(pipeline.teacher(), 8, 0) > 0

    pipeline.release_teacher()
    assert teacher() is None


@pytest.mark.parametrize(
    ("device", "precision", "uses_tf32"), [("cuda", "fp32", True), ("cuda", None, False), ("cpu", "fp32", False)]
)
def test_tf32_ends_before_students_train(device: str, precision: str | None, uses_tf32: bool) -> None:
    """Each time, although a training sets the precision in between."""
    pipeline = Pipeline(Recipe("x", "out", teacher=TeacherConfig(precision=precision)))
    pipeline.device = torch.device(device)
    products = torch.backends.cuda.matmul
    original = products.fp32_precision
    for before in ("ieee", original):
        products.fp32_precision = before
        with pipeline.teacher_products():
            assert products.fp32_precision == ("tf32" if uses_tf32 else before)
        assert products.fp32_precision == before
