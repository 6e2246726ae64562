"""The seam to whatever runs Ray: Serve applications and jobs go in, their state comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from zenray.spec.job_life import ClusterJob, JobLaunch
from zenray.spec.serving import ServeApplication, ServeStatus


class ClusterBackend(Protocol):
    """A cluster that can run Serve applications and jobs. All methods block for at most 30 s and are idempotent.

    Raises ClusterUnavailable when the cluster cannot be reached; a broken application or job is a state, not an error.
    A cluster that was started anew knows nothing of earlier applications and jobs.
    """

    def serve_status(self) -> ServeStatus:
        """What Ray Serve runs now. Empty before anything was ever applied."""

    def apply(self, applications: Sequence[ServeApplication]) -> None:
        """Make these applications, and no others, the wish. Returns before they run; poll `serve_status`."""

    def submit(self, launch: JobLaunch) -> None:
        """Run this job. Returns before it runs; a job whose id was submitted before is left as it is."""

    def jobs(self) -> dict[str, ClusterJob]:
        """Every job that the cluster knows of, by id."""

    def job_logs(self, id: str) -> str:
        """What the job's process has printed so far; "" for a job that the cluster does not know."""

    def cancel(self, id: str) -> None:
        """Ask a job to end (SIGTERM, then SIGKILL); returns before it has. One that is over or unknown stays so."""
