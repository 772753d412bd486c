"""The fused cross-entropy against logits, top-k and loss built whole, gradients included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cocomix.models import linear_loss
from cocomix.models.linear_loss import linear_cross_entropy
from cocomix.models.losses import IGNORE, concept_loss

N, D, C, A, K = 7, 5, 11, 3, 4


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, D), (C, D), (C,)))
    labels = torch.stack([torch.randperm(C, generator=generator)[:A] for _ in range(N)])
    labels[1, 2] = IGNORE
    labels[3] = IGNORE
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


@pytest.fixture(params=[1, 3, 100], ids="{} rows at once".format)
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(linear_loss.CHUNK_BYTES, "cpu", 4 * C * request.param)
    return request.param


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    return concept_loss(z, labels, 1), *z.topk(keep, dim=-1)


@pytest.mark.parametrize("keep", [0, K])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_plain_form(rows_at_once: int, keep: int, with_bias: bool) -> None:
    x, weight, bias, labels = inputs()
    leaves = [x, weight, bias] if with_bias else [x, weight]
    upstream = torch.randn(N, keep, dtype=torch.float64)
    gradients = []
    for form in (plain, linear_cross_entropy):
        total, values, indices = form(x, weight, bias if with_bias else None, labels, keep)
        objective = 0.7 * total + (values * upstream).sum()
        gradients.append([total, values, indices, *torch.autograd.grad(objective, leaves)])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradcheck(rows_at_once: int) -> None:
    x, weight, bias, labels = inputs()

    def of(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total, values, _ = linear_cross_entropy(x, weight, bias, labels, K)
        return total, values

    assert torch.autograd.gradcheck(of, (x, weight, bias))


def test_the_kept_values_alone_have_a_gradient() -> None:
    x, weight, bias, labels = inputs()
    found = torch.autograd.grad(linear_cross_entropy(x, weight, bias, labels, K).values.sum(), [x, weight, bias])
    wanted = torch.autograd.grad(F.linear(x, weight, bias).topk(K).values.sum(), [x, weight, bias])
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


def test_a_frozen_weight_gets_no_gradient_and_none_is_computed() -> None:
    x, weight, bias, labels = inputs()
    total = linear_cross_entropy(x, weight.detach(), None, labels).total
    (found,) = torch.autograd.grad(total, [x])
    (wanted,) = torch.autograd.grad(plain(x, weight.detach(), None, labels, 0)[0], [x])
    torch.testing.assert_close(found, wanted)
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, bias, labels).total.grad_fn is None


def test_backward_twice() -> None:
    x, weight, bias, labels = inputs()
    total, values, _ = linear_cross_entropy(x, weight, bias, labels, K)
    objective = total + values.square().sum()
    first = torch.autograd.grad(objective, [x, weight, bias], retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(objective, [x, weight, bias]), strict=True):
        assert torch.equal(one, other)


def test_autocast_rounds_no_more_than_the_plain_form(rows_at_once: int) -> None:
    x, weight, bias, labels = inputs(torch.float32)
    exact = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    wanted = torch.autograd.grad(plain(*exact, labels, K)[0], exact)
    errors = []
    for form in (plain, linear_cross_entropy):
        with torch.autocast("cpu", torch.bfloat16):
            total = form(x, weight, bias, labels, K)[0]
        assert total.dtype == torch.float32
        found = torch.autograd.grad(total, [x, weight, bias])
        errors.append([(f.double() - w).norm() / w.norm() for f, w in zip(found, wanted, strict=True)])
    for of_plain, of_fused in zip(*errors, strict=True):
        assert of_fused < max(1.5 * of_plain, 0.01)


def test_it_compiles_without_a_break() -> None:
    x, weight, bias, labels = inputs(torch.float32)

    def of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, values, _ = linear_cross_entropy(x, weight, bias, labels, K)
        return total + values.sum()

    compiled = torch.compile(of, fullgraph=True, backend="aot_eager")
    for f, w in zip(
        torch.autograd.grad(compiled(x, weight, bias), [x, weight, bias]),
        torch.autograd.grad(of(x, weight, bias), [x, weight, bias]),
        strict=True,
    ):
        torch.testing.assert_close(f, w)
