"""Jobs from submission to their end, over a fake cluster, a store in memory and a clock that stands still."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.exc import DataError, DBAPIError, OperationalError

from zenray.cluster.fake import FakeCluster
from zenray.control.db.engine import Database
from zenray.control.jobs.gauges import JobGauges
from zenray.control.jobs.life import MOST_LOST, JobView, decide, why
from zenray.control.jobs.reconciler import JobReconciler
from zenray.control.jobs.repository import events_after, find_job, view_of
from zenray.control.jobs.service import cancel_job, get_job, resume_job, submit_job
from zenray.control.jobs.tables import JobRow
from zenray.spec.clock import FakeClock
from zenray.spec.errors import ClusterUnavailable, Conflict, NotFound, StorageUnavailable
from zenray.spec.job_events import in_words, parse_event
from zenray.spec.job_life import ClusterJob, ClusterJobState, JobState
from zenray.spec.jobs import job_id
from zenray.spec.platform import StorageSettings
from zenray.spec.upcycling import UpcycleJob
from zenray.storage.fake import FakeStore
from zenray.storage.job_record import job_journal, read_recorded_job

JOB = UpcycleJob.model_validate(
    {
        "kind": "upcycle",
        "name": "grow",
        "base": {"model": "dense", "version": "v1"},
        "into": {"model": "mode", "version": "v1"},
        "groups": [{"name": "general", "experts": 4}],
    }
)
ID = job_id(JOB)


class Platform:
    """A database, a fake cluster, a store, and the reconciler between them."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.clock = FakeClock()
        self.cluster = FakeCluster(self.clock, start_s=2.0, stop_s=2.0)
        self.store = FakeStore()
        self.restart()

    def restart(self) -> None:
        """Another control process, on the same database."""
        self.reconciler = JobReconciler(
            self.database,
            self.cluster,
            self.store,
            self.clock,
            storage=StorageSettings(uri="file:/store"),
            work_dir="/work-dir",
        )

    def submit(self, job: UpcycleJob = JOB) -> JobRow:
        with self.database.write() as session:
            return submit_job(session, job, now=self.clock.now())

    def cancel(self) -> JobRow:
        with self.database.write() as session:
            return cancel_job(session, "grow", now=self.clock.now())

    def resume(self) -> JobRow:
        with self.database.write() as session:
            return resume_job(session, "grow", now=self.clock.now())

    def look(self) -> JobRow:
        with self.database.read() as session:
            return get_job(session, "grow")

    def rounds(self, count: int = 1, every_s: float = 1.0) -> None:
        for _ in range(count):
            self.reconciler.step()
            self.clock.advance(every_s)

    def say(self, *events: dict[str, object]) -> None:
        """What the job's process writes."""
        job_journal(self.store, ID).append([{"at": self.clock.now(), **event} for event in events])

    def states(self) -> list[tuple[str | None, str]]:
        return [(e["from_state"], e["to_state"]) for e in self.events() if e["event"] == "state"]

    def events(self) -> list[dict[str, object]]:
        with self.database.read() as session:
            return [json.loads(row.body) for row in events_after(session, ID, 0, 1000)]


@pytest.fixture
def platform(database: Database) -> Platform:
    return Platform(database)


def test_a_job_is_submitted_runs_and_succeeds(platform: Platform) -> None:
    assert platform.submit().state == JobState.QUEUED
    platform.rounds()
    (launch,) = platform.cluster.launched
    assert launch.id == f"{ID}.1" and launch.module == "zenray.training"
    assert launch.arguments == ("--job", ID, "--store", "file:/store", "--work-dir", "/work-dir")
    assert read_recorded_job(platform.store, ID) == JOB
    platform.rounds(3)
    assert platform.look().state == JobState.RUNNING
    platform.say({"event": "started", "kind": "upcycle"}, {"event": "published", "ref": "mode@v1/safetensors"})
    platform.cluster.end_job(launch.id)
    platform.rounds()
    row = platform.look()
    assert row.state == JobState.SUCCEEDED and row.message is None and row.ended_at is not None
    assert platform.states() == [
        (None, "queued"),
        ("queued", "starting"),
        ("starting", "running"),
        ("running", "succeeded"),
    ]
    assert [e["event"] for e in platform.events()][-3:] == ["started", "published", "state"], (
        "all it said, then its end"
    )


