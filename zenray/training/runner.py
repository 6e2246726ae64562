"""Carries out a training job: Ray Train runs the workers, and what they made is published as a version."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from zenray.model.balance import load_report
from zenray.model.hf.export import STOCK_FORMATS, choose_target, export
from zenray.model.weights import TensorPlan
from zenray.spec.errors import Conflict, ZenrayError
from zenray.spec.jobs import job_id
from zenray.spec.platform import StorageSettings
from zenray.spec.training import DistillJob, TrainingJob
from zenray.spec.versions import Manifest, Parents, VersionRef
from zenray.storage.base import ObjectStore, Progress
from zenray.storage.cache import fetch
from zenray.storage.job_record import report_key
from zenray.storage.opening import open_store
from zenray.storage.pinning import pin, pinned
from zenray.storage.versions import find_manifest, publish, read_manifest
from zenray.training.attempts import Attempt, fit
from zenray.training.checkpointing import read_weight, weight_shapes
from zenray.training.context_parallel import check_experts
from zenray.training.data.shards import TokenShards, tokenise_on_cluster
from zenray.training.events import EventPlace
from zenray.training.history import HISTORY_NAME, Event, files_in, identities_in, read_history
from zenray.training.leftovers import checkpoint_place, drop_checkpoints
from zenray.training.networks import Checkpoint, write_checkpoint
from zenray.training.reading import StoredCheckpoint
from zenray.training.report import REPORT_NAME, write_report
from zenray.training.stages import check_stages
from zenray.training.trainable import choose


def run(
    job: TrainingJob,
    storage: StorageSettings,
    work_dir: Path,
    *,
    progress: Progress | None = None,
    events: EventPlace | None = None,
) -> Manifest:
    """Train, and publish `job.into`. Blocks. Starts Ray on this machine unless it is connected already.

    Idempotent: what is published already is returned; killed at any moment and run again, it goes on from the last
    checkpoint, and the result is the same. Checkpoints are deleted once the version is there. Raises NotFound for an
    unknown base or teacher, InvalidValue for what cannot be trained, Conflict when `job.into` exists and is another
    job's, ZenrayError when the run ends without a result.
    """
    store = open_store(storage)
    job = pin(job, store)
    name = job_id(job)
    ref = VersionRef(model=job.into.model, version=job.into.version)
    existing = find_manifest(store, ref)
    if existing is not None:
        if existing.metadata.get("run") != name:
            raise Conflict(
                f"{ref} exists, and was not made by this job as it stands.", hint="Publish into another version."
            )
        drop_checkpoints(storage, name)  # where it was killed before it came to that
        return existing
    base = Checkpoint.open(fetch(store, pinned(job.base, store), work_dir / "versions", progress=progress))
    check_stages(base.config, job.train, job.workers.pipeline_parallel)
    check_experts(base.config, job.workers.context_parallel)
    if job.stock_format != "none":  # what cannot be said is refused before the training, not after
        choose_target(base.config, replicate_dense=job.stock_format == "replicate")
    choose(base.outline(), job.train)
    with _held(work_dir / "runs" / f"{name}.lock", name):
        connect()
        filesystem, folder = checkpoint_place(storage)
        place = events or EventPlace(name)
        about: dict[str, Any] = {
            "job": job.model_dump(mode="json"),
            "run": name,
            "storage": storage.model_dump(),
            "work_dir": str(work_dir.absolute()),
            "events": place.as_dict(),
            "shards": _tokenise(job, base, storage),
        }
        attempt = Attempt(job, name, about, storage, place, filesystem, folder)
        result = fit(attempt)
        # What workers returned, not their last report's metrics: Ray keeps only those that come with a checkpoint.
        while (result.return_value or {}).get("was_preempted"):  # all is in a checkpoint: on, wherever there is room
            result = fit(attempt)
    stopped = (result.return_value or {}).get("stopped")
    if stopped:
        raise ZenrayError(
            f"Run {name} stopped: {stopped}.",
            hint="Its last checkpoint is from before that. Run the job again with other `faults` to go on from there.",
        )
    if result.checkpoint is None:
        raise ZenrayError(f"Run {name} ended without a checkpoint.")
    checkpoint = StoredCheckpoint(result.checkpoint.filesystem, result.checkpoint.path)
    manifest = publish_result(job, name, store, base, checkpoint, work_dir, progress)
    drop_checkpoints(storage, name)
    return manifest


def connect() -> None:
    """To Ray: the one that is named in the environment, or one on this machine. Idempotent."""
    if not ray.is_initialized():
        # With the dashboard: Ray Train asks it whether a run's driver lives, and clears up after one that does not.
        own = {} if "RAY_ADDRESS" in os.environ else {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        ray.init(log_to_driver=True, **own)


def _tokenise(job: TrainingJob, base: Checkpoint, storage: StorageSettings) -> TokenShards | None:
    """What the cluster makes for all workers, where the job asks for it."""
    if job.data.tokenised_by == "workers":
        return None
    filesystem, path = checkpoint_place(storage)
    return tokenise_on_cluster(job.data, base.tokenizer_file, base.end_token, filesystem, f"{path}/tokens")


@contextmanager
def _held(path: Path, name: str) -> Iterator[None]:
    """This driver alone carries out the run. The lock is let go when the process ends, however it does. Conflict."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise Conflict(
            f"Run {name} is being carried out by another process.", hint="Wait for it, or end that process first."
        ) from None
    try:
        yield
    finally:
        lock.release()


