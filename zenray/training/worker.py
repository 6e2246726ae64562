"""What runs in each Ray Train worker: the process made ready, then the loop."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import torch

from zenray.model.network import MoDE
from zenray.spec.jobs import SCHEMAS
from zenray.spec.platform import StorageSettings
from zenray.spec.training import DistillJob, TrainingJob
from zenray.spec.versions import VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.cache import fetch
from zenray.storage.opening import open_store
from zenray.storage.pinning import pinned
from zenray.training.data.shards import TokenShards
from zenray.training.data.tokens import prepare
from zenray.training.events import EventPlace, EventStream
from zenray.training.expert_parallel import parallelize
from zenray.training.loop import TrainingSet, train
from zenray.training.mesh import Mesh
from zenray.training.metrics import watched
from zenray.training.networks import Checkpoint
from zenray.training.notice import Notice, watch_in_actor
from zenray.training.stages import keep_stage
from zenray.training.teachers import Ask, EndpointAnswers, NetworkAnswers, TopTeacher
from zenray.training.trainer import Shares, Trainer, require_vocabulary
from zenray.training.uploads import RayRecorder


def train_worker(about: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train calls on every worker: how the run ended. `about`: see `zenray.training.runner`."""
    context = ray.train.get_context()
    watch_in_actor()
    set_up_process(context.get_local_world_size())
    job: TrainingJob = SCHEMAS[about["job"]["kind"]].model_validate(about["job"])  # type: ignore[assignment]
    work_dir = Path(about["work_dir"])
    store = open_store(StorageSettings.model_validate(about["storage"]))
    workers = job.workers
    device = "cuda" if workers.gpu else "cpu"
    mesh = Mesh.create(
        workers.expert_parallel,
        device,
        fully_sharded=workers.fully_sharded,
        context_size=workers.context_parallel,
        stages=workers.pipeline_parallel,
    )
    trainer, data = assemble(job, store, work_dir, mesh, about["shards"])
    rank = context.get_world_rank()
    recorder = RayRecorder(work_dir / "scratch" / f"{about['run']}-{rank}", job.checkpoints)
    kept = work_dir / "runs" / about["run"] / "events.jsonl"
    place = EventPlace(**about["events"])
    with (
        EventStream(store, place, keep=kept, is_silent=rank != 0) as stream,
        watched(trainer, about["run"], stream) as tell,
    ):
        outcome = train(trainer, data, recorder, tell, Notice())
    # The last report. Nothing is lost between the last checkpoint and the end: Ray waits for what is under way.
    ray.train.report({"step": None})
    return {"stopped": outcome.stopped, "was_preempted": outcome.was_preempted}


def set_up_process(workers_here: int) -> None:
    """Threads for this worker's share of the machine. Denormals are flushed: they cost ten times and change nothing."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers_here))
    torch.set_flush_denormal(True)


def assemble(
    job: TrainingJob, store: ObjectStore, work_dir: Path, mesh: Mesh, shards: TokenShards | None = None
) -> tuple[Trainer, TrainingSet]:
    """The trainer and the data of a job whose versions are pinned. Downloads, tokenises unless it gets `shards`;
    blocks."""
    base = Checkpoint.open(_fetch(job.base, store, work_dir))
    keep = partial(keep_share, mesh=mesh)
    model = base.network(keep=keep) if job.weights == "base" else base.fresh_network(job.seed, keep)
    teachers, kept = _teachers(job, store, work_dir, model.config.vocab_size, mesh)
    trainer = Trainer(model, job, mesh, teachers, kept)
    tokens = prepare(job.data, base.tokenizer_file, base.end_token, job.seed, work_dir / "tokens", shards)
    return trainer, TrainingSet.open(job, tokens)


def keep_share(model: MoDE, mesh: Mesh) -> None:
    """Take away, in place, what other workers have: other stages' layers, and other ranks' experts."""
    keep_stage(model, mesh)
    parallelize(model, mesh)


def _teachers(
    job: TrainingJob, store: ObjectStore, work_dir: Path, vocab_size: int, mesh: Mesh
) -> tuple[list[tuple[MoDE, Shares]], list[tuple[TopTeacher, Shares]]]:
    """Networks that run beside the student, and those whose answers are kept; with what each counts in each domain.

    Only the last pipeline stage, which asks them, has networks in memory.
    """
    networks: list[tuple[MoDE, Shares]] = []
    kept: list[tuple[TopTeacher, Shares]] = []
    if not isinstance(job, DistillJob):
        return networks, kept
    dtype = getattr(torch, job.dtype)
    for teacher, shares in zip(job.teachers, job.shares, strict=True):
        count = teacher.top_logits
        if teacher.endpoint is not None:
            assert count is not None
            answers: Ask = EndpointAnswers(teacher.endpoint, count, vocab_size)
            name = f"{teacher.endpoint.base_url} {teacher.endpoint.model}"
        else:
            assert teacher.version is not None
            folder = _fetch(teacher.version, store, work_dir)
            if count is None:
                teaching = Checkpoint.open(folder)
                share = partial(parallelize, mesh=mesh) if mesh.fully_sharded else None  # else each has all of it
                networks.append((teaching.network(dtype, share) if mesh.is_last_stage else teaching.outline(), shares))
                continue
            require_vocabulary(Checkpoint.open(folder).config.vocab_size, vocab_size)
            answers = NetworkAnswers(
                partial(Checkpoint.open(folder).network, dtype), count, job.temperature, mesh.device
            )
            name = f"{pinned(teacher.version, store)} {job.dtype}"
        kept.append((TopTeacher(answers, work_dir / "teachers", name, count, job.temperature), shares))
    return networks, kept


def _fetch(version: Any, store: ObjectStore, work_dir: Path) -> Path:
    ref: VersionRef = pinned(version, store)
    return fetch(store, ref, work_dir / "versions")
