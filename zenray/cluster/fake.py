"""A cluster that runs nothing: applications and jobs pass through Ray's states by a clock, and can be told to fail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pydantic import ValidationError

from zenray.spec.clock import Clock, SystemClock
from zenray.spec.errors import ClusterUnavailable
from zenray.spec.job_life import ClusterJob, ClusterJobState, JobLaunch
from zenray.spec.serving import (
    SERVE_IMPORT_PATH,
    ApplicationState,
    ApplicationStatus,
    ReplicaLaunch,
    ServeApplication,
    ServeStatus,
)


@dataclass
class _Running:
    wish: ServeApplication
    since: float
    replicas: int
    failure: str | None = None
    deleted_at: float | None = None
    ports: list[int] = field(default_factory=list)


@dataclass
class _Job:
    launch: JobLaunch
    since: float
    ended: ClusterJob | None = None
    cancelled_at: float | None = None
    logs: str = ""


class FakeCluster:
    """The ClusterBackend for tests. Replicas need `start_s` to start; a deleted application is gone after `stop_s`.

    So with jobs: they run `start_s` after they were submitted and end `stop_s` after they were cancelled, else when
    `end_job` says so. Set `unreachable` to make every call fail; `fail`, `scale` and `forget` do what a real cluster
    may do by itself.
    """

    def __init__(self, clock: Clock | None = None, *, start_s: float = 5.0, stop_s: float = 2.0) -> None:
        self.unreachable = False
        self.applied: list[tuple[ServeApplication, ...]] = []
        self._clock = clock or SystemClock()
        self._start_s, self._stop_s = start_s, stop_s
        self._running: dict[str, _Running] = {}
        self._failures: dict[str, str] = {}
        self._next_port = 30_000
        self._proxied = False
        self._jobs: dict[str, _Job] = {}
        self.launched: list[JobLaunch] = []

    def serve_status(self) -> ServeStatus:
        """See ClusterBackend."""
        self._reach()
        now = self._clock.monotonic()
        for name, running in list(self._running.items()):
            if running.deleted_at is not None and now - running.deleted_at >= self._stop_s:
                del self._running[name]
        applications = {name: self._status(running, now) for name, running in self._running.items()}
        proxy_url = "http://127.0.0.1:8000" if self._proxied else None
        return ServeStatus(applications=applications, proxy_url=proxy_url)

    def apply(self, applications: Sequence[ServeApplication]) -> None:
        """See ClusterBackend."""
        self._reach()
        now = self._clock.monotonic()
        self.applied.append(tuple(applications))
        self._proxied |= bool(applications)
        wishes = {application.name: application for application in applications}
        for name, running in self._running.items():
            if name not in wishes and running.deleted_at is None:
                running.deleted_at = now
        for name, wish in wishes.items():
            there = self._running.get(name)
            if there is None or there.wish != wish or there.deleted_at is not None:
                failure = self._failures.get(name) or _fault(wish)
                self._running[name] = _Running(wish=wish, since=now, replicas=_initial_replicas(wish), failure=failure)

    def submit(self, launch: JobLaunch) -> None:
        """See ClusterBackend."""
        self._reach()
        if launch.id not in self._jobs:
            self._jobs[launch.id] = _Job(launch, self._clock.monotonic())
            self.launched.append(launch)

    def jobs(self) -> dict[str, ClusterJob]:
        """See ClusterBackend."""
        self._reach()
        return {id: self._job_status(job, self._clock.monotonic()) for id, job in self._jobs.items()}

    def job_logs(self, id: str) -> str:
        """See ClusterBackend."""
        self._reach()
        return self._jobs[id].logs if id in self._jobs else ""

    def cancel(self, id: str) -> None:
        """See ClusterBackend."""
        self._reach()
        job = self._jobs.get(id)
        if job is not None and job.ended is None and job.cancelled_at is None:
            job.cancelled_at = self._clock.monotonic()

    def end_job(self, id: str, *, failure: str | None = None, logs: str = "") -> None:
        """The job's process ends: well, or with what Ray says of its failure."""
        state = ClusterJobState.SUCCEEDED if failure is None else ClusterJobState.FAILED
        self._jobs[id].ended = ClusterJob(id=id, state=state, message=failure or "")
        self._jobs[id].logs = logs

    def _job_status(self, job: _Job, now: float) -> ClusterJob:
        id = job.launch.id
        if job.ended is None and job.cancelled_at is not None and now - job.cancelled_at >= self._stop_s:
            job.ended = ClusterJob(id=id, state=ClusterJobState.STOPPED, message="Job was intentionally stopped.")
        if job.ended is not None:
            return job.ended
        started = now - job.since >= self._start_s
        return ClusterJob(id=id, state=ClusterJobState.RUNNING if started else ClusterJobState.PENDING)

    def fail(self, name: str, message: str) -> None:
        """This application fails to deploy, now and whenever it is applied again."""
        self._failures[name] = message
        if name in self._running:
            self._running[name].failure = message

    def scale(self, name: str, replicas: int) -> None:
        """What autoscaling does: 0 puts the application to sleep, more wakes it. New replicas are there at once."""
        self._running[name].replicas = replicas

    def forget(self) -> None:
        """Ray was restarted: nothing runs."""
        self._running.clear()
        self._jobs.clear()
        self._proxied = False

    def _reach(self) -> None:
        if self.unreachable:
            raise ClusterUnavailable("The cluster cannot be reached.", hint="It is a fake one, told so.")

    def _status(self, running: _Running, now: float) -> ApplicationStatus:
        wish = running.wish
        started = now - running.since >= self._start_s
        if running.deleted_at is not None:
            state = ApplicationState.DELETING
        elif running.failure is not None:
            state = ApplicationState.DEPLOY_FAILED
        else:
            state = ApplicationState.RUNNING if started else ApplicationState.DEPLOYING
        urls = {}
        if state is ApplicationState.RUNNING:
            while len(running.ports) < running.replicas:
                running.ports.append(self._next_port)
                self._next_port += 1
            del running.ports[running.replicas :]
            urls = {f"replica-{port}": f"http://127.0.0.1:{port}{wish.route_prefix}" for port in running.ports}
        return ApplicationStatus(
            name=wish.name,
            state=state,
            message=running.failure or "",
            route_prefix=wish.route_prefix,
            replica_urls=urls,
            starting_replicas=running.replicas if state is ApplicationState.DEPLOYING else 0,
        )


def _initial_replicas(wish: ServeApplication) -> int:
    try:
        launch = ReplicaLaunch.model_validate(wish.args)
        return launch.start.replicas if launch.start else max(1, launch.deployment.autoscaling.min_replicas)
    except ValidationError:
        return 1


def _fault(wish: ServeApplication) -> str | None:
    """What Ray would say to a wish that cannot work."""
    if wish.import_path != SERVE_IMPORT_PATH:
        return f"ModuleNotFoundError: no application at {wish.import_path!r}"
    try:
        ReplicaLaunch.model_validate(wish.args)
    except ValidationError as error:
        return f"The arguments of the application are not valid: {error}"
    return None
