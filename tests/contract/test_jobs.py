"""A training job through control, on a real Ray: submitted, cancelled, resumed, with control started anew meanwhile."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.ray_session import RaySession
from tests.contract.training_platform import Run
from zenray.control.db.engine import Database, open_database
from zenray.control.db.migrate import migrate
from zenray.control.jobs.reconciler import JobReconciler
from zenray.control.jobs.repository import events_after
from zenray.control.jobs.service import cancel_job, get_job, resume_job, submit_job
from zenray.spec.clock import SystemClock
from zenray.spec.job_life import JobState
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.pinning import pin
from zenray.storage.versions import find_manifest

pytestmark = pytest.mark.contract
PATIENCE_S = 300


class Control:
    """Control's part in jobs. `restart` is what a killed control comes back with: the database, nothing else."""

    def __init__(self, folder: Path, session: RaySession, run: Run) -> None:
        self.run, self._session = run, session
        self._url = f"sqlite:///{folder / 'control.db'}"
        self._work_dir = str(folder / "work")
        self.database = open_database(self._url)
        migrate(self.database)
        self.restart()

    def restart(self) -> None:
        self.database.close()
        self.database: Database = open_database(self._url)
        self.reconciler = JobReconciler(
            self.database,
            self._session.cluster,
            self.run.store,
            SystemClock(),
            storage=StorageSettings(uri=self.run.store.uri),
            work_dir=self._work_dir,
        )

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < deadline, (self.state, self.events()[-5:], self.logs())
            self.reconciler.step()
            time.sleep(0.1)

    @property
    def state(self) -> tuple[JobState, str | None]:
        with self.database.read() as session:
            row = get_job(session, "tiny")
            return JobState(row.state), row.message

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        with self.database.read() as session:
            rows = events_after(session, get_job(session, "tiny").id, 0, 10_000)
        return [json.loads(row.body) for row in rows if kind in (None, row.event)]

    def logs(self) -> str:
        with self.database.read() as session:
            row = get_job(session, "tiny")
        return self._session.cluster.job_logs(f"{row.id}.{row.attempt}")


@pytest.fixture
def control(tmp_path: Path, ray_session: RaySession) -> Control:
    return Control(tmp_path, ray_session, Run(tmp_path / "run", {}))


def test_a_job_is_cancelled_and_goes_on_where_it_stood(control: Control) -> None:
    wanted = control.run.job(
        steps=24, checkpoints={"every_steps": 3}, workers={"count": 2, "expert_parallel": 2, "cpus": 0.5}
    )
    now = time.time()
    with control.database.write() as session:
        submit_job(session, pin(wanted, control.run.store), now=now)
    control.until(lambda: len(control.events("checkpoint")) >= 2)
    assert control.state == (JobState.RUNNING, None)
    control.restart()
    with control.database.write() as session:
        cancel_job(session, "tiny", now=now)
    control.until(lambda: control.state[0].is_final)
    assert control.state[0] is JobState.CANCELLED, control.state
    assert find_manifest(control.run.store, VersionRef(model="tiny", version="v1")) is None

    with control.database.write() as session:
        resume_job(session, "tiny", now=now)
    control.until(lambda: len(control.events("resumed")) == 1)
    control.restart()
    control.until(lambda: control.state[0].is_final)
    assert control.state == (JobState.SUCCEEDED, None), control.logs()
    assert control.events("resumed")[0]["step"] >= 3
    steps = [event["step"] for event in control.events("step")]
    assert sorted(set(steps)) == list(range(24)) and len(control.events("published")) == 1
    assert "step 24" in control.logs()
    assert [(e["from_state"], e["to_state"]) for e in control.events("state")] == [
        (None, "queued"),
        ("queued", "starting"),
        ("starting", "running"),
        ("running", "cancelling"),
        ("cancelling", "cancelled"),
        ("cancelled", "queued"),
        ("queued", "starting"),
        ("starting", "running"),
        ("running", "succeeded"),
    ]
    manifest = find_manifest(control.run.store, VersionRef(model="tiny", version="v1"))
    assert manifest is not None and {entry.path for entry in manifest.files} >= {"config.json", "history.jsonl"}


def test_a_job_that_cannot_work_says_why_in_its_own_words(control: Control) -> None:
    wanted = control.run.job(stock_format="exact")  # which no stock class can say: its selection has a bias
    with control.database.write() as session:
        submit_job(session, pin(wanted, control.run.store), now=time.time())
    control.until(lambda: control.state[0].is_final)
    state, message = control.state
    assert state is JobState.FAILED and message is not None and "bias" in message and "Traceback" not in message
