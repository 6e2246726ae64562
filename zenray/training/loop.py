"""The training loop: steps, evaluations and checkpoints in their order, from wherever the last checkpoint stands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from zenray.model.distillation import IGNORED
from zenray.spec.training import TrainingJob
from zenray.spec.versions import FileEntry
from zenray.training.checkpointing import load
from zenray.training.data.stream import Batch, PackedDomain, SequenceStream, pack
from zenray.training.data.tokens import TokenFolder
from zenray.training.faults import TAKE, Decision, data_step, decide
from zenray.training.history import Event, History, plain, read_history, require_same_data, write_history
from zenray.training.mesh import Mesh
from zenray.training.reading import StoredCheckpoint
from zenray.training.staging import Stager, Write
from zenray.training.trainer import Trainer


class Recorder(Protocol):
    """Where checkpoints go and come from: Ray Train, or a folder."""

    def latest(self) -> StoredCheckpoint | None:
        """The newest checkpoint, whole; None for a new run. Collective."""
        ...

    def record(self, name: str, metrics: Event, write: Write) -> None:
        """Keep a checkpoint, this worker's part of which `write` puts into a folder. Collective.

        May call `write` later, from another thread, and return before anything is safe; all is when the run ends.
        """
        ...

    def settle(self) -> None:
        """Return when everything recorded is safe. Collective; raises what went wrong with it."""
        ...


class Notice(Protocol):
    """Tells whether workers will be taken away soon."""

    def is_given(self) -> bool:
        """To this worker."""
        ...

    def is_due(self) -> bool:
        """Whether this worker thinks it time to `ask` together."""
        ...

    def ask(self) -> bool:
        """Whether any worker was given notice by other ways. Collective."""
        ...


@dataclass
class TrainingSet:
    """What a run reads: the training sequences, and held-out ones of each domain. `identities`: of their texts, which
    were in `files`."""

    stream: SequenceStream
    held_out: dict[str, PackedDomain]
    identities: dict[str, str] = field(default_factory=dict)
    files: tuple[FileEntry, ...] = ()

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
            tokens.identities,
            tokens.files,
        )

    def step(self, job: TrainingJob, mesh: Mesh, index: int) -> list[Batch]:
        """This worker's batches of a step. A pass reads neighbouring sequences, shared out in the order of ranks.

        Workers that share sequences get the same whole ones."""
        at_once = job.sequences_per_pass
        of_pass = at_once * mesh.readers
        first = index * job.sequences_per_step + mesh.reader * at_once
        return [self.stream.batch(first + start, at_once) for start in range(0, job.sequences_per_step, of_pass)]

    def evaluation(self, job: TrainingJob, mesh: Mesh, domain: str) -> list[Batch]:
        """This worker's share of a domain's held-out sequences. Workers get equally many batches, some of them empty of
        targets."""
        packed, at_once = self.held_out[domain], job.sequences_per_pass
        count = min(packed.num_sequences, job.evaluation.sequences)
        of_pass = mesh.readers * at_once
        found = []
        for first in range(0, count, of_pass):
            start = first + mesh.reader * at_once
            indices = range(start, start + at_once)
            batch = pack([packed.at(min(index, count - 1)) for index in indices])
            for row, index in enumerate(indices):
                if index >= count:
                    batch.labels_BS[row] = IGNORED
            found.append(batch)
        return found


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `lines`: of its history, on the first worker. `stopped`: why it did before its last step, if it
    did. `was_preempted`: it should go on."""

    lines: list[str]
    stopped: str | None = None
    was_preempted: bool = False

    @property
    def history(self) -> list[Event]:
        return [json.loads(line) for line in self.lines]


def train(
    trainer: Trainer,
    data: TrainingSet,
    recorder: Recorder,
    tell: Callable[[Event], None] = lambda event: None,
    notice: Notice | None = None,
) -> Outcome:
    """Run the job to its last step, from the newest checkpoint. Collective; blocks.

    `tell` gets each event as it happens: {"event": "step" | "evaluation" | "checkpoint" | "resumed" | "rolled_back" |
    "stopped" | "preempted", …}. The history is part of every checkpoint, so after a restart it is that of an
    uninterrupted run (but for times).
    """
    job, run = trainer.job, _Run(trainer, data, recorder, tell, notice)
    run.take_up()
    if not run.history.events:
        run.begin()
        run.evaluate(with_teachers=True)
    while run.done < job.steps:
        decision = run.step()
        if decision.action == "stop":
            return run.stop(decision.reason)
        if decision.action == "roll_back":
            run.roll_back(decision.reason)
            continue
        run.done += 1
        if run.done % job.evaluation.every_steps == 0 or run.done == job.steps:
            run.evaluate()
        if run.done % job.checkpoints.every_steps == 0 or run.done == job.steps:
            run.save()
        if run.is_noticed() and run.done < job.steps:
            return run.make_way()
    return Outcome(run.history.lines())


