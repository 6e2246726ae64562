"""What to do about one job, given what the cluster says: pure functions of (job, seen, said) → decision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from zenray.spec.job_life import ClusterJob, ClusterJobState, JobState

MOST_LOST = 3
CANCELLED = "Cancelled by an administrator."
_LOG_LINES = 8


@dataclass(frozen=True)
class JobView:
    """A job as the database has it."""

    id: str
    state: JobState
    message: str | None
    attempt: int
    lost: int

    @property
    def launch_id(self) -> str:
        """The name under which the cluster knows this attempt."""
        return f"{self.id}.{self.attempt}"


@dataclass(frozen=True)
class Decision:
    """What the job should be written down as, and what the cluster is to be told first."""

    state: JobState
    message: str | None
    attempt: int
    lost: int
    act: Literal["nothing", "submit", "cancel"] = "nothing"


def decide(job: JobView, seen: ClusterJob | None, said: str | None) -> Decision:
    """One round's decision. `seen`: what the cluster says of this attempt; `said`: the job's own last word, if it
    failed."""
    if job.state is JobState.QUEUED:
        # Carried out before it is written down: if control dies in between, it is submitted again, which does nothing.
        return _to(job, JobState.STARTING, act="submit")
    if job.state is JobState.CANCELLING:
        return _cancelling(job, seen)
    if not job.state.at_cluster:
        return _to(job, job.state, job.message)
    if seen is None:
        return _lost(job)
    if seen.state is ClusterJobState.PENDING:
        return _to(job, job.state, seen.message or None)
    if seen.state is ClusterJobState.RUNNING:
        return _to(job, JobState.RUNNING, lost=job.lost)
    if seen.state is ClusterJobState.SUCCEEDED:
        return _to(job, JobState.SUCCEEDED)
    if seen.state is ClusterJobState.STOPPED:
        return _to(job, JobState.FAILED, "It was stopped on the cluster, not through zenray.")
    return _to(job, JobState.FAILED, said or why(seen.message))


def unreachable(job: JobView, reason: str) -> Decision:
    """The cluster cannot be asked: the job may well be running. The reason is shown."""
    return _to(job, job.state, reason)


def _cancelling(job: JobView, seen: ClusterJob | None) -> Decision:
    if seen is None or seen.state in (ClusterJobState.STOPPED, ClusterJobState.FAILED):
        return _to(job, JobState.CANCELLED, CANCELLED)
    if seen.state is ClusterJobState.SUCCEEDED:
        return _to(job, JobState.SUCCEEDED, "It was done before it could be cancelled.")
    return _to(job, job.state, job.message, act="cancel")


def _lost(job: JobView) -> Decision:
    """The cluster was started anew and knows nothing of the job."""
    if job.lost + 1 > MOST_LOST:
        return _to(
            job,
            JobState.FAILED,
            f"The cluster lost it {job.lost + 1} times in a row, perhaps because of it. Its log may say why; resume it "
            "to try again.",
        )
    message = f"The cluster lost it (attempt {job.attempt}); it goes on from its last checkpoint."
    return Decision(JobState.QUEUED, message, job.attempt + 1, job.lost + 1)


def _to(
    job: JobView,
    state: JobState,
    message: str | None = None,
    *,
    lost: int | None = None,
    act: Literal["nothing", "submit", "cancel"] = "nothing",
) -> Decision:
    return Decision(state, message, job.attempt, job.lost if lost is None else lost, act)


def why(message: str) -> str:
    """Ray's words about a job that failed, cut to the last lines of its log."""
    lines = [line for line in message.splitlines() if line.strip()]
    if len(lines) <= _LOG_LINES + 1:
        return "\n".join(lines) or "The cluster gives no reason."
    return "\n".join([lines[0], "…", *lines[-_LOG_LINES:]])
