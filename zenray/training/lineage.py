"""Which exact versions a run starts from, and the name under which it can be resumed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from zenray.spec.lineage import BaseVersion
from zenray.spec.training import DistillJob, TrainingJob
from zenray.spec.versions import VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.versions import newest, read_manifest


def pinned(version: BaseVersion, store: ObjectStore) -> VersionRef:
    """The version meant: the one named, or the newest. NotFound, with those there are."""
    if version.version is None:
        return newest(store, version.model, version.format).ref
    ref = VersionRef(model=version.model, version=version.version, format=version.format)
    return read_manifest(store, ref).ref


def pin(job: TrainingJob, store: ObjectStore) -> TrainingJob:
    """`job` with every version named and every path absolute, so that it means the same later and elsewhere."""

    def named(version: BaseVersion) -> BaseVersion:
        return BaseVersion(**pinned(version, store).model_dump())

    sources = tuple(
        source if source.path is None else source.model_copy(update={"path": str(Path(source.path).absolute())})
        for source in job.data.sources
    )
    data = job.data.model_copy(update={"sources": sources})
    changed: dict[str, object] = {"base": named(job.base), "data": data}
    if isinstance(job, DistillJob):
        changed["teachers"] = tuple(
            teacher.model_copy(update={"version": named(teacher.version)}) for teacher in job.teachers
        )
    return job.model_copy(update=changed)


def run_name(job: TrainingJob) -> str:
    """The job's name and a digest of all that changes its result: another file is another run, never a resumed one.

    Not of `workers`, on which the result does not depend: a run may go on with more or fewer.
    """
    about = job.model_dump(mode="json", exclude={"workers", "checkpoints"})
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{job.name}-{digest[:12]}"
