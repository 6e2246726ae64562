"""Carries out one job of any kind: the phases of a pipeline are such jobs, one after another, none of them twice."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from zenray.spec.documents import Document
from zenray.spec.errors import Conflict, InvalidValue, ZenrayError
from zenray.spec.evaluation import EvaluateJob, EvaluationResult, PublishJob
from zenray.spec.job_events import Phase, Published, Started
from zenray.spec.jobs import PhaseJob, PipelineJob, job_id
from zenray.spec.platform import StorageSettings
from zenray.spec.training import DistillJob, PretrainJob
from zenray.spec.upcycling import UpcycleJob
from zenray.spec.versions import Manifest, Parents, VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.cache import fetch
from zenray.storage.job_record import read_result, report_key, write_result
from zenray.storage.opening import open_store
from zenray.storage.pinning import pin, pinned
from zenray.storage.versions import find_manifest, list_versions, publish
from zenray.training.events import EventStream, ProgressEvents
from zenray.training.tracking import check_trackers


def carry_out(job: Document, storage: StorageSettings, work_dir: Path, tell: EventStream) -> list[Manifest]:
    """Do what the job says, and return the versions that are then published. Blocks, perhaps for weeks.

    Idempotent: what is published already is returned, and a job that was killed at any moment goes on. Raises what the
    kind of job raises; Conflict when the version that it is to make exists and is another job's.
    """
    store = open_store(storage)
    if isinstance(job, PipelineJob):
        return _pipeline(job, storage, store, work_dir, tell)
    tell(Started(kind=str(getattr(job, "kind", "")), steps=getattr(job, "steps", None)))
    made: list[Manifest] = []
    if isinstance(job, UpcycleJob):
        made = _upcycle(job, store, work_dir, tell)
    elif isinstance(job, PretrainJob | DistillJob):
        check_trackers(job)
        from zenray.training.runner import run as train  # imports Ray and torch

        made = [train(job, storage, work_dir, progress=ProgressEvents(tell), events=tell.place)]
    elif isinstance(job, EvaluateJob):
        _evaluate(job, storage, store, work_dir, tell)
    elif isinstance(job, PublishJob):
        made = [_publish(job, store, work_dir, tell)]
    else:
        raise InvalidValue(f"Jobs of type {type(job).__name__} cannot be carried out.")
    for manifest in made:
        run = manifest.metadata.get("run") if isinstance(job, PretrainJob | DistillJob) else None
        report = None if run is None else f"{store.uri}/{report_key(run)}"
        tell(Published(ref=str(manifest.ref), size_bytes=manifest.size_bytes, report=report))
    return made


def _pipeline(
    job: PipelineJob, storage: StorageSettings, store: ObjectStore, work_dir: Path, tell: EventStream
) -> list[Manifest]:
    made: list[Manifest] = []
    results: dict[str, EvaluationResult] = {}
    tell(Started(kind=job.kind))
    for number, phase in enumerate(job.phases, 1):
        phase = pin(phase, store)  # what earlier phases publish is there by now
        said = tell.in_phase(phase.name)

        def at(state: str, name: str = phase.name, number: int = number) -> None:
            tell(Phase(name=name, number=number, of=len(job.phases), state=state))

        done = _done(phase, store)
        if done is None:
            at("started")
            _check_conditions(phase, results, store)
            made += carry_out(phase, storage, work_dir, said)
        else:
            from zenray.training.leftovers import drop_checkpoints  # imports pyarrow

            made += done
            drop_checkpoints(storage, job_id(phase))  # where it was killed before it came to that
        if isinstance(phase, EvaluateJob):
            result = read_result(store, job_id(phase))
            assert result is not None
            results[result.version] = result
        at("skipped" if done is not None else "done")
    return made


def _done(phase: PhaseJob, store: ObjectStore) -> list[Manifest] | None:
    """What the phase has published, when it is over; [] for an evaluation, which publishes nothing. Conflict."""
    if isinstance(phase, EvaluateJob):
        return None if read_result(store, job_id(phase)) is None else []
    existing = find_manifest(store, VersionRef(model=phase.into.model, version=phase.into.version))
    if existing is None:
        return None
    if existing.metadata.get("run") == job_id(phase):
        return [existing]
    if isinstance(phase, UpcycleJob):
        return None  # made again, it is the same bytes, and publishing those changes nothing; others are a Conflict
    raise Conflict(
        f"{existing.ref} exists, and was not made by this job as it stands.", hint="Publish into another version."
    )


def _upcycle(job: UpcycleJob, store: ObjectStore, work_dir: Path, tell: EventStream) -> list[Manifest]:
    job = pin(job, store)
    done = find_manifest(store, VersionRef(model=job.into.model, version=job.into.version))
    if done is not None and done.metadata.get("run") == job_id(job):
        return [done]
    from zenray.model.upcycling.runner import run  # imports torch

    return run(job, store, work_dir, run=job_id(job), progress=ProgressEvents(tell))


def _evaluate(
    job: EvaluateJob, storage: StorageSettings, store: ObjectStore, work_dir: Path, tell: EventStream
) -> None:
    job = pin(job, store)
    if job.gpu:
        from zenray.training.evaluate_task import evaluate_in_task  # imports Ray and torch

        result = evaluate_in_task(job, storage, work_dir, tell, gpus=1)
    else:
        from zenray.training.evaluate import evaluate  # imports torch

        result = evaluate(job, store, work_dir, tell)
    write_result(store, job_id(job), result)


def _publish(job: PublishJob, store: ObjectStore, work_dir: Path, tell: EventStream) -> Manifest:
    """The same files under another name, in every format that the version has; the one that was named comes last."""
    job = pin(job, store)
    source = pinned(job.version, store)
    formats = [one for one in list_versions(store, source.model) if one.ref.version == source.version]
    made: list[Manifest] = []
    for manifest in sorted(formats, key=lambda one: one.ref == source):
        folder = fetch(store, manifest.ref, work_dir / "versions", progress=ProgressEvents(tell))
        ref = VersionRef(model=job.into.model, version=job.into.version, format=manifest.ref.format)
        parents = Parents(base_version=str(manifest.ref), training_job=job.name)
        about = {**manifest.metadata, "kind": job.kind, "run": job_id(job)}
        with tempfile.TemporaryDirectory(dir=work_dir, prefix=f"{job.name}-") as scratch:
            for entry in manifest.files:  # and nothing else that lies in the cache
                link = Path(scratch, entry.path)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(folder / entry.path)
            progress = ProgressEvents(tell)
            made.append(publish(store, ref, Path(scratch), parents=parents, metadata=about, progress=progress))
    return made[-1]


def _check_conditions(phase: PhaseJob, results: dict[str, EvaluationResult], store: ObjectStore) -> None:
    """ZenrayError, with the numbers, for a version that is not good enough to be published."""
    if not isinstance(phase, PublishJob) or not (phase.largest_perplexity or phase.least_accuracy):
        return
    result = results.get(str(pinned(phase.version, store)))
    if result is None:
        raise InvalidValue(f"{phase.name}: no phase before it has evaluated {phase.version.model}.")
    perplexities = {one.domain: one.perplexity for one in result.domains}
    accuracies = {one.name: one.accuracy for one in result.choices}
    failures = [
        f"the perplexity of {name} is {_shown(perplexities.get(name))}, not at most {most:g}"
        for name, most in phase.largest_perplexity.items()
        if not perplexities.get(name, math.inf) <= most
    ] + [
        f"the accuracy of {name} is {_shown(accuracies.get(name))}, not at least {least:g}"
        for name, least in phase.least_accuracy.items()
        if not accuracies.get(name, -math.inf) >= least
    ]
    if failures:
        raise ZenrayError(
            f"{result.version} is not published: {'; '.join(failures)}.",
            hint="Train on, or change the phase's conditions.",
        )


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"
