"""One optimiser step, whatever the number of workers: forward, loss, backward, one gradient, one update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zenray.model.balance import RouterStats
from zenray.model.distillation import HeadLoss, Taught, TeacherStates, TopStates
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.spec.training import DistillJob, TrainingJob
from zenray.training.compiling import compile_layers
from zenray.training.context_parallel import part_of, share_sequences, top_logits
from zenray.training.data.stream import Batch
from zenray.training.expert_parallel import parallelize
from zenray.training.gradients import GradientNorms, clip_gradients, reduce_gradients
from zenray.training.loss import Objective
from zenray.training.mesh import Mesh
from zenray.training.optimizer import decay_partly_frozen, learning_rate, make_optimizer, set_learning_rate
from zenray.training.passes import EvaluationPasses, StepPasses, accumulate
from zenray.training.pipeline import Pipeline
from zenray.training.recompute import recompute
from zenray.training.sharding import let_go, shard
from zenray.training.stages import keep_stage
from zenray.training.teachers import TopTeacher
from zenray.training.trainable import choose, publish_masters, trainables

Accept = Callable[[float, float], bool]
"""Whether a step with this loss and this gradient norm may change the network."""


Shares = Sequence[float]
"""What a teacher counts for a token in each of the job's domains, in order; of all its teachers 1."""


def is_finite(loss: float, gradient_norm: float) -> bool:
    return math.isfinite(loss) and math.isfinite(gradient_norm)


@dataclass(frozen=True)
class StepReport:
    """What one step did. Losses are means over all targets of all workers; `balance` has its coefficient applied.

    From `entropy_ratios` on: of each sparse layer, as in `LoadReport` and `LayerReport`.
    """

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
    effective_ratios: tuple[float, ...]
    max_violations: tuple[float, ...]
    loads: tuple[tuple[float, ...], ...]
    dropped_choices: tuple[int, ...]
    fallback_tokens: tuple[int, ...]


def require_vocabulary(theirs: int, ours: int) -> None:
    """InvalidValue where a teacher's vocabulary is not the student's."""
    if theirs != ours:
        raise InvalidValue(
            f"The teacher has {theirs:,} tokens in its vocabulary, the student {ours:,}.",
            hint="Distillation compares the two distributions token by token: use a teacher of one tokenizer.",
        )


