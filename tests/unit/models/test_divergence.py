"""The divergence from a teacher's distribution, whole and from its top tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from cocomix.models.divergence import divergence, divergence_of_top, top_tokens

SHAPE, V = (2, 5), 17


@pytest.fixture
def student() -> torch.Tensor:
    return (3 * torch.randn(*SHAPE, V)).requires_grad_()


@pytest.fixture
def teacher() -> torch.Tensor:
    return 3 * torch.randn(*SHAPE, V)


def by_hand(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """Σ over tokens of Σ_v p log(p / q), in plain floating-point arithmetic."""
    total = 0.0
    rows = zip(student.reshape(-1, V).tolist(), teacher.reshape(-1, V).tolist(), strict=True)
    for ours, theirs in rows:
        q = [math.exp(x / temperature) for x in ours]
        p = [math.exp(x / temperature) for x in theirs]
        total += sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))
    return total * temperature**2


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_the_divergence_is_the_sum_over_the_vocabulary(student, teacher, temperature):
    expected = by_hand(student.detach(), teacher, temperature)
    assert divergence(student, teacher, temperature).sum().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_all_tokens_but_one_known_give_the_whole_divergence_and_its_gradient(student, teacher, temperature):
    whole = divergence(student, teacher, temperature).sum()
    (expected,) = torch.autograd.grad(whole, student)
    of_top = divergence_of_top(student, top_tokens(teacher, V - 1, temperature), temperature).sum()
    (found,) = torch.autograd.grad(of_top, student)
    assert of_top.item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_mass_of_the_rest_is_exact(teacher):
    top = top_tokens(teacher, 4, 1.0)
    p = F.softmax(teacher.double(), dim=-1)
    known = p.gather(-1, top.ids)
    torch.testing.assert_close(top.log_probs, known.log().float())
    torch.testing.assert_close(top.log_rest.double(), torch.log1p(-known.sum(-1)), rtol=1e-5, atol=1e-6)
    assert torch.equal(top.ids, p.topk(4).indices)


def test_a_rest_that_rounding_would_lose_is_kept():
    """One token has all the mass but 1e-20: one minus it is 0 in any precision."""
    logits = torch.tensor([[0.0, -46.0, -47.0]])
    assert top_tokens(logits, 1, 1.0).log_rest.item() == pytest.approx(math.log(math.exp(-46) + math.exp(-47)))


def test_knowing_more_tokens_never_lowers_it_and_it_stays_below_the_whole(student, teacher):
    found = [divergence_of_top(student, top_tokens(teacher, k, 1.0), 1.0).sum().item() for k in range(1, V)]
    assert all(a <= b + 1e-5 for a, b in itertools.pairwise(found))
    assert 0 < found[0] < found[-1] == pytest.approx(divergence(student, teacher, 1.0).sum().item(), rel=1e-5)


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_a_student_that_says_the_same_has_none(teacher, k):
    assert abs(divergence(teacher, teacher, 1.5).sum().item()) < 1e-5
    same = teacher.clone().requires_grad_()
    loss = divergence_of_top(same, top_tokens(teacher, k, 1.5), 1.5).sum()
    assert abs(loss.item()) < 1e-5
    loss.backward()
    assert same.grad.abs().max() < 1e-6


def test_tokens_that_the_teacher_excludes_have_no_mass_and_finite_gradients(student, teacher):
    teacher[..., 3:] = -torch.inf
    loss = divergence_of_top(student, top_tokens(teacher, 3, 1.0), 1.0).sum()
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    p = F.softmax(teacher[..., :3], dim=-1)
    expected = (p * (p.log() - F.log_softmax(student, dim=-1)[..., :3])).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_half_precision_logits_are_compared_in_float32(student, teacher):
    found = divergence(student.bfloat16(), teacher.bfloat16(), 1.0).sum()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        divergence(student.bfloat16().float(), teacher.bfloat16().float(), 1.0).sum().item()
    )