def test_the_same_job_again_is_the_same_job(platform: Platform) -> None:
    platform.submit()
    platform.rounds(4)
    assert platform.submit().attempt == 1
    platform.rounds(2)
    assert len(platform.cluster.launched) == 1
    platform.cluster.end_job(f"{ID}.1")
    platform.rounds()
    assert platform.submit().state == JobState.SUCCEEDED
    other = platform.submit(JOB.model_copy(update={"seed": 7}))
    assert other.id != ID and other.state == JobState.QUEUED
    assert platform.look().id in (ID, other.id)
    with platform.database.read() as session:
        found = find_job(session, ID)
        assert found is not None and found.id == ID


def test_a_failed_job_says_why_in_its_own_words_and_goes_on_when_resumed(platform: Platform) -> None:
    platform.submit()
    platform.rounds(4)
    platform.say({"event": "ended", "outcome": "failed", "message": "dense@v1 has no tokenizer.json."})
    platform.rounds()  # its word is read before the cluster says that it is over
    platform.cluster.end_job(f"{ID}.1", failure="Job entrypoint command failed with exit code 1")
    platform.rounds()
    row = platform.look()
    assert (row.state, row.message) == (JobState.FAILED, "dense@v1 has no tokenizer.json.")
    assert platform.resume().state == JobState.QUEUED
    platform.rounds(4)
    assert platform.look().state == JobState.RUNNING
    assert [launch.id for launch in platform.cluster.launched] == [f"{ID}.1", f"{ID}.2"]
    platform.cluster.end_job(f"{ID}.2", failure="exit code -9\nKilled")
    platform.rounds()
    assert platform.look().message == "exit code -9\nKilled", "not what an earlier attempt said"


def test_cancelling_ends_the_process_and_says_so(platform: Platform) -> None:
    platform.submit()
    platform.rounds(4)
    assert platform.cancel().state == JobState.CANCELLING
    assert platform.cancel().state == JobState.CANCELLING
    platform.rounds(4)
    row = platform.look()
    assert row.state == JobState.CANCELLED and row.message is not None and "administrator" in row.message
    assert platform.cluster.jobs()[f"{ID}.1"].state is ClusterJobState.STOPPED
    with pytest.raises(NotFound, match="grow"), platform.database.write() as session:
        cancel_job(session, "grw", now=0)
    assert platform.resume().attempt == 2


def test_a_job_that_was_never_submitted_is_cancelled_at_once(platform: Platform) -> None:
    platform.submit()
    assert platform.cancel().state == JobState.CANCELLED
    platform.rounds(2)
    assert platform.cluster.launched == []


def test_a_job_that_is_done_is_neither_cancelled_nor_resumed(platform: Platform) -> None:
    platform.submit()
    platform.rounds(2)
    platform.cluster.end_job(f"{ID}.1")
    platform.rounds()
    with pytest.raises(Conflict, match="succeeded"):
        platform.cancel()
    with pytest.raises(Conflict, match="nothing to go on"):
        platform.resume()


