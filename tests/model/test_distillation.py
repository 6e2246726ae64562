"""Distillation losses against torch's own KL: value, gradient, chunking, padding, several teachers, stored logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zenray.model.distillation import (
    chunked_forward_kl,
    forward_kl,
    grouped_forward_kl,
    keep_top,
    top_forward_kl,
)
from zenray.spec.errors import InvalidValue


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def reference(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    log_q, p = (student / temperature).log_softmax(-1), (teacher / temperature).softmax(-1)
    return temperature**2 * torch.nn.functional.kl_div(log_q, p, reduction="batchmean")


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_forward_kl_is_torchs(temperature):
    student, teacher = logits(9, 20).requires_grad_(), logits(9, 20, seed=1)
    ours, expected = forward_kl(student, teacher, temperature=temperature), reference(student, teacher, temperature)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(expected, student))


def test_the_direction_is_teacher_first():
    """Forward KL is infinite where the teacher says what the student holds impossible, not the other way round."""
    sure, unsure = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    assert forward_kl(student_TV=sure, teacher_TV=unsure) > 40
    assert forward_kl(student_TV=unsure, teacher_TV=sure) < 1


def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient():
    student = logits(5, 11).requires_grad_()
    loss = forward_kl(student, student.detach().clone(), temperature=2.0)
    assert loss.abs() < 1e-6
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-6


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 17), st.integers(0, 10))
def test_chunks_give_the_whole_and_padding_does_not_matter(tokens, chunk, padding):
    hidden, teacher_hidden = logits(tokens + padding, 6).requires_grad_(), logits(tokens + padding, 7, seed=1)
    teacher_hidden[tokens:] = float("nan")
    head, teacher_head = logits(20, 6, seed=2).requires_grad_(), logits(20, 7, seed=3)
    valid = torch.arange(tokens + padding) < tokens
    whole = forward_kl((hidden @ head.t())[:tokens], (teacher_hidden @ teacher_head.t())[:tokens], temperature=1.5)
    chunked = chunked_forward_kl(
        hidden,
        lambda h: h @ head.t(),
        teacher_hidden,
        lambda h: h @ teacher_head.t(),
        temperature=1.5,
        valid_T=valid,
        chunk_tokens=chunk,
    )
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(whole, (hidden, head))
    torch.testing.assert_close(torch.autograd.grad(chunked, (hidden, head)), expected, rtol=1e-4, atol=1e-5)


def test_padding_with_nonsense_is_ignored():
    student, teacher = logits(6, 5).requires_grad_(), logits(6, 5, seed=1)
    valid = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    expected = forward_kl(student[valid], teacher[valid])
    teacher[~valid] = float("nan")
    loss = forward_kl(student, teacher, valid_T=valid)
    torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(loss, student)[0].isfinite().all()
    assert forward_kl(student, teacher, valid_T=torch.zeros(6)) == 0


def test_each_token_follows_the_teacher_of_its_domain():
    student = logits(6, 9).requires_grad_()
    teachers = {"code": logits(6, 9, seed=1), "math": logits(6, 9, seed=2)}
    teacher_of = torch.tensor([0, 1, 1, -1, 0, 1])
    ours = grouped_forward_kl(student, teachers, teacher_of, ("code", "math"), temperature=2.0)
    code, math = torch.tensor([0, 4]), torch.tensor([1, 2, 5])
    expected = (
        2 * forward_kl(student[code], teachers["code"][code], temperature=2.0)
        + 3 * forward_kl(student[math], teachers["math"][math], temperature=2.0)
    ) / 5
    torch.testing.assert_close(ours, expected)
    assert torch.autograd.grad(ours, student)[0][3].abs().max() == 0
    with pytest.raises(InvalidValue, match="Did you mean 'math'"):
        grouped_forward_kl(student, teachers, teacher_of, ("code", "maths"))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.sampled_from([1.0, 2.0]), st.integers(0, 50))
def test_stored_logits_bound_the_kl_from_below_and_reach_it(count, temperature, seed):
    student, teacher = logits(7, 12, seed=seed), logits(7, 12, seed=seed + 1)
    full = forward_kl(student, teacher, temperature=temperature)
    kept = top_forward_kl(student, keep_top(teacher, count, temperature=temperature))
    assert kept <= full + 1e-4
    if count == 12:
        torch.testing.assert_close(kept, full, rtol=1e-4, atol=1e-5)


def test_stored_logits_of_a_perfect_student_are_no_loss():
    student = logits(7, 30).requires_grad_()
    loss = top_forward_kl(student, keep_top(student.detach(), 5))
    assert loss.abs() < 1e-5
    assert torch.autograd.grad(loss, student)[0].abs().max() < 1e-5


def test_other_vocabularies_are_refused():
    with pytest.raises(InvalidValue, match="share the tokenizer"):
        forward_kl(logits(3, 8), logits(3, 9))
