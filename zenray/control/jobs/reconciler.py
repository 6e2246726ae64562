"""Carries jobs through their lives: loads, asks cluster and store outside any session, writes if nothing has changed.

A job reports through its journal in the object store, not to control: so nothing is lost while control is down, and no
address or token of control's has to reach the machine that the job runs on.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Sequence

from sqlalchemy.exc import InterfaceError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from zenray.cluster.base import ClusterBackend
from zenray.control.db.engine import Database
from zenray.control.jobs.life import Decision, decide, unreachable
from zenray.control.jobs.repository import active, apply, keep_events, last_word, parse_records, view_of
from zenray.control.jobs.tables import JobRow
from zenray.spec.clock import Clock
from zenray.spec.errors import ClusterUnavailable, StorageUnavailable
from zenray.spec.job_events import JobEvent
from zenray.spec.job_life import ClusterJob, JobLaunch
from zenray.spec.jobs import read_job
from zenray.spec.platform import StorageSettings
from zenray.storage.base import ObjectStore
from zenray.storage.job_record import job_journal, launch_arguments, write_job

logger = logging.getLogger(__name__)


class JobReconciler:
    """One round is `step`; `run` repeats it in a thread of its own. Level-triggered, like the deployments'."""

    def __init__(
        self,
        database: Database,
        backend: ClusterBackend,
        store: ObjectStore,
        clock: Clock,
        *,
        storage: StorageSettings,
        work_dir: str,
    ) -> None:
        self._database = database
        self._backend = backend
        self._store = store
        self._clock = clock
        self._storage = storage
        self._work_dir = work_dir

    def step(self) -> None:
        """One round. Trouble, the cluster's, the store's or a job's own, ends up in the jobs' messages."""
        with self._database.read() as session:
            rows = active(session)
        if not rows:
            return
        try:
            seen: dict[str, ClusterJob] | None = self._backend.jobs()
            reason = ""
        except ClusterUnavailable as error:
            seen, reason = None, str(error)
        for row in rows:
            try:
                self._round_of(row, seen, reason)
            except (OperationalError, InterfaceError, PoolTimeout):  # the database is away
                raise
            except Exception as error:  # of this job alone: the others go on
                logger.exception("job %s cannot be carried on", row.id)
                self._write(row, unreachable(view_of(row), f"It cannot be carried on: {error}"), [], row.events_read)

    def _round_of(self, row: JobRow, seen: dict[str, ClusterJob] | None, reason: str) -> None:
        """One job's part. `reason`: why the cluster says nothing, where `seen` is None."""
        events, read = self._events(row)
        view = view_of(row)
        if seen is None:
            decision = unreachable(view, reason)
        else:
            with self._database.read() as session:
                said = last_word(session, row.id, events)
            decision = self._carry_out(row, decide(view, seen.get(view.launch_id), said))
        self._write(row, decision, events, read)

    def run(self, stop: threading.Event, interval_s: float) -> None:
        """Rounds until `stop` is set. A failure nobody expected is logged, and the next round starts from what is."""
        while not stop.is_set():
            try:
                self.step()
            except SQLAlchemyError as error:
                logger.warning("the job reconciler waits for the database: %s", error)
            except Exception:
                logger.exception("a round of the job reconciler failed")
            stop.wait(interval_s)

    def _events(self, row: JobRow) -> tuple[list[JobEvent], int]:
        """What the job has written since the last round. Read after the cluster was asked, so that a job that is over
        has written all."""
        try:
            records, read = job_journal(self._store, row.id).read(row.events_read)
        except StorageUnavailable as error:
            logger.warning("events of %s cannot be read now: %s", row.id, error)
            return [], row.events_read
        return parse_records(records), read

    def _carry_out(self, row: JobRow, decision: Decision) -> Decision:
        """Tell the cluster. What it does not take now stays to be done in the next round."""
        view = view_of(row)
        try:
            if decision.act == "submit":
                write_job(self._store, row.id, read_job(json.loads(row.document), where=row.id))
                arguments = launch_arguments(row.id, self._storage, self._work_dir)
                self._backend.submit(JobLaunch(id=view.launch_id, arguments=arguments))
            elif decision.act == "cancel":
                self._backend.cancel(view.launch_id)
        except (ClusterUnavailable, StorageUnavailable) as error:
            return unreachable(view, str(error))
        return decision

    def _write(self, read_row: JobRow, decision: Decision, events: Sequence[JobEvent], read: int) -> None:
        """Step three: written only if the row is still the one that was read."""
        now = self._clock.now()
        with self._database.write() as session:
            row = session.get_one(JobRow, read_row.id, with_for_update=True)
            if row.row_version != read_row.row_version:
                return
            keep_events(session, row, events, read, now=now)
            before = row.state
            apply(session, row, decision, now=now)
            if row.state != before:
                logger.info("job %s: %s → %s %s", row.id, before, row.state, row.message or "")
