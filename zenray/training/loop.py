"""The training loop: steps, evaluations and checkpoints in their order, from wherever the last checkpoint stands."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from zenray.spec.training import TrainingJob
from zenray.training.checkpointing import load, save
from zenray.training.data.stream import IGNORED, Batch, PackedDomain, SequenceStream, pack
from zenray.training.data.tokens import TokenFolder
from zenray.training.mesh import Mesh
from zenray.training.trainer import StepReport, Trainer

HISTORY_NAME = "history.jsonl"
Event = dict[str, Any]


class Recorder(Protocol):
    """Where checkpoints go and come from: Ray Train, or a folder."""

    def latest(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint, in a folder that exists within the context; None for a new run."""
        ...

    def new_folder(self) -> Path:
        """An empty folder for this worker's part of a checkpoint. It belongs to the recorder."""
        ...

    def record(self, name: str, metrics: Event, folder: Path) -> None:
        """Keep a checkpoint. Collective. May return before its bytes are safe; they are when the run ends."""
        ...


@dataclass
class TrainingSet:
    """What a run reads: the training sequences, and held-out ones of each domain."""

    stream: SequenceStream
    held_out: dict[str, PackedDomain]

    @classmethod
    def open(cls, job: TrainingJob, tokens: TokenFolder) -> TrainingSet:
        """InvalidValue for a domain too small for one sequence."""
        length, seed = job.data.sequence_tokens, job.seed
        weights = [source.weight for source in job.data.sources]
        packed = [PackedDomain(tokens.load(domain, "train"), length, seed) for domain in tokens.domains]
        held_out = {domain: PackedDomain(tokens.load(domain, "validation"), length, seed) for domain in tokens.domains}
        return cls(
            SequenceStream(packed, weights, seed),
            {domain: part for domain, part in held_out.items() if part.num_sequences > 0},
        )

    def step(self, job: TrainingJob, mesh: Mesh, index: int) -> list[Batch]:
        """This worker's batches of a step. A pass reads neighbouring sequences, shared out in the order of ranks."""
        at_once = job.sequences_per_pass
        of_pass = at_once * mesh.world
        first = index * job.sequences_per_step + mesh.rank * at_once
        return [self.stream.batch(first + start, at_once) for start in range(0, job.sequences_per_step, of_pass)]

    def evaluation(self, job: TrainingJob, mesh: Mesh, domain: str) -> list[Batch]:
        """This worker's share of a domain's held-out sequences. Workers get equally many batches, some of them empty of
        targets."""
        packed, at_once = self.held_out[domain], job.sequences_per_pass
        count = min(packed.num_sequences, job.evaluation.sequences)
        of_pass = mesh.world * at_once
        found = []
        for first in range(0, count, of_pass):
            start = first + mesh.rank * at_once
            indices = range(start, start + at_once)
            batch = pack([packed.at(min(index, count - 1)) for index in indices])
            for row, index in enumerate(indices):
                if index >= count:
                    batch.labels_BS[row] = IGNORED
            found.append(batch)
        return found


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `stopped`: why it did before its last step, if it did."""

    history: list[Event]
    stopped: str | None = None


def train(
    trainer: Trainer, data: TrainingSet, recorder: Recorder, tell: Callable[[Event], None] = lambda event: None
) -> Outcome:
    """Run the job to its last step, from the newest checkpoint. Collective; blocks.

    `tell` gets each event as it happens: {"event": "step" | "evaluation" | "checkpoint" | "resumed", …}. The history
    is part of every checkpoint, so after a restart it is that of an uninterrupted run (but for times).
    """
    job = trainer.job
    history: list[Event] = []

    def note(event: Event) -> None:
        history.append(event)
        tell(event)

    first = 0
    with recorder.latest() as folder:
        if folder is not None:
            first = load(trainer, folder)
            history += read_history(folder)
            tell({"event": "resumed", "step": first})
    if first == 0:
        _evaluate(trainer, data, 0, note, with_teachers=True)
    for index in range(first, job.steps):
        started = time.perf_counter()
        report = trainer.step(index, data.step(job, trainer.mesh, index))
        note(_step_event(report, time.perf_counter() - started))
        done = index + 1
        stopped = None
        if report.was_skipped and job.not_finite == "stop":
            stopped = f"step {index} has a loss of {report.loss} and a gradient norm of {report.gradient_norm}"
        if done % job.evaluation.every_steps == 0 or done == job.steps:
            _evaluate(trainer, data, done, note)
        if done % job.checkpoints.every_steps == 0 or done == job.steps or stopped:
            _checkpoint(trainer, recorder, done, history, stopped)
            tell({"event": "checkpoint", "step": done})
        if stopped:
            return Outcome(history, stopped)
    return Outcome(history)


def read_history(folder: Path) -> list[Event]:
    """The events that a checkpoint carries."""
    lines = (folder / HISTORY_NAME).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _checkpoint(trainer: Trainer, recorder: Recorder, done: int, history: list[Event], stopped: str | None) -> None:
    folder = recorder.new_folder()
    save(trainer, done, folder)
    if trainer.mesh.rank == 0:
        (folder / HISTORY_NAME).write_text("".join(json.dumps(event) + "\n" for event in history), encoding="utf-8")
    metrics = {"step": done, "stopped": stopped}
    recorder.record(f"step-{done:08}", metrics, folder)


def _evaluate(
    trainer: Trainer, data: TrainingSet, done: int, note: Callable[[Event], None], *, with_teachers: bool = False
) -> None:
    if trainer.job.evaluation.sequences == 0:
        return
    models = {"loss": trainer.model}
    if with_teachers:
        models |= {f"teacher_{number}": teacher for number, (teacher, _) in enumerate(trainer.teachers)}
    for domain in data.held_out:
        batches = data.evaluation(trainer.job, trainer.mesh, domain)
        losses = {name: trainer.evaluate(batches, model) for name, model in models.items()}
        note({"event": "evaluation", "step": done, "domain": domain, **losses})


def _step_event(report: StepReport, duration_s: float) -> Event:
    event = {"event": "step", **asdict(report), "tokens_per_s": report.tokens / duration_s}
    return {name: _plain(value) for name, value in event.items()}


def _plain(value: Any) -> Any:
    """As it comes back from JSON; a number that is not finite, which JSON does not have, as text."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
