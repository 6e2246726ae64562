"""Runs that something spoils: data with losses that are no numbers, or far too large."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from tests.training.tiny import FolderRecorder
from zenray.spec.training import TrainingJob
from zenray.training.loop import Outcome, TrainingSet, train
from zenray.training.networks import Checkpoint
from zenray.training.trainer import Trainer


class Poisoned(TrainingSet):
    """Data of which some steps' worth spoils the loss: `bad` tells which, by their place in the data."""

    bad: frozenset[int] = frozenset()
    now_bad = False
    shift = staticmethod(lambda index: index)

    def step(self, job, mesh, index):
        self.now_bad = index in self.bad
        return super().step(job, mesh, self.shift(index))


class Spoilt(Trainer):
    """Its loss is no number, or far too large, on bad data."""

    data: Poisoned
    spoilt = math.nan

    def step(self, index, batches, accept):
        def told(loss: float, norm: float) -> bool:
            return accept(self.spoilt if self.data.now_bad else loss, norm)

        return super().step(index, batches, told)


def spoilt_run(
    base: Checkpoint,
    tokens: Any,
    job: TrainingJob,
    recorder: FolderRecorder,
    bad: tuple[int, ...] = (),
    *,
    loss: float = math.nan,
    shift: Callable[[int], int] = lambda index: index,
    notice: Any = None,
) -> Outcome:
    """The job on `base`, with a loss of `loss` wherever the data of the steps `bad` is read."""
    torch.set_num_threads(1)
    trainer = Spoilt(base.network(), job)
    opened = TrainingSet.open(job, tokens)
    trainer.data = Poisoned(opened.stream, opened.held_out)
    trainer.data.bad, trainer.data.shift, trainer.spoilt = frozenset(bad), shift, loss
    return train(trainer, trainer.data, recorder, notice=notice)
