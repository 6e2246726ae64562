"""What a student loses against its text and its teachers, without ever holding the logits of all tokens at once.

T tokens, D hidden, V vocabulary, N stored logits per token.

    L = Σ over targets of −log q(label) + λ · τ² · Σ over teachers of w · KL(p ‖ q)

(zen-mode blog, phase 3). p of a teacher and q of the student are softened by the temperature τ; τ² keeps the gradients'
size (Hinton et al., arXiv 1503.02531). Each teacher has a weight w for each token, so that expert groups of different
domains can have teachers of their own (HIP-39).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from zenray.model.linear import linear, times_transposed
from zenray.spec.errors import InvalidValue

IGNORED = -100  # as a label: not a target, whatever stands there
CHUNK_TOKENS = 1024  # logits of so many tokens are in memory at once


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


class TeacherStates(NamedTuple):
    """What a teacher says of some tokens, before its head: logits would be V / D times as large."""

    h_TD: Tensor
    head_VD: Tensor
    weight_T: Tensor  # float32: of this teacher, for each token; 0 where it does not teach

    def part(self, rows: slice) -> TeacherStates:
        return self._replace(h_TD=self.h_TD[rows], weight_T=self.weight_T[rows])

    def kl(self, log_q_TV: Tensor, temperature: float) -> Tensor:
        """KL(teacher ‖ student) of each token, (T,). `log_q_TV`: the student's, at that temperature."""
        log_p_TV = (F.linear(self.h_TD, self.head_VD).float() / temperature).log_softmax(dim=-1)
        return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(dim=-1)


class TopStates(NamedTuple):
    """What was kept of a teacher's answer."""

    top: TopLogits
    weight_T: Tensor  # as of TeacherStates

    def part(self, rows: slice) -> TopStates:
        top = self.top._replace(ids_TN=self.top.ids_TN[rows], log_probs_TN=self.top.log_probs_TN[rows])
        return TopStates(top, self.weight_T[rows])

    def kl(self, log_q_TV: Tensor, temperature: float) -> Tensor:
        """Of each token, over the N tokens and one bucket for all others: never above the full KL, and equal to it when
        N = V. InvalidValue at another temperature than the answer's."""
        if temperature != self.top.temperature:
            raise InvalidValue(f"A teacher's answer was kept at temperature {self.top.temperature}, not {temperature}.")
        log_p_TN = self.top.log_probs_TN.float()
        log_q_TN = log_q_TV.gather(-1, self.top.ids_TN.long())
        kl_T = (log_p_TN.exp() * (log_p_TN - log_q_TN)).sum(dim=-1)
        if log_p_TN.shape[-1] < log_q_TV.shape[-1]:
            rest_p_T, rest_q_T = ((1 - kept.exp().sum(dim=-1)).clamp(min=1e-9) for kept in (log_p_TN, log_q_TN))
            kl_T = kl_T + rest_p_T * (rest_p_T.log() - rest_q_T.log())
        return kl_T


Taught = TeacherStates | TopStates


class HeadLoss(NamedTuple):
    """Sums over targets. `total` = lm + distillation coefficient · kl; only it carries gradients."""

    total: Tensor
    lm: Tensor
    kl: Tensor


def head_loss(
    h_TD: Tensor,
    head_VD: Tensor,
    labels_T: Tensor,
    teachers: Sequence[Taught] = (),
    *,
    distillation: float = 0.0,
    temperature: float = 1.0,
) -> HeadLoss:
    """Cross-entropy and λ·τ²·KL(teacher ‖ student) at temperature τ, summed over targets, float32.

    In the memory of one chunk's logits. What stands where no target is, in a teacher's answer too, only must be finite.
    """
    return HeadLoss(*_ChunkedHead.apply(h_TD, head_VD, labels_T, tuple(teachers), distillation, temperature))