def test_control_may_die_at_any_moment(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between telling the cluster and writing it down, another control submits again, which starts nothing."""
    platform.submit()
    monkeypatch.setattr(platform.reconciler, "_write", lambda *_: None)
    platform.rounds()
    assert platform.look().state == JobState.QUEUED and len(platform.cluster.launched) == 1
    platform.restart()
    platform.say({"event": "step", "step": 0, "loss": 2.5})
    platform.rounds(4)
    assert platform.look().state == JobState.RUNNING and len(platform.cluster.launched) == 1
    platform.restart()  # events that were read are not read again
    platform.say({"event": "step", "step": 1, "loss": 2.25})
    platform.rounds(2)
    assert [e["loss"] for e in platform.events() if e["event"] == "step"] == [2.5, 2.25]


def test_a_cluster_that_is_away_changes_nothing_and_is_said(platform: Platform) -> None:
    platform.submit()
    platform.cluster.unreachable = True
    platform.rounds(2)
    row = platform.look()
    assert row.state == JobState.QUEUED and row.message is not None and "cannot be reached" in row.message
    platform.cluster.unreachable = False
    platform.rounds(4)
    assert platform.look().state == JobState.RUNNING and platform.look().message is None
    platform.cluster.unreachable = True
    platform.say({"event": "step", "step": 0, "loss": 2.5})
    platform.rounds()
    assert platform.look().state == JobState.RUNNING and platform.look().progress is not None, (
        "events come by the store"
    )


def test_a_store_that_is_away_delays_events_and_loses_none(platform: Platform) -> None:
    platform.store.fail("put_bytes", StorageUnavailable("away"))
    platform.submit()
    platform.rounds()
    assert platform.look().state == JobState.QUEUED
    platform.rounds(4)
    platform.say({"event": "step", "step": 0, "loss": 2.5})
    platform.store.fail("get_bytes", StorageUnavailable("away"))
    platform.rounds()
    assert platform.look().progress is None
    platform.rounds()
    assert platform.look().progress is not None


def test_a_job_that_cannot_be_read_says_so_and_holds_up_no_other(platform: Platform) -> None:
    broken = platform.submit(JOB.model_copy(update={"name": "broken"}))
    with platform.database.write() as session:
        session.get_one(JobRow, broken.id).document = '{"kind": "of a later version"}'
    platform.clock.advance(1)
    platform.submit()
    platform.rounds(4)
    assert platform.look().state == JobState.RUNNING
    with platform.database.read() as session:
        row = get_job(session, "broken")
    assert row.state == JobState.QUEUED and row.message is not None and "'of a later version'" in row.message
    with platform.database.write() as session:
        assert cancel_job(session, "broken", now=0).state == JobState.CANCELLED


def test_what_a_job_says_is_kept_whatever_it_is(platform: Platform) -> None:
    """PostgreSQL refuses a NUL, and a text that is longer than its column."""
    platform.submit()
    platform.rounds(4)
    name = "of_a_later_version\0" + 40 * "x"
    platform.say({"event": name})
    platform.rounds()
    assert platform.events()[-1]["event"] == name
    platform.cluster.end_job(f"{ID}.1", failure="exit code 1\0")
    platform.rounds()
    assert platform.look().state == JobState.FAILED and platform.look().message == "exit code 1\ufffd"


@pytest.mark.parametrize(("fault", "goes_on"), [(DataError, True), (OperationalError, False)])
def test_what_the_database_refuses_of_one_job_holds_up_no_other(
    platform: Platform, monkeypatch: pytest.MonkeyPatch, fault: type[DBAPIError], goes_on: bool
) -> None:
    """A database that is away is all of theirs."""
    broken = platform.submit(JOB.model_copy(update={"name": "broken"}))
    platform.clock.advance(1)
    platform.submit()

    def refuse(self: JobReconciler, row: JobRow, *seen: object) -> None:
        if row.id == broken.id:
            raise fault("INSERT", None, Exception("refused"))
        round_of(self, row, *seen)  # type: ignore[arg-type]

    round_of = JobReconciler._round_of
    monkeypatch.setattr(JobReconciler, "_round_of", refuse)
    with nullcontext() if goes_on else pytest.raises(fault):
        platform.rounds(4)
    assert platform.look().state == (JobState.RUNNING if goes_on else JobState.QUEUED)


def test_a_cluster_that_was_restarted_gets_the_job_again(platform: Platform) -> None:
    platform.submit()
    for attempt in range(1, MOST_LOST + 2):
        platform.rounds(4)
        assert platform.look().state == JobState.RUNNING and platform.look().attempt == attempt
        platform.cluster.forget()
        platform.rounds()
    row = platform.look()
    assert row.state == JobState.FAILED and row.message is not None and "4 times" in row.message
    platform.resume()
    platform.rounds(4)
    for _ in range(6):  # a job that gets somewhere is not given up
        step = {"event": "step", "step": 0, "loss": 2.5}
        platform.say(step)
        platform.rounds()
        platform.cluster.forget()
        platform.rounds(5)
    assert platform.look().state == JobState.RUNNING


def test_what_the_cluster_stopped_by_itself_has_failed(platform: Platform) -> None:
    platform.submit()
    platform.rounds(4)
    platform.cluster.cancel(f"{ID}.1")
    platform.rounds(4)
    row = platform.look()
    assert row.state == JobState.FAILED and row.message is not None and "not through zenray" in row.message


def test_a_wish_made_during_a_round_is_not_overwritten(platform: Platform) -> None:
    platform.submit()
    platform.rounds(2)
    real = platform.cluster.jobs

    def meanwhile() -> object:
        platform.cluster.jobs = real  # type: ignore[method-assign]
        platform.cancel()
        return real()

    platform.cluster.jobs = meanwhile  # type: ignore[method-assign,assignment]
    platform.rounds()
    assert platform.look().state == JobState.CANCELLING


def test_what_workers_wait_for_is_shown_until_they_start(platform: Platform) -> None:
    platform.submit()
    platform.rounds(4)
    shown = []
    for missing in ("they need 2 × 1 CPU, and 1 CPU is free", None):
        platform.say({"event": "workers", "count": 2, "missing": missing})
        platform.rounds()
        progress = platform.look().progress
        assert progress is not None
        shown.append(in_words(parse_event(json.loads(progress))))
    assert shown == ["waiting for workers: they need 2 × 1 CPU, and 1 CPU is free", "2 workers start"]


def test_unreadable_and_unknown_events_are_kept(platform: Platform) -> None:
    platform.submit()
    platform.rounds(4)
    platform.say(
        {"event": "step", "step": "first"}, {"event": "rolled_back", "to": 3}, {"event": "checkpoint", "step": 4}
    )
    platform.rounds()
    assert [e["event"] for e in platform.events()][-3:] == ["unreadable", "rolled_back", "checkpoint"]


def test_running_jobs_are_measured(platform: Platform) -> None:
    platform.submit()
    platform.rounds(4)
    of_layers = {"entropy_ratios": [0.9, 0.8], "fallback_tokens": [0, 7]}
    platform.say({"event": "step", "step": 9, "loss": 2.5, "tokens_per_s": 100.0, **of_layers})
    platform.rounds()
    samples = {
        (s.name, *s.labels.values()): s.value
        for metric in JobGauges(platform.database).collect()
        for s in metric.samples
    }
    assert samples["zenray_jobs", "running"] == 1 and samples["zenray_jobs", "failed"] == 0
    assert samples["zenray_job_step", "grow", ID] == 10 and samples["zenray_job_loss", "grow", ID] == 2.5
    assert samples["zenray_job_entropy_ratio", "grow", ID, "1"] == 0.8
    assert samples["zenray_job_fallback_tokens", "grow", ID, "1"] == 7
    assert not any(name[0] == "zenray_job_mfu_ratio" for name in samples), "what is not known is not said"


def test_jobs_of_one_name_are_measured_apart(platform: Platform) -> None:
    other = platform.submit(JOB.model_copy(update={"seed": 7}))
    platform.submit()
    platform.rounds(4)
    for id in (ID, other.id):
        job_journal(platform.store, id).append([{"event": "step", "step": 9, "loss": 2.5, "entropy_ratios": [0.9]}])
    platform.rounds()
    samples = [(s.name, *s.labels.values()) for one in JobGauges(platform.database).collect() for s in one.samples]
    assert len(samples) == len(set(samples)) and {("zenray_job_step", "grow", id) for id in (ID, other.id)} < set(
        samples
    )


VIEWS = st.builds(
    JobView,
    id=st.just(ID),
    state=st.sampled_from(JobState),
    message=st.none(),
    attempt=st.integers(1, 3),
    lost=st.integers(0, MOST_LOST),
)
SEEN = st.none() | st.builds(ClusterJob, id=st.just(ID), state=st.sampled_from(ClusterJobState), message=st.just("m"))


@given(VIEWS, SEEN, st.none() | st.just("said"))
def test_every_decision_is_a_legal_step(view: JobView, seen: ClusterJob | None, said: str | None) -> None:
    decision = decide(view, seen, said)
    assert decision.state is view.state or view.state.may_become(decision.state)
    assert not view.state.is_final or decision.state is view.state
    assert decision.attempt >= view.attempt
    assert decision.state is not JobState.FAILED or view.state is JobState.FAILED or decision.message


def test_a_long_reason_keeps_its_beginning_and_its_end() -> None:
    shown = why("exit code 1\n" + "\n".join(f"line {n}" for n in range(100))).splitlines()
    assert shown[0] == "exit code 1" and shown[-1] == "line 99" and len(shown) == 10
    assert why("") == "The cluster gives no reason."


def test_events_that_were_kept_read_as_what_they_were(platform: Platform, tmp_path: Path) -> None:
    platform.submit()
    platform.rounds(2)
    platform.say({"event": "step", "step": 0, "loss": "nan"})
    platform.rounds()
    (step,) = [parse_event(e) for e in platform.events() if e["event"] == "step"]
    assert step.model_dump()["loss"] != step.model_dump()["loss"]


def test_one_that_cannot_follow_is_a_conflict(platform: Platform) -> None:
    from zenray.control.jobs.repository import change

    row = platform.submit()
    assert view_of(row).launch_id == f"{ID}.1"
    with pytest.raises(Conflict, match="cannot become"), platform.database.write() as session:
        change(session, get_job(session, ID), JobState.SUCCEEDED, None, now=0)
    with pytest.raises(ClusterUnavailable):
        platform.cluster.unreachable = True
        platform.cluster.jobs()
