"""Runs that a person submits with `zenray run FILE`: one YAML document each, told apart by `kind`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, field_validator, model_validator

from zenray.spec.documents import Document, load_document, read_document
from zenray.spec.errors import InvalidDocument, suggest
from zenray.spec.evaluation import ChoiceQuestions, EvaluateJob, PublishJob
from zenray.spec.lineage import BaseVersion
from zenray.spec.training import DataSource, DistillJob, PretrainJob
from zenray.spec.upcycling import UpcycleJob
from zenray.spec.versions import check_name

PhaseJob = Annotated[UpcycleJob | PretrainJob | DistillJob | EvaluateJob | PublishJob, Field(discriminator="kind")]


class PipelineJob(Document):
    """Jobs one after another, as one: each starts when the one before it has published, and is not run twice.

    Its phases are whole job documents. A pipeline that was killed goes on where it stood.
    """

    kind: Literal["pipeline"]
    name: str
    phases: tuple[PhaseJob, ...] = Field(min_length=1)

    @field_validator("name")
    @classmethod
    def _legal(cls, value: str) -> str:
        return check_name("job", value)

    @model_validator(mode="after")
    def _phases_differ(self) -> PipelineJob:
        names = [phase.name for phase in self.phases]
        if len(set(names)) != len(names):
            raise ValueError(f"names of phases repeat: {', '.join(names)}")
        made = [(phase.into.model, phase.into.version) for phase in self.phases if not isinstance(phase, EvaluateJob)]
        if len(set(made)) != len(made):
            raise ValueError("two phases publish the same version")
        evaluated = {_said(phase.version) for phase in self.phases if isinstance(phase, EvaluateJob)}
        for phase in self.phases:
            asks = isinstance(phase, PublishJob) and (phase.largest_perplexity or phase.least_accuracy)
            if isinstance(phase, PublishJob) and asks and _said(phase.version) not in evaluated:
                raise ValueError(f"phase {phase.name!r} has conditions, but no phase evaluates {_said(phase.version)}")
        return self


def _said(version: BaseVersion) -> str:
    return f"{version.model}@{version.version or 'newest'}"


class _Kind(BaseModel):
    """The first look at a job file; all else in it is read by its kind's schema."""

    kind: str


Job = UpcycleJob | PretrainJob | DistillJob | EvaluateJob | PipelineJob
SCHEMAS: dict[str, type[Job]] = {
    "upcycle": UpcycleJob,
    "pretrain": PretrainJob,
    "distill": DistillJob,
    "evaluate": EvaluateJob,
    "pipeline": PipelineJob,
}
_NOT_OF_THE_RESULT = frozenset({"workers", "gpu", "checkpoints", "faults", "tracking"})


def load_job(path: Path) -> Job:
    """The job in a file, in the schema of its kind. InvalidDocument with file, line, and what to write instead."""
    return load_document(path, _schema(load_document(path, _Kind).kind, str(path)))


def read_job(data: Any, *, where: str) -> Job:
    """As `load_job`, for a document that is already parsed; `where` names it in errors."""
    kind = data.get("kind") if isinstance(data, dict) else None
    if not isinstance(kind, str):
        raise InvalidDocument(f"{where}: a job has a key 'kind'.", hint=suggest("", SCHEMAS))
    return read_document(data, _schema(kind, where), where=where)


def _schema(kind: str, where: str) -> type[Job]:
    if kind not in SCHEMAS:
        raise InvalidDocument(f"{where}: there is no kind of job {kind!r}.", hint=suggest(kind, SCHEMAS))
    return SCHEMAS[kind]


def job_id(job: Document) -> str:
    """The job's name and a digest of all that changes its result: another file is another job, never a resumed one.

    Not of `workers`, which change little of the result (see there): a job may go on with more or fewer. Nor of what is
    as it is by default, written or not: a field that is new leaves the ids of jobs without it alone. For a job whose
    versions are pinned (zenray.storage.pinning), so that it means the same later.
    """
    about = _of_the_result(job.model_dump(mode="json", exclude_defaults=True))
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return f"{about['name']}-{digest[:12]}"


def _of_the_result(about: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in about.items() if key not in _NOT_OF_THE_RESULT}
    if "phases" in kept:
        kept["phases"] = [_of_the_result(phase) for phase in kept["phases"]]
    return kept


D = TypeVar("D", bound=Document)


def change_parts(document: D, kind: type[Document], change: Callable[[Any], Document]) -> D:
    """A copy of `document` in which each part of type `kind`, however deep, is what `change` makes of it."""
    changed: dict[str, object] = {}
    for name in type(document).model_fields:
        value = getattr(document, name)
        if isinstance(value, kind):
            new: object = change(value)
        elif isinstance(value, Document):
            new = change_parts(value, kind, change)
        elif isinstance(value, tuple):
            parts = [change(part) if isinstance(part, kind) else part for part in value]
            new = tuple(
                change_parts(part, kind, change) if isinstance(part, Document) and not isinstance(part, kind) else part
                for part in parts
            )
        else:
            continue
        if new != value:
            changed[name] = new
    return document.model_copy(update=changed)


def with_absolute_paths(job: D) -> D:
    """`job` with every path of data named from the root, so that it means the same in another folder."""

    def absolute(part: Any) -> Document:
        assert isinstance(part, DataSource | ChoiceQuestions)
        if part.path is None or "://" in part.path:
            return part
        return part.model_copy(update={"path": str(Path(part.path).absolute())})

    return change_parts(change_parts(job, DataSource, absolute), ChoiceQuestions, absolute)