def _with_gradient(
    logits: Tensor, labels: Tensor, teachers: Sequence[Taught], distillation: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(lm, kl) summed over one chunk, and the gradient of lm + distillation · kl by its logits, which are used up."""
    if not teachers:
        lm, dlogits = _cross_entropy(logits, labels)
        return lm, lm.new_zeros(()), dlogits
    with torch.enable_grad():
        logits.requires_grad_()
        lm, kl = _losses(logits, labels, teachers, temperature)
        (dlogits,) = torch.autograd.grad(lm + distillation * kl, logits)
    return lm.detach(), kl.detach(), dlogits


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The sum over targets, and its gradient in the memory of `logits`: softmax less the label."""
    counted = (labels != IGNORED).to(logits.dtype)[:, None]
    label = labels.clamp(min=0)[:, None]
    of_label = logits.gather(1, label)
    largest = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    lm = ((largest + total.log() - of_label) * counted).sum()
    return lm, logits.mul_(counted / total).scatter_add_(1, label, -counted)


def _losses(logits: Tensor, labels: Tensor, teachers: Sequence[Taught], temperature: float) -> tuple[Tensor, Tensor]:
    """(lm, kl) summed over one chunk. `teachers` hold the chunk's states."""
    lm = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    kl = lm.new_zeros(())
    if teachers:
        counted = labels != IGNORED
        log_q = (logits / temperature).log_softmax(dim=-1)
        for teacher in teachers:
            kl = kl + temperature**2 * (teacher.kl(log_q, temperature) * (teacher.weight_T * counted)).sum()
    return lm, kl


def _taught(teachers: Sequence[Taught], parts: Sequence[slice]) -> list[list[Taught]]:
    """What teachers say of each part, of those that teach in it. Waits for the device, once."""
    found = [[teacher.part(part) for teacher in teachers] for part in parts]
    weights = [one.weight_T.any() for part in found for one in part]
    teaches = iter(torch.stack(weights).tolist() if weights else ())
    return [[one for one in part if next(teaches)] for part in found]


class _ChunkedHead(torch.autograd.Function):
    """Computes each chunk's gradient together with its loss, so that no chunk's logits outlive it."""

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        head_VD: Tensor,
        labels_T: Tensor,
        teachers: tuple[Taught, ...],
        distillation: float,
        temperature: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_h, needs_head = ctx.needs_input_grad[:2]
        lm, kl = (torch.zeros((), device=h_TD.device) for _ in range(2))
        dh_TD = torch.empty_like(h_TD) if needs_h else None
        dhead_VD = None
        parts = [slice(start, start + CHUNK_TOKENS) for start in range(0, h_TD.shape[0], CHUNK_TOKENS)]
        for part, taught in zip(parts, _taught(teachers, parts), strict=True):
            h, labels = h_TD[part], labels_T[part]
            logits = linear(h, head_VD).float()
            if needs_h or needs_head:
                chunk_lm, chunk_kl, dlogits = _with_gradient(logits, labels, taught, distillation, temperature)
                dlogits = dlogits.to(h_TD.dtype)
                if dh_TD is not None:
                    dh_TD[part] = times_transposed(dlogits, head_VD.t())
                if needs_head:
                    dhead = times_transposed(dlogits.t(), h.t())
                    dhead_VD = dhead if dhead_VD is None else dhead_VD.add_(dhead)
            else:
                chunk_lm, chunk_kl = _losses(logits, labels, taught, temperature)
            lm, kl = lm + chunk_lm, kl + chunk_kl
        if needs_head and dhead_VD is None:  # no token at all
            dhead_VD = torch.zeros_like(head_VD)
        ctx.save_for_backward(dh_TD, dhead_VD)
        ctx.mark_non_differentiable(lm, kl)
        return lm + distillation * kl, lm, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """In place: a head's gradient is as large as the head, and memory that is new costs more than the product."""
        dh_TD, dhead_VD = ctx.saved_tensors
        scaled = [None if gradient is None else gradient.mul_(dtotal) for gradient in (dh_TD, dhead_VD)]
        return *scaled, None, None, None, None
