"""The fused cross-entropy against logits, top-k and loss built whole, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from cocomix.models.divergence import (
    Distribution,
    TeacherHidden,
    TeacherTokens,
    map_tokens,
    teacher_divergence,
    teacher_logits,
    top_tokens,
)
from cocomix.models.linear_loss import (
    CHUNK_BYTES,
    MULTIPLE,
    TOP_BLOCK,
    _chunk_rows,
    is_plain,
    largest,
    linear_cross_entropy,
    linear_loss,
)
from cocomix.models.losses import IGNORE, Gate, concept_loss
from cocomix.models.mixer import compress

N, D, C, A, K = 7, 5, 11, 3, 4


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, D), (C, D), (C,)))
    labels = torch.stack([torch.randperm(C, generator=generator)[:A] for _ in range(N)])
    labels[1, 2] = IGNORE
    labels[3] = IGNORE
    labels[5, 1] = labels[5, 0]
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


@pytest.fixture(params=[(1, 1), (4, 4), (100, 1)], ids="{0[0]} rows at once, aligned to {0[1]}".format)
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows, multiple = request.param
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * (C + -C % multiple) * rows)
    monkeypatch.setitem(MULTIPLE, "cpu", multiple)
    return rows


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
        total, values, indices, *_ = form(x, weight, bias if with_bias else None, labels, keep)
        objective = 0.7 * total + (values * upstream).sum()
        gradients.append([total, values, indices, *torch.autograd.grad(objective, leaves)])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted)


def teacher_of(kind: str, dtype: torch.dtype = torch.float64) -> TeacherTokens:
    """A teacher's distributions over C classes at N tokens, as its logits, its hidden states or its top tokens."""
    generator = torch.Generator().manual_seed(1)
    shapes = ((N, D + 1), (C, D + 1), (C,))
    hidden, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    states = TeacherHidden(hidden, weight, bias)
    logits = teacher_logits(states)
    top = top_tokens(logits, K, 2.0)
    top.log_rest[2] = -torch.inf
    distributions: dict[str, Distribution] = {"hidden": states, "logits": logits, "top": top}
    return TeacherTokens(distributions[kind], weight=3.0, temperature=2.0)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["hidden", "logits", "top"])
def test_with_a_teacher_it_is_the_plain_form_and_the_divergence(rows_at_once: int, kind: str, with_bias: bool) -> None:
    x, *_, labels = inputs()
    labels, teacher = labels[:, :1], teacher_of(kind)
    linear = nn.Linear(D, C, bias=with_bias).double()
    leaves = [x, *linear.parameters()]
    labeled = labels[:, 0] != IGNORE
    z = linear(x)
    cross_entropy = F.cross_entropy(z[labeled], labels[labeled, 0], reduction="sum")
    distribution = map_tokens(teacher.distribution, lambda each: each[labeled])
    divergence = teacher_divergence(z[labeled], teacher._replace(distribution=distribution)).sum()
    wanted = torch.autograd.grad(cross_entropy + teacher.weight * divergence, leaves)
    for layer in (linear, nn.Sequential(linear)):  # fused, and from logits
        found = linear_loss(layer, x, labels, teacher=teacher)
        torch.testing.assert_close(found.total, cross_entropy)
        torch.testing.assert_close(found.divergence, divergence.detach(), check_dtype=False)
        for f, w in zip(torch.autograd.grad(found.total, leaves), wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["hidden", "logits", "top"])
def test_a_gate_weighs_the_divergence_of_each_row(rows_at_once: int, kind: str) -> None:
    x, *_, labels = inputs()
    labels, teacher, linear = labels[:, :1], teacher_of(kind), nn.Linear(D, C).double()
    leaves, labeled = [x, *linear.parameters()], labels[:, 0] != IGNORE
    gate = Gate(torch.rand(N, dtype=torch.float64) * 4, 0.5)
    z = linear(x)
    losses = F.cross_entropy(z, labels[:, 0], reduction="none", ignore_index=IGNORE)
    weights = torch.sigmoid((losses.detach() - gate.teacher_losses) / 0.5)
    distribution = map_tokens(teacher.distribution, lambda each: each[labeled])
    divergences = teacher_divergence(z[labeled], teacher._replace(distribution=distribution))
    divergence = (weights[labeled] * divergences).sum()
    wanted = torch.autograd.grad(losses.sum() + teacher.weight * divergence, leaves)
    for layer in (linear, nn.Sequential(linear)):  # fused, and from logits
        found = linear_loss(layer, x, labels, teacher=teacher, gate=gate)
        torch.testing.assert_close(found.losses, losses.detach())
        torch.testing.assert_close(found.divergence.double(), divergence.detach(), rtol=1e-5, atol=1e-5)
        for f, w in zip(torch.autograd.grad(found.total, leaves), wanted, strict=True):
            torch.testing.assert_close(f, w, rtol=1e-5, atol=1e-5)


