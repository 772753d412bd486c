"""Precisions by device: CPU and GPU agree in float32, and weights in half precision train and generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cocomix import CoCoMixForCausalLM, MultiTokenConfig, MultiTokenForCausalLM
from cocomix.concepts.attribution import ConceptExtractor, ConceptLabels
from cocomix.concepts.sae import SparseAutoencoder
from cocomix.concepts.teacher import freeze
from cocomix.models.losses import IGNORE
from cocomix.models.plain import with_token_loss

MODELS = [("gpt2", {}), ("llama", {}), ("gpt2", {"mixing": "add"}), ("llama", {"mixing": "add"})]
HALF = [torch.bfloat16, torch.float16]
IDS = torch.arange(1, 33).view(2, 16)
SELECTIONS = ["attribution", "activation"]

LACKING_BFLOAT16 = (
    "_embedding_bag_per_sample_weights_backward", "_fft_c2c", "_fft_c2r", "_fft_r2c", "complex",
)  # fmt: skip
LACKING_BOTH = (
    "_cdist_backward", "_cdist_forward", "_ctc_loss", "_linalg_det", "_linalg_eigh", "_linalg_slogdet",
    "_linalg_solve_ex", "_linalg_svd", "_pdist_forward", "angle", "cholesky", "cholesky_inverse", "cholesky_solve",
    "geqrf", "histc", "igamma", "igammac", "linalg_cholesky_ex", "linalg_eig", "linalg_householder_product",
    "linalg_inv_ex", "linalg_ldl_factor_ex", "linalg_ldl_solve", "linalg_lstsq", "linalg_lu", "linalg_lu_factor_ex",
    "linalg_lu_solve", "linalg_qr", "linalg_solve_triangular", "lu_unpack", "nanquantile", "ormqr", "polar", "quantile",
    "special_erfcx", "special_log_ndtr", "special_ndtri", "special_zeta", "triangular_solve",
)  # fmt: skip
LACKING_ON_CUDA = {name: [torch.bfloat16] for name in LACKING_BFLOAT16} | {name: HALF for name in LACKING_BOTH}
"""Operations that torch implements on CUDA for float32, but not for these types: `dtypesIfCUDA` and
`backward_dtypesIfCUDA` in torch 2.13's table of operations (`torch.testing._internal.common_methods_invocations`)."""


def batch(model: CoCoMixForCausalLM, device: torch.device) -> dict[str, Tensor]:
    concept_ids = torch.randint(model.config.num_concepts, (*IDS.shape, 3))
    concept_ids[:, -1] = IGNORE
    return {"input_ids": IDS.to(device), "labels": IDS.to(device), "concept_ids": concept_ids.to(device)}


def loss_and_gradients(model: CoCoMixForCausalLM, inputs: dict[str, Tensor], **options: bool) -> list[Tensor]:
    loss = model(**inputs, **options).loss
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "settings"), MODELS)
def test_cpu_and_gpu_agree_in_float32(kind, settings, random_model, relative_error):
    cpu = random_model(kind, **settings).float()
    gpu = copy.deepcopy(cpu).cuda()
    torch.manual_seed(1)
    inputs = batch(cpu, torch.device("cpu"))
    on_gpu = {name: each.cuda() for name, each in inputs.items()}
    with torch.no_grad():
        assert relative_error(gpu(IDS.cuda()).logits.cpu(), cpu(IDS).logits) < 1e-5
    for options in ({"output_logits": False}, {"output_concepts": True}):
        pairs = zip(loss_and_gradients(gpu, on_gpu, **options), loss_and_gradients(cpu, inputs, **options), strict=True)
        for found, expected in pairs:
            assert relative_error(found.cpu(), expected) < 2e-5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("kind", "settings"), MODELS)
