"""Training by device: autocast, compilation, resume, and wrappers for several processes."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from cocomix import CoCoMixForCausalLM
from cocomix.models.backbones import decoder_blocks
from small_training import KeepCheckpoints, blocks, losses, model_of, trainer_of

METHODS = ["ntp", "cocomix"]
FP16 = pytest.param("fp16", "cuda", marks=pytest.mark.gpu)
BF16 = [("bf16", "cpu"), pytest.param("bf16", "cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("precision", "device"), [*BF16, FP16])
def test_autocast_trains_as_float32_does(method: str, precision: str, device: str, tmp_path: Path) -> None:
    exact = trainer_of(method, tmp_path, 4, 2)
    exact.train()
    trainer = trainer_of(method, tmp_path, 4, 2, use_cpu=device == "cpu", **{precision: True})
    trainer.train()
    assert all(weight.device.type == device and weight.dtype == torch.float32 for weight in trainer.model.parameters())
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    found, expected = losses(trainer), losses(exact)
    if precision == "bf16":
        assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=0.02)
    else:  # the scaler may skip steps until its scale fits
        assert trainer.accelerator.scaler is not None and trainer.accelerator.scaler.get_scale() >= 1
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=0.02)
        assert all(math.isfinite(entry["loss"]) for entry in found)


def batch(device: torch.device) -> dict[str, Tensor]:
    data = blocks(4).with_format("torch")
    inputs = {name: data[:][name].to(device) for name in ("input_ids", "concept_ids")}
    return inputs | {"labels": inputs["input_ids"]}


def loss_and_gradients(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Run a step without logits, in autocast to `dtype`; gather what is sharded."""
    with torch.autocast(inputs["input_ids"].device.type, dtype, enabled=dtype is not None):
        loss = model(**inputs, output_logits=False, use_cache=False).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters()]
    return [loss, *(each.full_tensor() if isinstance(each, DTensor) else each for each in gradients)]


@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_training_is_one_graph_for_all_steps(method: str, device: torch.device, tmp_path: Path) -> None:
    torch._dynamo.reset()
    counters.clear()
    options = {"use_cpu": device.type == "cpu", "bf16": True, "torch_compile": True}
    backend = "aot_eager" if device.type == "cpu" else "inductor"
    trainer_of(method, tmp_path, 2, 2, max_steps=3, torch_compile_backend=backend, **options).train()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to that of the expected; bfloat16 may choose other concepts at a few tokens."""
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "within"), [(None, 1e-4), (torch.bfloat16, 0.1)], ids=str)
def test_a_compiled_step_is_one_graph_with_the_eager_gradients(dtype, within):
    model = model_of("cocomix").cuda()
    eager, inputs = copy.deepcopy(model), batch(torch.device("cuda"))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    pairs = zip(loss_and_gradients(compiled, inputs, dtype), loss_and_gradients(eager, inputs, dtype), strict=True)
    for found, expected in pairs:
        assert distance(found, expected) < within


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bit_equal_on_a_gpu(method: str, precision: str, tmp_path: Path, deterministic: None) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "use_cpu": False, "bf16": precision == "bf16"}
    full = trainer_of(method, tmp_path, 4, 2, **options)
    full.add_callback(KeepCheckpoints())
    full.train()
    resumed = trainer_of(method, tmp_path, 4, 2, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "kept" / "checkpoint-4"))
    for one, other in zip(full.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert losses(full)[4:] == losses(resumed)[4:]


@pytest.fixture
def process_group(device: torch.device) -> Iterator[None]:
    """The process group of a single process."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def sharded(model: CoCoMixForCausalLM) -> nn.Module:
    """Shard every block, and what is left of the model, with FSDP2."""
    mesh = dist.init_device_mesh(next(model.parameters()).device.type, (1,))
    for block in (*decoder_blocks(model.lower), *decoder_blocks(model.upper)):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("wrap", [DistributedDataParallel, sharded])
def test_wrappers_for_several_processes_train_in_bfloat16(wrap, device, process_group):
    model = model_of("cocomix").to(device)
    inputs = batch(device)
    expected = loss_and_gradients(copy.deepcopy(model), inputs, torch.bfloat16)
    found = loss_and_gradients(wrap(model), inputs, torch.bfloat16)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, other) < 0.1
