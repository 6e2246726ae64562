"""What a run minimises: next-token loss, distance to teachers, and even routing.

T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zenray.model.balance import RouterStats
from zenray.model.distillation import TopLogits, top_forward_kl
from zenray.model.linear import linear, times_transposed
from zenray.model.network import Masks, MoDE
from zenray.training.data.stream import IGNORED, Batch

CHUNK_TOKENS = 1024  # logits of so many tokens are in memory at once


class TeacherStates(NamedTuple):
    """What a teacher says about a batch, before its head: logits would be V / D times as large."""

    h_TD: Tensor
    head_VD: Tensor
    weight: float  # of this teacher; they sum to 1

    def part(self, rows: slice) -> TeacherStates:
        return self._replace(h_TD=self.h_TD[rows])

    def kl(self, logits: Tensor, log_q: Tensor, counted: Tensor, temperature: float) -> Tensor:
        """τ²·KL(teacher ‖ student), summed over the counted tokens. `log_q`: of the student, softened."""
        log_p = (F.linear(self.h_TD, self.head_VD).float() / temperature).log_softmax(dim=-1)
        of_token = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        return temperature**2 * (of_token * counted).sum()


class TopStates(NamedTuple):
    """What was kept of a teacher's answer: its likeliest tokens."""

    top: TopLogits
    weight: float

    def part(self, rows: slice) -> TopStates:
        return self._replace(
            top=self.top._replace(ids_TN=self.top.ids_TN[rows], log_probs_TN=self.top.log_probs_TN[rows])
        )

    def kl(self, logits: Tensor, log_q: Tensor, counted: Tensor, temperature: float) -> Tensor:
        return top_forward_kl(logits, self.top, valid_T=counted) * counted.sum()


Taught = TeacherStates | TopStates


class HeadLoss(NamedTuple):
    """Sums over targets. `total` = lm + distillation coefficient · kl; only it carries gradients."""

    total: Tensor
    lm: Tensor
    kl: Tensor


def hidden_states(model: MoDE, batch: Batch) -> tuple[Tensor, list[RouterStats]]:
    """(h_TD, router sums of each sparse layer) of packed sequences whose documents do not see one another."""
    h_BSD, stats = _decode(model, batch)
    return h_BSD.flatten(0, 1), stats


def _decode(model: MoDE, batch: Batch, x_BSD: Tensor | None = None) -> tuple[Tensor, list[RouterStats]]:
    """`x_BSD`: hidden states after the layers before the model's, where it is a later part of a network."""
    config = model.config
    masks = Masks(batch.mask(), batch.mask(config.sliding_window) if config.local_layers else None)
    x_BSD = model.model.embed_tokens(batch.ids_BS) if x_BSD is None else x_BSD
    found: tuple[Tensor, list[RouterStats]] = model.model(x_BSD, batch.positions_BS, masks, ids_BS=batch.ids_BS)
    return found


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

    Forward KL, weighted over teachers (zen-mode blog; τ² as in arXiv 1503.02531). In the memory of one chunk's logits.
    """
    return HeadLoss(*_ChunkedHead.apply(h_TD, head_VD, labels_T, tuple(teachers), distillation, temperature))


class Objective(nn.Module):
    """A network with its loss: the one module in whose forward pass every weight is used, the head's too.

    Without `has_head` a part of a network that others go on from: then it gives hidden states in place of a loss.
    """

    def __init__(self, model: MoDE, *, has_head: bool = True) -> None:
        super().__init__()
        self.model, self.has_head = model, has_head

    def forward(
        self,
        batch: Batch,
        teachers: Sequence[Taught] = (),
        *,
        distillation: float = 0.0,
        temperature: float = 1.0,
        x_BSD: Tensor | None = None,
    ) -> tuple[HeadLoss | Tensor, list[RouterStats]]:
        """`x_BSD`: what the part of the network before this one made of the batch."""
        h_BSD, stats = _decode(self.model, batch, x_BSD)
        if not self.has_head:
            return h_BSD, stats
        h_TD = h_BSD.flatten(0, 1)
        head_VD, labels_T = self.model.lm_head.weight, batch.labels_BS.flatten()
        loss = head_loss(h_TD, head_VD, labels_T, teachers, distillation=distillation, temperature=temperature)
        return loss, stats

    def hidden_states(self, batch: Batch) -> Tensor:
        """h_TD alone. Afterwards the head's weight is whole until the next pass."""
        return hidden_states(self.model, batch)[0]


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
            kl = kl + teacher.weight * teacher.kl(logits, log_q, counted, temperature)
    return lm, kl


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
        for start in range(0, h_TD.shape[0], CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            h, labels, taught = h_TD[part], labels_T[part], [teacher.part(part) for teacher in teachers]
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
