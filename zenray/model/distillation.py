"""Distillation losses: forward KL from one or several teachers, chunked over tokens, and from cached top-k logits.

T tokens, D hidden, V vocabulary, N stored logits per token.

    L = L_LM + λ · L_distill,   L_distill = τ² · mean over tokens of KL(p_teacher ‖ p_student)

(zen-mode blog, phase 3). Both distributions are softened by the temperature τ; τ² keeps the gradients' size (Hinton et
al., arXiv 1503.02531). Padding is left out before anything is computed, whatever stands in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zenray.spec.errors import InvalidValue, suggest

Head = Callable[[Tensor], Tensor]
"""Hidden states of some tokens to their logits."""


def forward_kl(
    student_TV: Tensor, teacher_TV: Tensor, *, temperature: float = 1.0, valid_T: Tensor | None = None
) -> Tensor:
    """τ² · mean over valid tokens of KL(teacher ‖ student), from logits; float32. 0 where no token is valid."""
    student_TV, teacher_TV = _valid(valid_T, student_TV, teacher_TV)
    return temperature**2 * _mean(_kl(student_TV, teacher_TV, temperature))


def chunked_forward_kl(
    student_TD: Tensor,
    student_head: Head,
    teacher_TD: Tensor,
    teacher_head: Head,
    *,
    temperature: float = 1.0,
    valid_T: Tensor | None = None,
    chunk_tokens: int = 1024,
) -> Tensor:
    """`forward_kl` from hidden states: at most `chunk_tokens` × V logits of each model exist at once, both passes."""
    student_TD, teacher_TD = _valid(valid_T, student_TD, teacher_TD)

    def chunk_sum(student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(teacher)
        return _kl(student_head(student), teacher_logits, temperature).sum()

    parts = zip(student_TD.split(chunk_tokens), teacher_TD.split(chunk_tokens), strict=True)
    sums = [checkpoint(chunk_sum, *part, use_reentrant=False) for part in parts]
    return temperature**2 * torch.stack(sums).sum() / max(1, student_TD.shape[0])


def grouped_forward_kl(
    student_TV: Tensor,
    teachers: Mapping[str, Tensor],
    teacher_of_T: Tensor,
    names: tuple[str, ...],
    *,
    temperature: float = 1.0,
    valid_T: Tensor | None = None,
) -> Tensor:
    """Several teachers, one for each expert group (HIP-39): every token follows the teacher of its domain.

    `teachers[name]`: that teacher's logits (T, V), of which only its own tokens' rows are read. `teacher_of_T`: for
    each token an index into `names`, or −1 for none. The mean is over all tokens that have a teacher.
    """
    for name in names:
        if name not in teachers:
            raise InvalidValue(f"There are no logits of teacher {name!r}.", hint=suggest(name, teachers))
    has_teacher_T = teacher_of_T >= 0 if valid_T is None else (teacher_of_T >= 0) & valid_T.to(torch.bool)
    total = student_TV.new_zeros((), dtype=torch.float32)
    for index, name in enumerate(names):
        of_name = (has_teacher_T & (teacher_of_T == index)).nonzero().flatten()
        if of_name.numel():
            total = total + _kl(student_TV[of_name], teachers[name][of_name], temperature).sum()
    return temperature**2 * total / has_teacher_T.sum().clamp(min=1)


class TopLogits(NamedTuple):
    """What is kept of a teacher's answer: its N likeliest tokens, and their log-probabilities at one temperature."""

    ids_TN: Tensor  # int32
    log_probs_TN: Tensor  # float32 (or narrower, when stored)
    temperature: float


def keep_top(teacher_TV: Tensor, count: int, *, temperature: float = 1.0) -> TopLogits:
    """The `count` likeliest tokens of each position, to be stored instead of V logits."""
    log_probs_TV = (teacher_TV.float() / temperature).log_softmax(dim=-1)
    best = log_probs_TV.topk(min(count, teacher_TV.shape[-1]), dim=-1)
    return TopLogits(best.indices.to(torch.int32), best.values, temperature)


def top_forward_kl(student_TV: Tensor, teacher: TopLogits, *, valid_T: Tensor | None = None) -> Tensor:
    """`forward_kl` from stored logits: KL over the N tokens and one bucket for all others. Never above the full KL, and
    equal to it when N = V."""
    student_TV, ids_TN, log_p_TN = _valid(valid_T, student_TV, teacher.ids_TN.long(), teacher.log_probs_TN.float())
    log_q_TV = (student_TV.float() / teacher.temperature).log_softmax(dim=-1)
    log_q_TN = log_q_TV.gather(-1, ids_TN)
    per_token_T = (log_p_TN.exp() * (log_p_TN - log_q_TN)).sum(dim=-1)
    if ids_TN.shape[-1] < student_TV.shape[-1]:
        rest_p_T, rest_q_T = ((1 - kept.exp().sum(dim=-1)).clamp(min=1e-9) for kept in (log_p_TN, log_q_TN))
        per_token_T = per_token_T + rest_p_T * (rest_p_T.log() - rest_q_T.log())
    return teacher.temperature**2 * _mean(per_token_T)


def _kl(student_TV: Tensor, teacher_TV: Tensor, temperature: float) -> Tensor:
    if student_TV.shape != teacher_TV.shape:
        raise InvalidValue(
            f"Teacher logits {tuple(teacher_TV.shape)} do not fit student logits {tuple(student_TV.shape)}.",
            hint="Teacher and student must share the tokenizer, and the padded vocabulary size.",
        )
    log_q_TV = (student_TV.float() / temperature).log_softmax(dim=-1)
    log_p_TV = (teacher_TV.detach().float() / temperature).log_softmax(dim=-1)
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dim=-1)


def _valid(valid_T: Tensor | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The rows of valid tokens. A product with 0 would not do: padding may hold infinities."""
    if valid_T is None:
        return tensors
    index = valid_T.to(torch.bool).nonzero().flatten()
    return tuple(tensor.index_select(0, index) for tensor in tensors)


def _mean(per_token_T: Tensor) -> Tensor:
    return per_token_T.sum() / max(1, per_token_T.shape[0])
