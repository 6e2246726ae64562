"""A submitted job: the states it goes through with what follows from each, and what a cluster is told of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pydantic import BaseModel, ConfigDict, Field


@dataclass(frozen=True)
class _Consequences:
    """What being in a state means. `next`: the states that may follow."""

    next: frozenset[str]
    is_final: bool = False
    at_cluster: bool = False  # the cluster is to know of the job, and is asked how it goes
    can_be_cancelled: bool = False
    can_be_resumed: bool = False


class JobState(StrEnum):
    """queued → starting → running → succeeded or failed; any that is not final → cancelling → cancelled.

    Failed and cancelled jobs are queued again when somebody resumes them, running ones when the cluster lost them.
    """

    QUEUED = "queued"  # recorded; the cluster does not have it yet
    STARTING = "starting"  # the cluster has it; its process does not run yet
    RUNNING = "running"
    CANCELLING = "cancelling"  # somebody asked for its end; the cluster is being told
    SUCCEEDED = "succeeded"
    FAILED = "failed"  # the reason stands in the job's message
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return _LIFE[self].is_final

    @property
    def at_cluster(self) -> bool:
        return _LIFE[self].at_cluster

    @property
    def can_be_cancelled(self) -> bool:
        return _LIFE[self].can_be_cancelled

    @property
    def can_be_resumed(self) -> bool:
        return _LIFE[self].can_be_resumed

    def may_become(self, other: JobState) -> bool:
        return other in _LIFE[self].next


_LIFE = {
    JobState.QUEUED: _Consequences(frozenset({"starting", "failed", "cancelled"}), can_be_cancelled=True),
    JobState.STARTING: _Consequences(
        frozenset({"queued", "running", "succeeded", "failed", "cancelling"}), at_cluster=True, can_be_cancelled=True
    ),
    JobState.RUNNING: _Consequences(
        frozenset({"queued", "succeeded", "failed", "cancelling"}), at_cluster=True, can_be_cancelled=True
    ),
    JobState.CANCELLING: _Consequences(frozenset({"succeeded", "cancelled"}), at_cluster=True),
    JobState.SUCCEEDED: _Consequences(frozenset(), is_final=True),
    JobState.FAILED: _Consequences(frozenset({"queued"}), is_final=True, can_be_resumed=True),
    JobState.CANCELLED: _Consequences(frozenset({"queued"}), is_final=True, can_be_resumed=True),
}


class JobLaunch(BaseModel):
    """One attempt at a job, as it is handed to a cluster: a Python module with arguments, run on one of its nodes."""

    model_config = ConfigDict(frozen=True)

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,199}$", description="Unique; submitting it twice starts it once.")
    module: str = "zenray.training"
    arguments: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)


class ClusterJobState(StrEnum):
    """Ray's own states of a job."""

    PENDING = "PENDING"
    RUNNING = "RUNNING"
    STOPPED = "STOPPED"
    SUCCEEDED = "SUCCEEDED"
    FAILED = "FAILED"


class ClusterJob(BaseModel):
    """What a cluster says of one attempt."""

    model_config = ConfigDict(frozen=True)

    id: str
    state: ClusterJobState
    message: str = ""