class Trainer:
    """A network in training on this worker. Cuts `model` to this worker's part and owns it from then on."""

    def __init__(
        self,
        model: MoDE,
        job: TrainingJob,
        mesh: Mesh | None = None,
        teachers: Sequence[tuple[MoDE, Shares]] = (),
        kept_teachers: Sequence[tuple[TopTeacher, Shares]] = (),
    ) -> None:
        """`teachers`: networks and what they count; `kept_teachers`: those of which the likeliest tokens are kept.

        InvalidValue for a teacher of another vocabulary, or nothing to train.
        """
        self.model, self.job, self.mesh = model, job, mesh or Mesh()
        self.kept_teachers = [(teacher, torch.tensor(shares)) for teacher, shares in kept_teachers]
        for teacher, _ in teachers:
            require_vocabulary(teacher.config.vocab_size, model.config.vocab_size)
        dtype = getattr(torch, job.dtype)
        if job.optimisation.balance_coefficient is not None:
            router = replace(model.config.router, balance_coefficient=job.optimisation.balance_coefficient)
            model.config = replace(model.config, router=router)
        keep_stage(model, self.mesh)
        choose(model, job.train, dtype)
        parallelize(model, self.mesh)
        if job.workers.compiled:
            compile_layers(model, job.activation_checkpointing, self.mesh.device, dtype)
        recompute(model, job.activation_checkpointing)
        self.objective = self._place(model, dtype, has_head=self.mesh.is_last_stage)
        self.pipeline = Pipeline(self.mesh, model.config.hidden_size, dtype) if self.mesh.stages > 1 else None
        self.trainables = trainables(model, self.mesh, job.train, dtype)
        self.teachers = [(self._place_teacher(teacher, dtype), torch.tensor(shares)) for teacher, shares in teachers]
        self.optimizer = make_optimizer(self.trainables, job.optimisation)

    def step(self, index: int, batches: Sequence[Batch], accept: Accept = is_finite) -> StepReport:
        """Train on this worker's batches of step `index`. Collective: all workers pass equally many batches, and those
        that share sequences the same, whole ones.

        `accept` is told the loss and the gradient norm, the same on every worker; a step that it does not accept
        changes nothing (`was_skipped`).
        """
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        batches = [part_of(batch, self.mesh) for batch in batches]
        passes = StepPasses(batches, self._forward, self.objective, self.trainables, self.mesh)
        if self.pipeline is None:
            accumulate(passes)
        else:
            self.pipeline.train(passes)
        lm, kl, balance = passes.losses()
        rate = learning_rate(index, self.job.steps, self.job.optimisation)
        norms = self._reduce_and_clip()
        distillation = self.job.distillation if isinstance(self.job, DistillJob) else 0.0
        loss = float(lm + distillation * kl + balance)
        is_sound = accept(loss, norms.total)
        if is_sound:
            self._update(rate)
            passes.routing.finish()
        layers = passes.routing.report()
        return StepReport(
            step=index,
            loss=loss,
            lm_loss=float(lm),
            kl=float(kl),
            balance=float(balance),
            gradient_norm=norms.total,
            gradient_norms=norms.by_kind,
            learning_rate=rate,
            tokens=passes.tokens,
            was_skipped=not is_sound,
            entropy_ratios=tuple(layer.load.entropy_ratio for layer in layers),
            effective_ratios=tuple(layer.load.effective_ratio for layer in layers),
            max_violations=tuple(layer.load.max_violation for layer in layers),
            loads=tuple(layer.load.load for layer in layers),
            dropped_choices=tuple(layer.dropped_choices for layer in layers),
            fallback_tokens=tuple(layer.fallback_tokens for layer in layers),
        )

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], objective: Objective | None = None) -> float:
        """Mean next-token loss over all workers' targets. Collective, like `step`. `objective`: a teacher's instead."""
        objective = self.objective if objective is None else objective
        objective.eval()
        passes = EvaluationPasses([part_of(batch, self.mesh) for batch in batches], objective, self.mesh)
        if self.pipeline is not None and objective is self.objective:
            self.pipeline.evaluate(passes)
        elif self.mesh.is_last_stage:  # where teachers are
            for number in range(len(batches)):
                passes.forward(number)
        let_go(objective)
        return passes.loss()

    def _place(self, model: MoDE, dtype: torch.dtype, *, has_head: bool = True) -> Objective:
        """On this worker's device, seeing whole sequences, and cut where weights are sharded."""
        share_sequences(model, self.mesh)
        objective = Objective(model.to(self.mesh.device), has_head=has_head)
        shard(objective, self.mesh, dtype)
        return objective

    def _place_teacher(self, teacher: MoDE, dtype: torch.dtype) -> Objective:
        teacher.eval().requires_grad_(False)
        if not self.mesh.is_last_stage:  # which alone asks it: here its shape is enough
            return Objective(teacher.to("meta"))
        if self.mesh.fully_sharded:
            parallelize(teacher, self.mesh)
        return self._place(teacher, dtype)

    def _forward(self, batch: Batch, x_BSD: Tensor | None) -> tuple[HeadLoss | Tensor, list[RouterStats]]:
        if not isinstance(self.job, DistillJob) or not self.mesh.is_last_stage:
            return self.objective(batch, x_BSD=x_BSD)
        states = [*self._ask_networks(batch), *self._ask_kept(batch)]
        found = self.objective(
            batch, states, distillation=self.job.distillation, temperature=self.job.temperature, x_BSD=x_BSD
        )
        for teacher, _ in self.teachers:
            let_go(teacher)
        return found

    @torch.no_grad()
    def _ask_networks(self, batch: Batch) -> Iterator[Taught]:
        for teacher, shares in self.teachers:
            weight_BS = shares[batch.domain_BS]
            taught_B = weight_BS.any(dim=1) | self.mesh.fully_sharded  # a network that is cut is run by all workers
            if taught_B.any():
                h_TD = _spread(teacher.hidden_states(_taught(batch, taught_B)), taught_B)
                weight_T = weight_BS.flatten().to(self.mesh.device, non_blocking=True)
                yield TeacherStates(h_TD, teacher.model.lm_head.weight, weight_T)

    def _ask_kept(self, batch: Batch) -> Iterator[Taught]:
        for teacher, shares in self.kept_teachers:
            weight_BS = shares[batch.domain_BS]
            taught_B = weight_BS.any(dim=1)
            if taught_B.any():
                top = top_logits(teacher, _taught(batch, taught_B), self.mesh)
                ids_TN, log_probs_TN = (_spread(one.to(self.mesh.device), taught_B) for one in top[:2])
                weight_T = weight_BS.flatten().to(self.mesh.device, non_blocking=True)
                yield TopStates(top._replace(ids_TN=ids_TN, log_probs_TN=log_probs_TN), weight_T)

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


def _taught(batch: Batch, taught_B: Tensor) -> Batch:
    """The sequences at which `taught_B` is true. It is on the CPU: where those are all, nothing waits for a device."""
    return batch if taught_B.all() else batch.sequences(taught_B)


def _spread(found_T: Tensor, taught_B: Tensor) -> Tensor:
    """What was found of the tokens of some sequences, for those of all: zeros for the others."""
    if taught_B.all():
        return found_T
    found_BS = found_T.unflatten(0, (int(taught_B.sum()), -1))
    all_BS = found_BS.new_zeros(len(taught_B), *found_BS.shape[1:])
    all_BS[taught_B] = found_BS
    return all_BS.flatten(0, 1)
