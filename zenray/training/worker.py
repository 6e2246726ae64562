"""What runs in each Ray Train worker: the process made ready, then the loop."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointUploadMode

from zenray.spec.jobs import SCHEMAS
from zenray.spec.platform import StorageSettings
from zenray.spec.training import DistillJob, TrainingJob
from zenray.spec.versions import VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.cache import fetch
from zenray.storage.opening import open_store
from zenray.training.data.tokens import prepare
from zenray.training.lineage import pinned
from zenray.training.loop import Event, Outcome, TrainingSet, train
from zenray.training.mesh import Mesh
from zenray.training.networks import Checkpoint
from zenray.training.trainer import Trainer


class RayRecorder:
    """Checkpoints through `ray.train.report`: uploaded while training goes on, merged from all workers."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        found = ray.train.get_checkpoint()
        if found is None:
            yield None
            return
        with found.as_directory() as folder:
            yield Path(folder)

    def new_folder(self) -> Path:
        self._scratch.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(dir=self._scratch, prefix="checkpoint-"))

    def record(self, name: str, metrics: Event, folder: Path) -> None:
        ray.train.report(
            metrics,
            checkpoint=RayCheckpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )


def train_worker(about: dict[str, Any]) -> None:
    """The function that Ray Train calls on every worker. `about`: see `zenray.training.runner`."""
    context = ray.train.get_context()
    set_up_process(context.get_local_world_size())
    job: TrainingJob = SCHEMAS[about["job"]["kind"]].model_validate(about["job"])  # type: ignore[assignment]
    work_dir = Path(about["work_dir"])
    store = open_store(StorageSettings.model_validate(about["storage"]))
    mesh = Mesh.create(job.workers.expert_parallel, "cuda" if job.workers.gpu else "cpu")
    trainer, data = assemble(job, store, work_dir, mesh)
    rank = context.get_world_rank()
    recorder = RayRecorder(work_dir / "scratch" / f"{about['run']}-{rank}")
    with Teller(work_dir / "runs" / about["run"], is_silent=rank != 0) as tell:
        outcome = train(trainer, data, recorder, tell)
    _report_end(outcome)


def set_up_process(workers_here: int) -> None:
    """Threads for this worker's share of the machine. Denormals are flushed: they cost ten times and change nothing."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))
    torch.set_flush_denormal(True)


def assemble(job: TrainingJob, store: ObjectStore, work_dir: Path, mesh: Mesh) -> tuple[Trainer, TrainingSet]:
    """The trainer and the data of a job whose versions are pinned. Downloads, tokenises; blocks."""
    base = Checkpoint.open(_fetch(job.base, store, work_dir))
    model = base.network() if job.weights == "base" else base.fresh_network(job.seed)
    teachers = []
    if isinstance(job, DistillJob):
        total = sum(teacher.weight for teacher in job.teachers)
        for teacher in job.teachers:
            found = Checkpoint.open(_fetch(teacher.version, store, work_dir))
            teachers.append((found.network(getattr(torch, job.dtype)), teacher.weight / total))
    trainer = Trainer(model, job, mesh, teachers)
    tokens = prepare(job.data, base.tokenizer_file, base.end_token, job.seed, work_dir / "tokens")
    return trainer, TrainingSet.open(job, tokens)


class Teller:
    """Events as they happen: each a line of `events.jsonl`, and steps in words on standard output."""

    def __init__(self, folder: Path, *, is_silent: bool) -> None:
        self._folder, self._is_silent = folder, is_silent

    def __enter__(self) -> Teller:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = (self._folder / "events.jsonl").open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __call__(self, event: Event) -> None:
        if self._is_silent:
            return
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()
        sys.stdout.write(in_words(event) + "\n")  # not print: Ray Train shows what is printed twice
        sys.stdout.flush()


def in_words(event: Event) -> str:
    """One line for a person."""
    kind, step = event["event"], event["step"]
    if kind == "step":
        even = min(event["entropy_ratios"], default=1.0)
        line = (
            f"step {step + 1}  loss {float(event['loss']):.4f}  lm {float(event['lm_loss']):.4f}  "
            f"kl {float(event['kl']):.4f}  entropy {even:.3f}  norm {float(event['gradient_norm']):.2f}  "
            f"{event['tokens_per_s']:,.0f} tokens/s"
        )
        return line + ("  SKIPPED: not finite" if event["was_skipped"] else "")
    if kind == "evaluation":
        rest = "  ".join(f"{name} {event[name]:.4f}" for name in event if name not in ("event", "step", "domain"))
        return f"step {step}  held-out {event['domain']}: {rest}"
    return f"step {step}  {kind}"


def _fetch(version: Any, store: ObjectStore, work_dir: Path) -> Path:
    ref: VersionRef = pinned(version, store)
    return fetch(store, ref, work_dir / "versions")


def _report_end(outcome: Outcome) -> None:
    """Nothing is lost between the last checkpoint and the end: Ray waits for uploads that are under way."""
    ray.train.report({"step": None, "stopped": outcome.stopped})
