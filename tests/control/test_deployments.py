"""Deployments from the wish to the route, over a fake cluster and a clock that stands still."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from zenray.catalog.catalog import Catalog
from zenray.cluster.fake import FakeCluster
from zenray.control.db.engine import Database
from zenray.control.deployments.applications import ApplicationFactory, engine_key_of
from zenray.control.deployments.canaries import CanaryWatch
from zenray.control.deployments.reconciler import Reconciler
from zenray.control.deployments.repository import Loaded, events_of, load_all
from zenray.control.deployments.service import get_deployment, put_deployment, stop_deployment
from zenray.control.edge.snapshot import WATCH_INTERVAL_S, render_snapshot
from zenray.spec.clock import FakeClock
from zenray.spec.deployments import Autoscaling, DeploymentSpec, DeploymentState
from zenray.spec.edge import CanaryCount, CanaryReport, RouteEntry, RouteState, Snapshot
from zenray.spec.errors import ClusterUnavailable, InvalidRequest, NotFound
from zenray.spec.platform import ControlSettings, StorageSettings
from zenray.spec.serving import ReplicaLaunch, ServeApplication

MODEL = "smollm2-135m"
FACTORY = ApplicationFactory(StorageSettings(uri="file:/store"), "/cache")


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


class Platform:
    """A database, a fake cluster and the reconciler between them."""

    def __init__(self, database: Database, catalog: Catalog) -> None:
        self.database = database
        self.clock = FakeClock()
        self.cluster = FakeCluster(self.clock, start_s=5.0, stop_s=2.0)
        self.canaries = CanaryWatch()
        self.reconciler = Reconciler(database, self.cluster, lambda: catalog, self.clock, self.canaries)

    def put(self, version: str = "1", model: str = MODEL, **changes: object) -> Loaded:
        spec = DeploymentSpec.model_validate({"model": model, "version": version, **changes})
        with self.database.write() as session:
            return put_deployment(session, spec, FACTORY, now=self.clock.now())

    def stop(self) -> Loaded:
        with self.database.write() as session:
            return stop_deployment(session, MODEL, now=self.clock.now())

    def look(self) -> Loaded:
        with self.database.read() as session:
            return get_deployment(session, MODEL)

    def rounds(self, count: int = 1, every_s: float = 1.0) -> None:
        for _ in range(count):
            self.reconciler.step()
            self.clock.advance(every_s)

    def route(self, model: str = MODEL) -> RouteEntry | None:
        with self.database.read() as session:
            return Snapshot.model_validate_json(render_snapshot(session, 0, now=0.0)).routes.get(model)

    def events(self) -> list[tuple[str | None, str]]:
        with self.database.read() as session:
            return [(e.from_state, e.to_state) for e in reversed(events_of(session, MODEL, 100)) if e.revision is None]


@pytest.fixture
def platform(database: Database, catalog: Catalog) -> Platform:
    return Platform(database, catalog)


def test_a_deployment_becomes_an_application_and_then_a_route(platform: Platform, catalog: Catalog) -> None:
    loaded = platform.put()
    assert loaded.view.state is DeploymentState.PENDING
    platform.rounds()
    (application,) = platform.cluster.applied[-1]
    launch = ReplicaLaunch.model_validate(application.args)
    assert launch.deployment.ref().prefix == f"zen/{MODEL}/1/safetensors/"
    assert (launch.storage.uri, launch.cache_dir) == ("file:/store", "/cache")
    assert application.name == launch.deployment.revision() and application.route_prefix == f"/{application.name}"
    route = platform.route()
    assert route is not None and route.state is RouteState.LOADING and route.endpoints == ()
    platform.rounds(6)
    route = platform.route()
    entry = catalog.get(MODEL)
    assert route is not None and route.state is RouteState.READY
    assert [e.url for e in route.endpoints] == [f"http://127.0.0.1:30000/{application.name}"]
    assert route.wake_url == f"http://127.0.0.1:8000/{application.name}"
    assert route.engine_key == engine_key_of(application) and len(route.engine_key) >= 32
    assert (route.price, route.context_tokens) == (entry.price, entry.context_tokens)
    assert (route.revision, route.upstream_model) == (application.name, MODEL)
    assert platform.events() == [(None, "pending"), ("pending", "starting"), ("starting", "ready")]


def test_nothing_to_do_writes_nothing_and_asks_ray_for_nothing(platform: Platform) -> None:
    platform.put()
    platform.rounds(8)
    before, applied = platform.look(), len(platform.cluster.applied)
    platform.rounds(5)
    assert platform.look() == before and len(platform.cluster.applied) == applied
    platform.put()  # the same wish again
    assert platform.look() == before


def test_a_smaller_context_of_the_engine_bounds_the_route(platform: Platform) -> None:
    platform.put(engine={"max_model_len": 128})
    platform.rounds(7)
    route = platform.route()
    assert route is not None and route.context_tokens == 128 and route.default_max_tokens <= 128


def test_a_template_that_adds_more_than_the_catalog_says_raises_the_bound(platform: Platform, catalog: Catalog) -> None:
    """And one that adds less does not lower it."""
    said = catalog.get(MODEL).template_overhead_tokens
    for version, measured, bound in (("1", said + 100, said + 100), ("2", 1, said), ("3", None, said)):
        platform.put(version, template_overhead_tokens=measured)
        platform.rounds(14)
        route = platform.route()
        assert route is not None and f"--{version}--" in route.revision and route.template_overhead_tokens == bound


def test_a_rollout_moves_the_route_only_when_the_new_one_is_ready(platform: Platform) -> None:
    platform.put("1")
    platform.rounds(8)
    old = platform.route()
    assert old is not None
    platform.put("2")
    seen = []
    for _ in range(14):
        platform.rounds()
        route = platform.route()
        assert route is not None and route.state is RouteState.READY and route.endpoints
        seen.append((route.revision, frozenset(platform.cluster.serve_status().applications)))
        assert route.revision in seen[-1][1]  # never a route to an application that is not there
    assert seen[0][0] == old.revision and seen[-1][0] != old.revision
    assert seen[-1][1] == {seen[-1][0]}
    assert platform.look().view.message is None


def test_a_rollout_begins_with_the_replicas_that_the_load_needs(platform: Platform) -> None:
    """The load comes at once: one replica in the place of four would make everybody wait."""
    bounds = {"min_replicas": 1, "max_replicas": 6}
    first = platform.put("1", autoscaling=bounds).view.wanted
    platform.rounds(8)
    platform.cluster.scale(first, 4)
    second = platform.put("2", autoscaling=bounds).view.wanted
    platform.rounds(14)
    route = platform.route()
    assert route is not None and route.revision == second and len(route.endpoints) == 4
    applied = len(platform.cluster.applied)
    platform.cluster.scale(second, 2)
    platform.rounds(2)
    assert len(platform.cluster.applied) == applied  # what it began with is not held against it
    platform.put("1", autoscaling=bounds)  # and back: with as many as the load needs now
    platform.rounds(14)
    route = platform.route()
    assert route is not None and route.revision == first and len(route.endpoints) == 2


def test_a_broken_revision_leaves_the_old_one_serving_and_says_why(platform: Platform) -> None:
    platform.put("1")
    platform.rounds(8)
    before = platform.route()
    broken = platform.put("2").view.wanted
    platform.cluster.fail(broken, "model-00001.safetensors: sha256 differs")
    platform.rounds(10)
    after = platform.look().view
    assert platform.route() == before
    assert after.state is DeploymentState.READY
    assert after.message is not None and "sha256 differs" in after.message and broken in after.message
    assert broken not in platform.cluster.serve_status().applications  # its memory is free again


def test_a_canary_reaches_the_gateways_and_ends_in_the_route_of_all(platform: Platform) -> None:
    old = platform.put("1")
    platform.rounds(8)
    platform.put("2", canary={"weight": 0.25, "for_s": 20}, engine={"max_model_len": 128})
    platform.rounds(8)
    route = platform.route()
    assert route is not None and route.canary is not None and route.revision == old.view.wanted
    new = platform.look()
    application = new.applications[new.view.wanted]
    assert (route.canary.revision, route.canary.weight) == (new.view.wanted, 0.25)
    assert route.canary.engine_key == engine_key_of(application) != route.engine_key
    assert all(new.view.wanted in endpoint.url for endpoint in route.canary.endpoints) and route.canary.endpoints
    assert route.context_tokens == 128  # what may go to either must fit into both
    assert ReplicaLaunch.model_validate(application.args).deployment.canary is None
    platform.rounds(20)
    route = platform.route()
    assert route is not None and route.canary is None and route.revision == new.view.wanted


def test_a_canary_that_breaks_leaves_the_route_and_is_explained(platform: Platform) -> None:
    old = platform.put("1")
    platform.rounds(8)
    platform.put("2", canary={"weight": 0.25, "for_s": 600})
    platform.rounds(8)
    platform.cluster.fail(platform.look().view.wanted, "it ran out of memory")
    platform.rounds(2)
    route, loaded = platform.route(), platform.look()
    assert route is not None and route.canary is None and route.revision == old.view.wanted
    assert route.state is RouteState.READY and route.endpoints
    assert loaded.view.message is not None and "it ran out of memory" in loaded.view.message


def test_a_canary_whose_answers_fail_leaves_the_route_until_it_is_asked_for_again(platform: Platform) -> None:
    old = platform.put("1")
    platform.rounds(8)

    def tried() -> tuple[str, float]:
        platform.put("2", canary={"weight": 0.25, "for_s": 600})
        platform.rounds(9)
        route = platform.route()
        assert route is not None and route.canary is not None
        return route.canary.revision, route.canary.since

    def tell(gateway: str, boot: str, requests: int, failed: int) -> None:
        count = CanaryCount(revision=trial[0], since=trial[1], requests=requests, failed=failed)
        platform.canaries.take(CanaryReport(gateway_id=gateway, boot_id=boot, canaries=(count,)), platform.clock.now())
        platform.rounds(1)

    trial = tried()
    tell("g1", "b1", 30, 1)
    tell("g1", "b1", 31, 1)  # totals, not told again
    assert (route := platform.route()) is not None and route.canary is not None
    tell("g2", "b1", 20, 1)
    tell("g1", "b2", 5, 1)  # a new start of the first
    route, loaded = platform.route(), platform.look()
    assert route is not None and route.canary is None and route.revision == old.view.wanted
    assert route.state is RouteState.READY and route.endpoints
    assert loaded.view.message is not None and "failed 3 of 56 requests" in loaded.view.message
    before, trial = trial, tried()
    assert trial[0] == before[0] and trial[1] > before[1]
    platform.rounds(3)
    assert (route := platform.route()) is not None and route.canary is not None


def test_the_same_wish_without_a_canary_promotes_it(platform: Platform) -> None:
    platform.put("1")
    platform.rounds(8)
    platform.put("2", canary={"weight": 0.25, "for_s": 600})
    platform.rounds(8)
    applied = len(platform.cluster.applied)
    platform.put("2")
    platform.rounds(1)
    route = platform.route()
    assert route is not None and route.canary is None and route.revision == platform.look().view.wanted
    assert len(platform.cluster.applied) == applied  # the same application, only more of the requests


def test_a_failed_deployment_is_tried_again_when_it_is_asked_for_again(platform: Platform) -> None:
    name = platform.put().view.wanted
    platform.cluster.fail(name, "shard is corrupt")
    platform.rounds(10)
    route = platform.route()
    assert platform.look().view.state is DeploymentState.FAILED
    assert route is not None and (route.state, route.message) == (RouteState.FAILED, "shard is corrupt")
    platform.cluster._failures.clear()
    assert platform.put().view.state is DeploymentState.PENDING
    platform.rounds(10)
    assert platform.look().view.state is DeploymentState.READY


def test_sleeping_and_waking_reach_the_gateways(platform: Platform) -> None:
    name = platform.put(autoscaling=Autoscaling(min_replicas=0)).view.wanted
    platform.rounds(8)
    platform.cluster.scale(name, 0)
    platform.rounds()
    asleep = platform.route()
    assert asleep is not None and asleep.state is RouteState.ASLEEP and asleep.endpoints == () and asleep.wake_url
    platform.cluster.scale(name, 2)
    platform.rounds()
    awake = platform.route()
    assert awake is not None and awake.state is RouteState.READY and len(awake.endpoints) == 2


def test_a_new_replica_reaches_the_gateways_within_a_second(platform: Platform) -> None:
    """One look at Ray Serve is enough, and looks are so frequent that with what is between them a second is kept."""
    name = platform.put(autoscaling={"max_replicas": 2}).view.wanted
    platform.rounds(8)
    platform.cluster.scale(name, 2)  # just after the last look
    platform.rounds(1)
    route = platform.route()
    assert route is not None and len(route.endpoints) == 2
    look_s = 0.1  # what Ray takes to answer, at most
    assert look_s + ControlSettings().reconcile_interval_s + look_s + WATCH_INTERVAL_S <= 0.95


def test_undeploying_takes_the_route_at_once_and_the_application_soon(platform: Platform) -> None:
    platform.put()
    platform.rounds(8)
    assert platform.stop().view.state is DeploymentState.STOPPING
    assert platform.route() is None
    platform.rounds(8)
    assert platform.look().view.state is DeploymentState.STOPPED
    assert platform.cluster.serve_status().applications == {}
    platform.put()  # and back again, under the same name
    platform.rounds(8)
    assert platform.look().view.state is DeploymentState.READY
    assert platform.stop().view.state is DeploymentState.STOPPING


def test_a_model_is_asked_for_again_while_it_stops(platform: Platform) -> None:
    platform.put()
    platform.rounds(8)
    platform.stop()
    platform.rounds(1)
    platform.put()
    platform.rounds(16)
    assert platform.look().view.state is DeploymentState.READY
    assert len(platform.cluster.serve_status().applications) == 1


def test_ray_restarted_gets_everything_again_and_the_same_key(platform: Platform) -> None:
    platform.put()
    platform.rounds(8)
    before = platform.route()
    platform.cluster.forget()
    platform.rounds()
    during = platform.route()
    assert during is not None and during.state is RouteState.LOADING and during.endpoints == ()
    platform.rounds(8)
    after = platform.route()
    assert before is not None and after is not None and after.state is RouteState.READY
    assert after.engine_key == before.engine_key


def test_ray_away_keeps_the_route_and_is_said(platform: Platform) -> None:
    platform.put()
    platform.rounds(8)
    before = platform.route()
    platform.cluster.unreachable = True
    platform.rounds(3)
    view = platform.look().view
    assert view.state is DeploymentState.READY and view.message is not None and "cannot be reached" in view.message
    assert platform.route() == before
    platform.cluster.unreachable = False
    platform.rounds()
    assert platform.look().view.message is None


def test_a_wish_changed_during_a_round_is_not_overwritten(platform: Platform) -> None:
    """Step three writes only what is still as it was read: here the wish changes while Ray is being asked."""
    platform.put("1")
    platform.rounds(8)
    real = platform.cluster.serve_status

    def meanwhile() -> object:
        platform.cluster.serve_status = real  # type: ignore[method-assign]
        platform.stop()
        return real()

    platform.cluster.scale(platform.look().view.wanted, 0)  # so that the round has something to write
    platform.cluster.serve_status = meanwhile  # type: ignore[method-assign,assignment]
    platform.rounds()
    assert platform.look().view.state is DeploymentState.STOPPING and platform.route() is None


def test_a_document_that_ray_refuses_is_shown(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(applications: Sequence[ServeApplication]) -> None:
        raise InvalidRequest("Ray answered 400: bad runtime_env")

    platform.put()
    monkeypatch.setattr(platform.cluster, "apply", refuse)
    platform.rounds(2)
    view = platform.look().view
    assert view.state is DeploymentState.PENDING and view.message is not None and "bad runtime_env" in view.message
    monkeypatch.undo()
    platform.rounds(8)
    assert platform.look().view.state is DeploymentState.READY


def test_several_models_share_one_document(platform: Platform) -> None:
    platform.put()
    platform.put(model="zen-600m")
    platform.rounds(8)
    assert len(platform.cluster.applied[-1]) == 2
    assert platform.route("zen-600m") is not None
    platform.stop()
    platform.rounds(6)
    assert [each.args["deployment"]["model"] for each in platform.cluster.applied[-1]] == ["zen-600m"]


def test_two_versions_side_by_side_are_two_names_of_one_base(database: Database, tmp_path: Path) -> None:
    """Decision 21: the second name is a file in the user's catalog."""
    (tmp_path / "kept.yaml").write_text(
        f"name: {MODEL}-2025\nvariant_of: {MODEL}\ndiffers: An earlier version.\nsummary: As of January 2025.\n"
    )
    catalog = Catalog.load([tmp_path])
    platform = Platform(database, catalog)
    platform.put("new")
    platform.put("old", model=f"{MODEL}-2025")
    platform.rounds(8)
    new, old = platform.route(), platform.route(f"{MODEL}-2025")
    assert new is not None and old is not None and new.state is old.state is RouteState.READY
    assert old.upstream_model == f"{MODEL}-2025" and old.price == new.price
    assert {e.url for e in new.endpoints}.isdisjoint(e.url for e in old.endpoints) and new.engine_key != old.engine_key
    launches = [ReplicaLaunch.model_validate(each.args) for each in platform.cluster.applied[-1]]
    prefixes = {launch.deployment.ref().prefix for launch in launches}
    assert prefixes == {f"zen/{MODEL}/new/safetensors/", f"zen/{MODEL}-2025/old/safetensors/"}