def publish_result(
    job: TrainingJob,
    name: str,
    store: ObjectStore,
    base: Checkpoint,
    checkpoint: StoredCheckpoint,
    work_dir: Path,
    progress: Progress | None,
) -> Manifest:
    """Whole tensors out of the checkpoint, one at a time, in the base version's layout and dtype."""
    history = read_history(checkpoint)
    # As the base version has them; a dense base's names are the same.
    plans = [TensorPlan(name, shape, base.dtype_of(name)) for name, shape in weight_shapes(checkpoint).items()]
    with tempfile.TemporaryDirectory(dir=work_dir, prefix=f"{job.name}-") as scratch:
        made = Path(scratch, "safetensors")
        write_checkpoint(base, plans, lambda plan: _read(base, checkpoint, plan), made)
        (made / HISTORY_NAME).write_bytes(checkpoint.read_bytes(HISTORY_NAME))
        page = write_report(f"{job.into.model}@{job.into.version}", history, job.model_dump(mode="json"))
        (made / REPORT_NAME).write_text(page, encoding="utf-8")
        store.put_bytes(report_key(name), page.encode())
        origin = read_manifest(store, pinned(job.base, store))
        parents = Parents(base_version=str(origin.ref), training_job=job.name, data_files=files_in(history))
        metadata = {"kind": job.kind, "run": name, "job": job.model_dump_json(), **_metrics(job, history)}
        metadata |= origin.inherited
        ref = VersionRef(model=job.into.model, version=job.into.version)
        if job.stock_format != "none":  # first, so that a version whose own format is there has all of its formats
            stock = Path(scratch, "stock")
            target = export(made, stock, replicate_dense=job.stock_format == "replicate", progress=progress)
            stock_ref = ref.model_copy(update={"format": STOCK_FORMATS[target]})
            about = {**metadata, "exported_from": str(ref)}
            publish(store, stock_ref, stock, parents=parents, metadata=about, progress=progress)
        return publish(store, ref, made, parents=parents, metadata=metadata, progress=progress)


def _read(base: Checkpoint, checkpoint: StoredCheckpoint, plan: TensorPlan) -> Tensor:
    """A trained tensor, or a frozen one as it was before it was rounded for the arithmetic."""
    found = read_weight(checkpoint, plan.name)
    return base.read(plan.name) if found.dtype.itemsize < plan.dtype.itemsize else found


def _even(steps: list[Event]) -> list[float]:
    """H / log E of each sparse layer's load over some steps: a single one of few tokens says little."""
    loads = [
        torch.tensor(step["loads"], dtype=torch.double) * step.get("loads_tokens", step["tokens"])
        for step in steps
        if step.get("loads")
    ]
    return [load_report(load_E).entropy_ratio for load_E in torch.stack(loads).sum(dim=0)] if loads else []


def _metrics(job: TrainingJob, history: list[Event]) -> dict[str, str]:
    """What the manifest says of the run: data, losses before and after, and how evenly experts were loaded."""
    steps = [event for event in history if event["event"] == "step"]
    evaluations = [event for event in history if event["event"] == "evaluation"]
    found: dict[str, Any] = {
        "data": identities_in(history),
        "tokens": sum(event["tokens"] for event in steps),
        "training_loss": steps[-1]["lm_loss"],
        "entropy_ratios": _even(steps[-max(1, len(steps) // 10) :]),
    }
    for event in evaluations:
        when = "before" if event["step"] == 0 else "after" if event["step"] == job.steps else None
        if when:
            about = found.setdefault("validation", {}).setdefault(event["domain"], {})
            about[when] = {**about.get(when, {}), "loss": event["loss"], "perplexity": math.exp(event["loss"])}
            if "teacher_0" in event:
                about["teacher"] = event["teacher_0"]
    if isinstance(job, DistillJob):
        found["kl"] = {"first": steps[0]["kl"], "last": steps[-1]["kl"]}
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in found.items()}
