"""One optimiser step, whatever the number of workers: forward, loss, backward, one gradient, one update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.spec.training import DistillJob, TrainingJob
from zenray.training.data.stream import Batch
from zenray.training.expert_parallel import parallelize
from zenray.training.gradients import GradientNorms, clip_gradients, reduce_gradients
from zenray.training.loss import TeacherStates, head_loss, hidden_states
from zenray.training.mesh import Mesh
from zenray.training.optimizer import decay_partly_frozen, learning_rate, make_optimizer, set_learning_rate
from zenray.training.routing import StepRouting
from zenray.training.trainable import bank_sizes, collect_gradients, publish_masters, select


@dataclass(frozen=True)
class StepReport:
    """What one step did. Losses are means over all targets of all workers; `balance` has its coefficient applied."""

    step: int
    loss: float
    lm_loss: float
    kl: float
    balance: float
    gradient_norm: float
    gradient_norms: dict[str, float]
    learning_rate: float
    tokens: int
    was_skipped: bool
    entropy_ratios: tuple[float, ...]
    max_violations: tuple[float, ...]


class Trainer:
    """A network in training on this worker. Cuts `model` to this worker's experts and owns it from then on."""

    def __init__(
        self, model: MoDE, job: TrainingJob, mesh: Mesh | None = None, teachers: Sequence[tuple[MoDE, float]] = ()
    ) -> None:
        """`teachers`: networks and weights. InvalidValue for a teacher of another vocabulary, or nothing to train."""
        self.model, self.job, self.mesh = model, job, mesh or Mesh()
        self.teachers = [(teacher.eval().requires_grad_(False), weight) for teacher, weight in teachers]
        for teacher, _ in teachers:
            theirs, ours = teacher.config.vocab_size, model.config.vocab_size
            if theirs != ours:
                raise InvalidValue(
                    f"The teacher has {theirs:,} tokens in its vocabulary, the student {ours:,}.",
                    hint="Distillation compares the two distributions token by token: use a teacher of one tokenizer.",
                )
        self.bank_sizes = bank_sizes(model)
        parallelize(model, self.mesh)
        for parameter in model.parameters():  # not the routers' buffers, which add up small steps
            parameter.data = parameter.data.to(getattr(torch, job.dtype))
        model.model.gradient_checkpointing = job.activation_checkpointing
        self.trainables = select(model, self.mesh, job.train, self.bank_sizes)
        self.optimizer = make_optimizer(self.trainables, job.optimisation)
        for one in self.trainables:  # as AdamW would at its first step, so that a checkpoint has them from the start
            self.optimizer.state[one.master] = {
                "step": torch.zeros((), dtype=torch.float32, device=one.master.device),
                "exp_avg": torch.zeros_like(one.master),
                "exp_avg_sq": torch.zeros_like(one.master),
            }

    def step(self, index: int, batches: Sequence[Batch]) -> StepReport:
        """Train on this worker's batches of step `index`. Collective: all workers pass equally many batches.

        A step whose loss or gradient is not finite changes nothing (`was_skipped`).
        """
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = self._sum_int(sum(batch.ids_BS.numel() for batch in batches))
        targets = self._sum_int(sum(batch.num_targets for batch in batches))
        routing = StepRouting(self.mesh)
        lm, kl, balance = (torch.zeros((), dtype=torch.double) for _ in range(3))
        for batch in batches:
            h_TD, stats = hidden_states(self.model, batch)
            head = self._head_loss(h_TD, batch)
            of_routers = routing.loss(self.model, stats, tokens)
            (head.total / max(targets, 1) + of_routers).backward()
            collect_gradients(self.trainables)
            lm, kl, balance = lm + head.lm.double(), kl + head.kl.double(), balance + of_routers.detach().double()
        lm, kl = self.mesh.add_up(torch.stack([lm, kl])) / max(targets, 1)
        rate = learning_rate(index, self.job.steps, self.job.optimisation)
        norms = self._reduce_and_clip()
        distillation = self.job.distillation if isinstance(self.job, DistillJob) else 0.0
        loss = float(lm + distillation * kl + balance)
        is_sound = norms.is_finite and loss - loss == 0
        if is_sound:
            self._update(rate)
            routing.finish(self.model)
        return StepReport(
            step=index,
            loss=loss,
            lm_loss=float(lm),
            kl=float(kl),
            balance=float(balance),
            gradient_norm=norms.total,
            gradient_norms=norms.by_kind,
            learning_rate=rate,
            tokens=tokens,
            was_skipped=not is_sound,
            entropy_ratios=tuple(layer.entropy_ratio for layer in routing.reports()),
            max_violations=tuple(layer.max_violation for layer in routing.reports()),
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], model: MoDE | None = None) -> float:
        """Mean next-token loss over all workers' targets. Collective, like `step`. `model`: a teacher instead."""
        model = self.model if model is None else model
        model.eval()
        total = torch.zeros(2, dtype=torch.double)
        for batch in batches:
            h_TD, _ = hidden_states(model, batch)
            total[0] += head_loss(h_TD, model.lm_head.weight, batch.labels_BS.flatten()).lm.double()
            total[1] += batch.num_targets
        total = self.mesh.add_up(total)
        return float(total[0] / total[1].clamp(min=1))

    def _head_loss(self, h_TD: Tensor, batch: Batch):  # type: ignore[no-untyped-def]
        labels_T = batch.labels_BS.flatten()
        if not isinstance(self.job, DistillJob):
            return head_loss(h_TD, self.model.lm_head.weight, labels_T)
        states = []
        with torch.no_grad():
            for teacher, weight in self.teachers:
                teacher_TD, _ = hidden_states(teacher, batch)
                states.append(TeacherStates(teacher_TD, teacher.lm_head.weight, weight))
        return head_loss(
            h_TD,
            self.model.lm_head.weight,
            labels_T,
            states,
            distillation=self.job.distillation,
            temperature=self.job.temperature,
        )

    def _reduce_and_clip(self) -> GradientNorms:
        settings = self.job.optimisation
        reduce_gradients(self.trainables, self.mesh)
        return clip_gradients(
            self.trainables, self.mesh, clip_norm=settings.clip_norm, expert_clip_norm=settings.expert_clip_norm
        )

    def _update(self, rate: float) -> None:
        set_learning_rate(self.optimizer, rate)
        decay_partly_frozen(self.trainables, self.job.optimisation, rate)
        self.optimizer.step()
        publish_masters(self.trainables)

    def _sum_int(self, count: int) -> int:
        return int(self.mesh.add_up(torch.tensor(count, dtype=torch.int64)))