class _Run:
    """Where a run stands: steps done, what happened so far, and the step of the newest checkpoint (0: none)."""

    def __init__(
        self,
        trainer: Trainer,
        data: TrainingSet,
        recorder: Recorder,
        tell: Callable[[Event], None],
        notice: Notice | None,
    ) -> None:
        self.trainer, self.data, self.recorder, self.tell, self.notice = trainer, data, recorder, tell, notice
        self.stager = Stager(trainer)
        self.history = History(trainer.job.steps, is_written=trainer.mesh.rank == 0)
        self._shift = 0  # by how many steps the data is ahead
        self.done = self.checkpoint = 0

    def note(self, event: Event) -> None:
        self.history.add(event)
        self.tell(event)

    def _remember(self, kept: list[Event]) -> None:
        self.history.restore(kept)
        self._shift = data_step(self.history.events, 0)

    def begin(self) -> None:
        """Note what is read. Its files, which may be very many, are kept and not told."""
        about: Event = {"event": "data", "step": 0, "domains": self.data.identities}
        self.history.add({**about, "files": [file.model_dump() for file in self.data.files]})
        self.tell(about)

    def take_up(self) -> None:
        """From the newest checkpoint, where there is one."""
        found = self.recorder.latest()
        if found is not None:
            self.done = self.checkpoint = load(self.trainer, found)
            self._remember(read_history(found))
            require_same_data(self.history.events, self.data.identities)
            self.tell({"event": "resumed", "step": self.done})

    def step(self) -> Decision:
        """One step, learnt from or not."""
        trainer, decision = self.trainer, TAKE
        started = time.perf_counter()
        batches = self.data.step(trainer.job, trainer.mesh, self._shift + self.done)

        def accept(loss: float, norm: float) -> bool:
            nonlocal decision
            decision = decide(self.history.events, loss, norm, trainer.job.faults, self.checkpoint)
            return decision.action == "take"

        report = trainer.step(self.done, batches, accept)
        event = {"event": "step", **asdict(report), "tokens_per_s": report.tokens / (time.perf_counter() - started)}
        if decision.action != "take":
            event["fault"] = decision.reason
        keep = self.note if decision.action in ("take", "skip") else self.tell
        keep({name: plain(value) for name, value in event.items()})
        return decision

    def roll_back(self, reason: str) -> None:
        """To the newest checkpoint; its steps come again with the data after that of the step which was at fault."""
        bad = self.done
        earlier = [e for e in self.history.events if e["event"] == "rolled_back" and e["step"] == self.checkpoint]
        found = self.recorder.latest()
        assert found is not None
        self.done = load(self.trainer, found)
        history = read_history(found)
        this = {"event": "rolled_back", "step": self.done, "from": bad, "fault": reason}
        self._remember([*history, *(event for event in earlier if event not in history), this])
        self.tell(this)

    def stop(self, reason: str) -> Outcome:
        """As the run was before the step at fault, so that it can be looked at, and go on under another policy."""
        self.tell({"event": "stopped", "step": self.done, "fault": reason})
        if self.done != self.checkpoint:
            self.save()
        return Outcome(self.history.lines(), stopped=f"at step {self.done + 1} {reason}")

    def is_noticed(self) -> bool:
        """Whether some worker was given notice: the same answer on all. Collective."""
        if self.notice is None:
            return False
        flags = torch.tensor([self.notice.is_given(), self.notice.is_due()], device=self.trainer.mesh.device).int()
        given, due = self.trainer.mesh.add_up(flags).tolist()
        return bool(given or (due and self.notice.ask()))

    def make_way(self) -> Outcome:
        """Leave a checkpoint of all that was done."""
        self.tell({"event": "preempted", "step": self.done})
        if self.done != self.checkpoint:
            self.save()
        self.recorder.settle()
        return Outcome(self.history.lines(), was_preempted=True)

    def save(self) -> None:
        done, lines = self.done, self.history.lines()
        write_state = self.stager.take(done)

        def write(folder: Path) -> None:
            write_state(folder)
            if self.trainer.mesh.rank == 0:
                write_history(lines, folder)

        self.recorder.record(f"step-{done:08}", {"step": done}, write)
        self.checkpoint = done
        self.tell({"event": "checkpoint", "step": done})

    def evaluate(self, *, with_teachers: bool = False) -> None:
        trainer, data = self.trainer, self.data
        if trainer.job.evaluation.sequences == 0:
            return
        objectives = {"loss": trainer.objective}
        if with_teachers:
            objectives |= {f"teacher_{number}": teacher for number, (teacher, _) in enumerate(trainer.teachers)}
        for domain in data.held_out:
            batches = data.evaluation(trainer.job, trainer.mesh, domain)
            losses = {name: trainer.evaluate(batches, objective) for name, objective in objectives.items()}
            self.note({"event": "evaluation", "step": self.done, "domain": domain, **losses})