def test_weights_in_half_precision_train_and_generate(kind, settings, dtype, device, random_model):
    model = random_model(kind, **settings).float()
    exact = copy.deepcopy(model)
    model = model.to(device, dtype)
    inputs = batch(model, device)
    for options in ({"output_logits": False}, {"output_concepts": True}):
        found = loss_and_gradients(model, inputs, **options)
        expected = loss_and_gradients(exact, {name: each.cpu() for name, each in inputs.items()}, **options)
        assert found[0].item() == pytest.approx(expected[0].item(), rel=0.05)
        assert all(each.dtype == dtype and each.isfinite().all() for each in found[1:])
    prompt = IDS[:, :4].to(device)
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 4, "pad_token_id": 0, "do_sample": False}
    assert model.generate(prompt, **settings).shape == (2, 8)


class OperationsLacking(TorchDispatchMode):
    """Collect the operations with a tensor of a type that CUDA lacks for them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.found: set[tuple[str, torch.dtype]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").partition(".")[0]
        self.seen.add(name)
        dtypes = {each.dtype for each in args if isinstance(each, Tensor)}
        self.found |= {(name, dtype) for dtype in dtypes.intersection(LACKING_ON_CUDA.get(name, []))}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(("kind", "settings"), MODELS)
def test_cuda_has_every_operation_in_half_precision(kind, settings, dtype, random_model, random_teacher, sae):
    """Losses with and without logits, also with frozen rows of the mixer; an optimizer step; generation; labels."""
    cpu = torch.device("cpu")
    model = random_model(kind, **settings).to(dtype)
    extract = ConceptExtractor(random_teacher(kind).to(dtype), sae, 1, 3, "attribution")
    prompt = IDS[:, :4]
    with OperationsLacking() as operations:
        for options in ({"output_logits": False}, {"output_concepts": True}):
            model(**batch(model, cpu), **options).loss.backward()
        assert model.mixer.compress_weight.grad is not None
        model.mixer.compress_weight.requires_grad_(False)
        model(**batch(model, cpu), output_logits=False).loss.backward()
        torch.optim.AdamW(model.parameters()).step()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=2, pad_token_id=0)
        extract(IDS)
    assert "_embedding_bag_per_sample_weights_backward" in operations.seen
    assert operations.found == set()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("method", ["ntp", "mtp"])
def test_cuda_has_every_operation_of_other_methods(method, dtype, backbone_config, random_teacher):
    if method == "ntp":
        model, options = with_token_loss(random_teacher("gpt2").to(dtype)), {}
    else:
        config = MultiTokenConfig(backbone_config("gpt2"), num_future_tokens=2)
        model, options = MultiTokenForCausalLM(config).to(dtype), {"output_all_heads": True}
    with OperationsLacking() as operations:
        model(input_ids=IDS, labels=IDS, use_cache=False, output_logits=False, **options).loss.backward()
    assert "embedding_dense_backward" in operations.seen
    assert operations.found == set()


def labels(teacher: Any, sae: SparseAutoencoder, selection: str) -> ConceptLabels:
    found = ConceptExtractor(freeze(teacher), sae, 1, 3, selection)(IDS.to(teacher.device))
    return ConceptLabels(*(each.cpu() for each in found))


def agreement(found: ConceptLabels, expected: ConceptLabels) -> float:
    """Share of the expected labels that are found at the same token."""
    same = (found.ids.unsqueeze(-1) == expected.ids.unsqueeze(-2)).any(-2)
    return (same & (expected.ids != IGNORE)).sum().item() / (expected.ids != IGNORE).sum().item()


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_labels_agree_across_devices_and_precisions(kind, selection, device, random_teacher, sae):
    teacher = random_teacher(kind).float()
    expected = labels(copy.deepcopy(teacher), copy.deepcopy(sae), selection)
    if device.type != "cpu":
        found = labels(copy.deepcopy(teacher).to(device), copy.deepcopy(sae), selection)
        assert agreement(found, expected) > 0.97
    half = labels(teacher.to(device, torch.bfloat16), sae.to(torch.bfloat16), selection)
    assert agreement(half, expected) > 0.6  # the rounding of bfloat16 decides between near equals