def test_one_model_comes_in_the_round_in_which_another_goes(platform: Platform) -> None:
    platform.put()
    platform.rounds(8)
    platform.stop()
    platform.rounds(1, every_s=10.0)
    platform.put(model="zen-600m")
    platform.rounds(8)
    route = platform.route("zen-600m")
    assert route is not None and route.state is RouteState.READY
    assert len(platform.cluster.serve_status().applications) == 1


def test_a_model_taken_out_of_the_catalog_loses_its_route_and_no_other_does(
    platform: Platform, catalog: Catalog, database: Database
) -> None:
    platform.put()
    platform.put(model="zen-600m")
    platform.rounds(8)
    smaller = Catalog([entry for entry in catalog if entry.name != MODEL], catalog.family)
    Reconciler(database, platform.cluster, lambda: smaller, platform.clock).step()
    assert platform.route() is None and platform.route("zen-600m") is not None
    message = platform.look().view.message
    assert message is not None and "catalog has no model" in message


def test_a_control_that_starts_anew_goes_on_where_the_last_one_stopped(
    platform: Platform, catalog: Catalog, database: Database
) -> None:
    platform.put()
    platform.rounds(2)
    again = Reconciler(database, platform.cluster, lambda: catalog, platform.clock)
    for _ in range(8):
        again.step()
        platform.clock.advance(1.0)
    assert platform.look().view.state is DeploymentState.READY
    assert len(platform.cluster.applied) == 1


def test_unknown_deployments_are_answered_with_the_nearest(platform: Platform) -> None:
    platform.put()
    with pytest.raises(NotFound, match=f"Did you mean '{MODEL}'"), platform.database.read() as session:
        get_deployment(session, "smollm2-135")


def test_the_reconciler_outlives_what_nobody_expected(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    platform.put()
    stop, calls = threading.Event(), []

    def surprise() -> object:
        calls.append(1)
        if len(calls) == 3:
            stop.set()
        raise (RuntimeError("surprise") if len(calls) == 1 else ClusterUnavailable("away"))

    monkeypatch.setattr(platform.cluster, "serve_status", surprise)
    platform.reconciler.run(stop, interval_s=0.001)
    with platform.database.read() as session:
        (loaded,) = load_all(session)
    assert len(calls) == 3 and loaded.view.message == "away"
