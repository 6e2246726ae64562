"""A student's loss against torch's own cross-entropy and KL: values, gradients, chunks, targets, teachers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from zenray.model import distillation
from zenray.model.distillation import IGNORED, TeacherStates, TopStates, head_loss, keep_top
from zenray.spec.errors import InvalidValue

T, D, V = 23, 8, 31


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    labels_T = torch.randint(0, V, (T,))
    labels_T[[0, 7, 22]] = IGNORED
    teachers = [
        TeacherStates(torch.randn(T, 6), torch.randn(V, 6), torch.full((T,), 0.25)),
        TeacherStates(torch.randn(T, D), torch.randn(V, D), torch.rand(T)),
    ]
    return torch.randn(T, D, requires_grad=True), torch.randn(V, D, requires_grad=True), labels_T, teachers


def plain_loss(h_TD, head_VD, labels_T, teachers, distillation, temperature):
    logits = h_TD @ head_VD.t()
    total = F.cross_entropy(logits, labels_T, reduction="sum", ignore_index=IGNORED)
    for teacher in teachers:
        p = (teacher.h_TD @ teacher.head_VD.t() / temperature).softmax(-1)
        q = (logits / temperature).log_softmax(-1)
        of_token = teacher.weight_T * F.kl_div(q, p, reduction="none").sum(-1)
        total = total + distillation * temperature**2 * of_token[labels_T != IGNORED].sum()
    return total


@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_teachers_it_is_cross_entropy(inputs, monkeypatch, chunk, dtype) -> None:
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", chunk)
    h_TD, head_VD, labels_T = (one.detach() for one in inputs[:3])
    h_TD, head_VD = ((20 * one).to(dtype).requires_grad_() for one in (h_TD, head_VD))  # far from even
    reference = plain_loss(h_TD.float(), head_VD.float(), labels_T, [], 0.0, 1.0)
    found = head_loss(h_TD, head_VD, labels_T)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1.0}
    torch.testing.assert_close(found.total, reference, **tolerance)
    expected = torch.autograd.grad(reference, (h_TD, head_VD))
    torch.testing.assert_close(torch.autograd.grad(found.total, (h_TD, head_VD)), expected, **tolerance)


@pytest.mark.parametrize("chunk", [5, 23, 1024])
@pytest.mark.parametrize(("coefficient", "temperature"), [(0.0, 1.0), (0.7, 1.0), (2.0, 3.0)])
def test_chunks_change_neither_loss_nor_gradients(inputs, monkeypatch, chunk, coefficient, temperature) -> None:
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", chunk)
    h_TD, head_VD, labels_T, teachers = inputs
    reference = plain_loss(h_TD, head_VD, labels_T, teachers, coefficient, temperature)
    expected = torch.autograd.grad(3 * reference, (h_TD, head_VD))
    found = head_loss(h_TD, head_VD, labels_T, teachers, distillation=coefficient, temperature=temperature)
    torch.testing.assert_close(found.total, reference)
    torch.testing.assert_close(found.total, found.lm + coefficient * found.kl)
    torch.testing.assert_close(torch.autograd.grad(3 * found.total, (h_TD, head_VD)), expected)


def test_a_frozen_head_and_no_gradients_at_all(inputs) -> None:
    h_TD, head_VD, labels_T, _ = inputs
    expected = torch.autograd.grad(head_loss(h_TD, head_VD, labels_T).total, h_TD)
    found = head_loss(h_TD, head_VD.detach(), labels_T).total
    torch.testing.assert_close(torch.autograd.grad(found, h_TD), expected)
    with torch.no_grad():
        assert not head_loss(h_TD, head_VD, labels_T).total.requires_grad


@pytest.mark.parametrize("has_teachers", [True, False])
def test_what_stands_where_no_target_is_changes_nothing(inputs, has_teachers) -> None:
    h_TD, head_VD, labels_T, teachers = inputs
    teachers = teachers if has_teachers else []
    loss, expected = with_gradient(h_TD, head_VD, labels_T, teachers)
    padding = labels_T == IGNORED
    other = h_TD.detach().clone()
    other[padding] = -100.0
    for teacher in teachers:
        teacher.h_TD[padding] = 100.0
    found, gradient = with_gradient(other.requires_grad_(), head_VD, labels_T, teachers)
    assert torch.equal(found, loss) and torch.equal(gradient, expected) and not gradient[padding].any()
    nothing, gradient = with_gradient(h_TD, head_VD, torch.full_like(labels_T, IGNORED), teachers)
    assert nothing == 0 and not gradient.any()


def with_gradient(h_TD, head_VD, labels_T, teachers) -> tuple[Tensor, Tensor]:
    total = head_loss(h_TD, head_VD, labels_T, teachers, distillation=0.7, temperature=1.5).total
    return total.detach(), torch.autograd.grad(total, h_TD)[0]


def test_each_token_follows_the_teachers_of_its_domain(inputs, monkeypatch) -> None:
    """The first half of the tokens has one teacher, the rest but one has another; chunks without a teacher too."""
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", 4)
    h_TD, head_VD, labels_T, teachers = inputs
    first, second = torch.arange(T) < 11, (torch.arange(T) >= 11) & (torch.arange(T) != 15)
    one, two = (kept._replace(weight_T=of.float()) for kept, of in zip(teachers, (first, second), strict=True))

    def kl(*taught: TeacherStates, labels: Tensor = labels_T) -> Tensor:
        return head_loss(h_TD, head_VD, labels, taught, distillation=1.0, temperature=2.0).kl

    alone = [teacher._replace(weight_T=torch.ones(T)) for teacher in teachers]
    expected = [
        kl(teacher, labels=labels_T.where(of, IGNORED)) for teacher, of in zip(alone, (first, second), strict=True)
    ]
    torch.testing.assert_close(kl(one, two), sum(expected))
    assert min(map(float, expected)) > 1


def distance(student_TV: Tensor, teacher: TeacherStates | TopStates, temperature: float = 1.0) -> Tensor:
    """KL alone, of logits: hidden states with the identity for a head. It has the student's gradients."""
    labels_T = torch.zeros(len(student_TV), dtype=torch.int64)
    same = torch.eye(student_TV.shape[1])
    found = head_loss(student_TV, same, labels_T, [teacher], distillation=1.0, temperature=temperature)
    assert torch.equal(found.total.detach(), found.lm + found.kl)
    return found.kl


