"""Where a job lies in the object store: its document, journal, result and report, below `jobs/{id}/`."""

from __future__ import annotations

import json

from zenray.spec.evaluation import EvaluationResult
from zenray.spec.jobs import Job, read_job
from zenray.spec.platform import StorageSettings
from zenray.storage.base import ObjectStore
from zenray.storage.journal import Journal


def job_journal(store: ObjectStore, id: str) -> Journal:
    """What the job says, through all its attempts."""
    return Journal(store, f"jobs/{id}/events/")


def write_job(store: ObjectStore, id: str, job: Job) -> None:
    """The document that the job's process will read, in the place of an earlier one with other workers."""
    store.put_bytes(f"jobs/{id}/job.json", job.model_dump_json(indent=1).encode())


def read_recorded_job(store: ObjectStore, id: str) -> Job:
    """NotFound; InvalidDocument when another version of zenray wrote it."""
    return read_job(json.loads(store.get_bytes(f"jobs/{id}/job.json")), where=f"jobs/{id}/job.json")


def write_result(store: ObjectStore, id: str, result: EvaluationResult) -> None:
    store.put_bytes(f"jobs/{id}/result.json", result.model_dump_json(indent=1).encode())


def read_result(store: ObjectStore, id: str) -> EvaluationResult | None:
    """What an evaluation found; None before it is done."""
    key = f"jobs/{id}/result.json"
    return None if store.head(key) is None else EvaluationResult.model_validate_json(store.get_bytes(key))


def report_key(id: str) -> str:
    """The page with the plots of a training job; it is also a file of the version that the job publishes."""
    return f"jobs/{id}/report.html"


def attribution_prefix(id: str) -> str:
    """What an evaluation says about experts: data, and a page."""
    return f"jobs/{id}/attribution/"


def launch_arguments(id: str, storage: StorageSettings, work_dir: str) -> tuple[str, ...]:
    """For `python -m zenray.training`: run the job that is recorded in the store under this id."""
    endpoint = ("--endpoint-url", storage.endpoint_url) if storage.endpoint_url else ()
    return ("--job", id, "--store", storage.uri, *endpoint, "--work-dir", work_dir)