def test_rows_have_weights_and_a_loss_can_wait(rows_at_once: int) -> None:
    """The kept values first, and the loss of the same logits later: together they are what one call gives."""
    x, weight, bias, labels = inputs()
    leaves, rows = [x, weight, bias], torch.rand(N, dtype=torch.float64)
    z = F.linear(x, weight, bias)
    per_row = torch.stack([concept_loss(each[None], label[None], 1) for each, label in zip(z, labels, strict=True)])
    wanted = torch.autograd.grad((rows * per_row).sum() + z.topk(K).values.square().sum(), leaves)
    first = linear_cross_entropy(x, weight, bias, None, K)
    assert first.total == 0 and torch.equal(first.indices, z.topk(K).indices)
    later = linear_cross_entropy(x, weight, bias, labels, row_weights=rows)
    torch.testing.assert_close(later.losses, per_row.detach())
    found = torch.autograd.grad(later.total + first.values.square().sum(), leaves)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)


def weighted(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The cross-entropy of each row against the distribution that its weights give, summed."""
    log_p, total = F.linear(x, weight, bias).log_softmax(-1), x.new_zeros(())
    for row, (ids, shares) in enumerate(zip(labels, weights, strict=True)):
        has = ids != IGNORE
        total = total - (log_p[row, ids[has]] * shares[has] / shares[has].sum()).sum()
    return total


def test_labels_with_weights_are_a_distribution(rows_at_once: int) -> None:
    x, weight, bias, labels = inputs()
    weights = torch.rand(N, A, dtype=torch.float64) + 0.1
    equal = linear_cross_entropy(x, weight, bias, labels, label_weights=torch.full((N, A), 0.3)).total
    torch.testing.assert_close(equal, linear_cross_entropy(x, weight, bias, labels).total)
    wanted = weighted(x, weight, bias, labels, weights)
    forms = (
        linear_cross_entropy(x, weight, bias, labels, label_weights=weights).total,
        concept_loss(F.linear(x, weight, bias), labels, 1, weights),
    )
    for found in forms:
        torch.testing.assert_close(found, wanted)
        gradients = (torch.autograd.grad(loss, [x, weight, bias], retain_graph=True) for loss in (found, wanted))
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other)


def test_gradcheck(rows_at_once: int) -> None:
    x, weight, bias, labels = inputs()

    def of(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total, values, *_ = linear_cross_entropy(x, weight, bias, labels, K)
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
    total, values, *_ = linear_cross_entropy(x, weight, bias, labels, K)
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
    for plain_error, fused_error in zip(*errors, strict=True):
        assert fused_error < max(1.5 * plain_error, 0.01)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [None, "hidden", "top"])
def test_it_compiles_without_a_break(kind: str | None, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With classes padded, in chunks of three rows, without a teacher and with one."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 4 * 12 * 3)
    monkeypatch.setitem(MULTIPLE, "cpu", 4)
    x, weight, bias, labels = inputs(torch.float32)
    teacher = None if kind is None else teacher_of(kind, torch.float32)
    torch._dynamo.reset()

    def of(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        total, values, *_ = linear_cross_entropy(x, weight, bias, labels, K, teacher)
        return total + values.sum()

    compiled = torch.compile(of, fullgraph=True, backend=backend)
    for f, w in zip(
        torch.autograd.grad(compiled(x, weight, bias), [x, weight, bias]),
        torch.autograd.grad(of(x, weight, bias), [x, weight, bias]),
        strict=True,
    ):
        torch.testing.assert_close(f, w)


@pytest.mark.parametrize("columns", [16 * TOP_BLOCK, 16 * TOP_BLOCK + 5])
def test_the_largest_are_those_of_topk(columns: int) -> None:
    z = torch.stack([torch.randperm(columns).float() for _ in range(30)])
    for found, wanted in zip(largest(z, K), z.topk(K), strict=True):
        assert torch.equal(found, wanted)


def test_float16_gradients_neither_overflow_nor_vanish() -> None:
    """The sum over the rows exceeds 65504, and a mean over them is below the smallest float16."""
    rows = 8192
    x = torch.randn(rows, D)
    x[:, 0] = 14.0
    labels = torch.full((rows, 1), 3)
    leaves = [x.requires_grad_(), (torch.randn(C, D) * 0.02).requires_grad_()]
    exact = [each.detach().double().requires_grad_() for each in leaves]
    wanted = torch.autograd.grad(linear_cross_entropy(*exact, None, labels).total / rows, exact)
    with torch.autocast("cpu", torch.float16):
        total = linear_cross_entropy(*leaves, None, labels).total
    scale = 4096.0
    found = torch.autograd.grad(total / rows * scale, leaves)
    for f, w in zip(found, wanted, strict=True):
        assert (f.double() / scale - w).norm() < 0.01 * w.norm()


@pytest.mark.parametrize("form", ["fused", "compress"])
def test_bfloat16_weights_have_gradients_summed_in_float32(form: str) -> None:
    """Summed in bfloat16, ones would stop at 256."""
    rows = 2000
    x, weight = torch.ones(rows, D, dtype=torch.bfloat16), torch.zeros(C, D, dtype=torch.bfloat16, requires_grad=True)
    if form == "fused":
        bias = torch.arange(C, dtype=torch.bfloat16)  # every row keeps the last class
        linear_cross_entropy(x, weight, bias, torch.full((rows, 1), IGNORE), keep=1).values.sum().backward()
    else:
        compress(x[:, :1], torch.full((rows, 1), C - 1), weight).sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad[-1].float(), torch.full((D,), float(rows)), rtol=0.01, atol=0)


def test_a_second_derivative_is_refused() -> None:
    x, weight, bias, labels = inputs()
    with pytest.raises(RuntimeError, match=r"no second derivative .*output_logits=True and output_concepts=True"):
        torch.autograd.grad(linear_cross_entropy(x, weight, bias, labels).total, x, create_graph=True)


class Adapted(nn.Module):
    """A linear layer wrapped as adapters wrap it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight
        self.bias = base.bias

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


def offloaded(linear: nn.Linear) -> nn.Linear:
    forward = linear.forward
    linear.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    return linear


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.register_forward_hook(lambda _module, _inputs, z: 2 * z)
    return linear


def pruned(linear: nn.Linear) -> nn.Linear:
    prune.l1_unstructured(linear, "weight", 0.5)
    return linear


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(linear: nn.Linear) -> nn.Module:
    return parametrize.register_parametrization(linear, "weight", Doubled())


class Quantized(nn.Linear):
    """A linear layer with 8-bit weights, as quantization replaces it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        self.bias = linear.bias
        self.scale = linear.weight.abs().max() / 7
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("change", [Adapted, offloaded, hooked, pruned, parametrized, Quantized])
def test_a_changed_layer_is_called(change: Callable[[nn.Linear], nn.Module]) -> None:
    linear = nn.Linear(D, C)
    x, labels = torch.randn(N, D), inputs()[3]
    assert is_plain(linear)
    before = linear_loss(linear, x, labels, K)
    changed = change(linear)
    assert not is_plain(changed)
    found = linear_loss(changed, x, labels, K)
    z = changed(x)
    for f, w in zip(found[:3], (concept_loss(z, labels, 1), *z.topk(K)), strict=True):
        torch.testing.assert_close(f, w)
    assert not torch.allclose(found.total, before.total, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 100, 16_368])
def test_chunks_end_at_aligned_rows_on_a_gpu(rows: int) -> None:
    found = _chunk_rows(rows, 4 * 50_304, "cuda")
    assert found % 64 == 0 and 64 <= found <= CHUNK_BYTES["cuda"] // (4 * 50_304) + 64