def says(teacher_TV: Tensor) -> TeacherStates:
    return TeacherStates(teacher_TV, torch.eye(teacher_TV.shape[1]), torch.ones(len(teacher_TV)))


def keeps(teacher_TV: Tensor, count: int, temperature: float = 1.0) -> TopStates:
    return TopStates(keep_top(teacher_TV, count, temperature=temperature), torch.ones(len(teacher_TV)))


def logits(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


class Waits(TorchDispatchMode):
    """Counts how often a number is brought from a tensor's device to Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


def test_no_chunk_waits_for_the_device(inputs, monkeypatch) -> None:
    monkeypatch.setattr(distillation, "CHUNK_TOKENS", 5)
    with Waits() as waits:
        head_loss(*inputs, distillation=0.7).total.backward()
    assert waits.count == 0


def test_the_direction_is_teacher_first() -> None:
    """Forward KL is large where the teacher says what the student holds impossible, not the other way round."""
    sure, unsure = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert distance(sure, says(unsure)) > 40
    assert distance(unsure, says(sure)) < 1


@pytest.mark.parametrize("count", [None, 5])
def test_a_student_that_is_its_teacher_has_no_distance_and_no_gradient(count: int | None) -> None:
    student_TV = logits(5, 11).requires_grad_()
    teacher = says(student_TV.detach()) if count is None else keeps(student_TV.detach(), count, 2.0)
    assert float(distance(student_TV, teacher, 2.0)) == pytest.approx(0, abs=1e-5)
    labels_T = torch.full((5,), 3)

    def gradient(coefficient: float) -> Tensor:
        total = head_loss(
            student_TV, torch.eye(11), labels_T, [teacher], distillation=coefficient, temperature=2.0
        ).total
        return torch.autograd.grad(total, student_TV)[0]

    torch.testing.assert_close(gradient(1.0), gradient(0.0), rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.sampled_from([1.0, 2.0]), st.integers(0, 50))
def test_stored_logits_bound_the_kl_from_below_and_reach_it(count: int, temperature: float, seed: int) -> None:
    student_TV, teacher_TV = logits(7, 12, seed=seed), logits(7, 12, seed=seed + 1)
    full = distance(student_TV, says(teacher_TV), temperature)
    kept = distance(student_TV, keeps(teacher_TV, count, temperature), temperature)
    assert kept <= full + 1e-3
    if count == 12:
        torch.testing.assert_close(kept, full, rtol=1e-4, atol=1e-4)


def test_an_answer_is_used_at_its_own_temperature_only() -> None:
    with pytest.raises(InvalidValue, match=r"kept at temperature 2\.0, not 1\.0"):
        distance(logits(3, 8), keeps(logits(3, 8), 4, temperature=2.0))
