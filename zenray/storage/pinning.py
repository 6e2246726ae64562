"""Which exact versions a job starts from: found in the store once, when the job is submitted."""

from __future__ import annotations

from typing import TypeVar

from zenray.spec.documents import Document
from zenray.spec.jobs import PipelineJob, change_parts, with_absolute_paths
from zenray.spec.lineage import BaseVersion
from zenray.spec.versions import VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.versions import newest, read_manifest

D = TypeVar("D", bound=Document)


def pinned(version: BaseVersion, store: ObjectStore) -> VersionRef:
    """The version meant: the one named, or the newest. NotFound, with those there are."""
    if version.version is None:
        return newest(store, version.model, version.format).ref
    ref = VersionRef(model=version.model, version=version.version, format=version.format)
    return read_manifest(store, ref).ref


def pin(job: D, store: ObjectStore) -> D:
    """`job` with every version named and every path absolute, so that it means the same later and elsewhere. NotFound.

    In a pipeline, what an earlier phase publishes need not be there yet.
    """
    made: set[tuple[str, str]] = set()
    if isinstance(job, PipelineJob):
        made = {(phase.into.model, phase.into.version) for phase in job.phases if hasattr(phase, "into")}

    def named(version: BaseVersion) -> BaseVersion:
        if version.version is not None and (version.model, version.version) in made:
            return version
        return BaseVersion(**pinned(version, store).model_dump())

    return change_parts(with_absolute_paths(job), BaseVersion, named)
