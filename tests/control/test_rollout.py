"""Decisions about one deployment: pure, so every order of events can be tried."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.control.deployments.canaries import Seen
from zenray.control.deployments.rollout import (
    DRAIN_SETTLE_S,
    FILL_WAIT_S,
    LOAD_SETTLES_S,
    RETRY_FAILED_S,
    START_TIMEOUT_S,
    DeploymentView,
    Phase,
    RevisionView,
    canary_fault,
    decide,
    unreachable,
)
from zenray.spec.deployments import Autoscaling, Canary, DeploymentSpec, DeploymentState
from zenray.spec.serving import ApplicationState, ApplicationStatus, ServeStatus, Start

State, App = DeploymentState, ApplicationState
SPEC = DeploymentSpec(model="m", version="1")
SLEEPY = DeploymentSpec(model="m", version="1", autoscaling=Autoscaling(min_replicas=0))


def revision(
    name: str, phase: Phase, *, spec: DeploymentSpec = SPEC, since: float = 0.0, was_ready: bool = False
) -> RevisionView:
    return RevisionView(name, spec, phase, since, was_ready)


def view(
    *revisions: RevisionView,
    wanted: str = "a",
    stop: bool = False,
    state: State = State.PENDING,
    canary: Canary | None = None,
) -> DeploymentView:
    return DeploymentView("m", wanted, stop, state, None, revisions, canary)


def app(name: str, state: App, replicas: int = 0, message: str = "", starting: int = 0) -> ApplicationStatus:
    return ApplicationStatus(
        name=name,
        state=state,
        message=message,
        route_prefix=f"/{name}",
        replica_urls={f"{name}{n}": f"http://127.0.0.1:{n}/{name}" for n in range(replicas)},
        starting_replicas=starting,
    )


def serve(*apps: ApplicationStatus) -> ServeStatus:
    return ServeStatus(applications={each.name: each for each in apps}, proxy_url="http://127.0.0.1:8000")


def phases(decided: DeploymentView) -> dict[str, Phase]:
    return {each.name: each.phase for each in decided.revisions}


def test_a_first_start_goes_from_pending_over_starting_to_ready() -> None:
    asked = decide(view(revision("a", Phase.QUEUED)), serve(), 1.0)
    assert (phases(asked), asked.state) == ({"a": Phase.CANDIDATE}, State.PENDING)
    starting = decide(asked, serve(app("a", App.DEPLOYING, message="loading weights")), 2.0)
    assert (starting.state, starting.message) == (State.STARTING, "loading weights")
    ready = decide(starting, serve(app("a", App.RUNNING, replicas=1)), 3.0)
    assert (phases(ready), ready.state, ready.message) == ({"a": Phase.SERVING}, State.READY, None)


def test_running_without_a_replica_is_not_ready_unless_it_may_sleep() -> None:
    running = serve(app("a", App.RUNNING))
    waiting = decide(view(revision("a", Phase.CANDIDATE)), running, 1.0)
    assert (waiting.state, phases(waiting)) == (State.STARTING, {"a": Phase.CANDIDATE})
    asleep = decide(view(revision("a", Phase.CANDIDATE, spec=SLEEPY)), running, 1.0)
    assert (asleep.state, phases(asleep)) == (State.ASLEEP, {"a": Phase.SERVING})


@pytest.mark.parametrize("state", [App.RUNNING, App.DEPLOYING])
def test_a_sleeper_that_wakes_stays_asleep_until_a_replica_runs(state: App) -> None:
    serving = view(revision("a", Phase.SERVING, spec=SLEEPY, was_ready=True), state=State.ASLEEP)
    assert decide(serving, serve(app("a", state, starting=1)), 1.0).state is State.ASLEEP
    assert decide(serving, serve(app("a", state, replicas=1)), 1.0).state is State.READY


def test_an_earlier_application_of_the_same_name_must_be_gone_first() -> None:
    leftover = decide(view(revision("a", Phase.QUEUED)), serve(app("a", App.DELETING)), 1.0)
    assert phases(leftover) == {"a": Phase.QUEUED}
    assert leftover.message is not None and "earlier a" in leftover.message
    failed = decide(view(revision("a", Phase.QUEUED)), serve(app("a", App.DEPLOY_FAILED, message="old news")), 1.0)
    assert failed.state is State.PENDING


def test_a_failure_is_shown_with_its_reason_and_leaves_the_wish() -> None:
    failed = decide(
        view(revision("a", Phase.CANDIDATE)), serve(app("a", App.DEPLOY_FAILED, message="shard 3 is corrupt")), 1.0
    )
    assert (failed.state, failed.message) == (State.FAILED, "shard 3 is corrupt")
    assert not failed.revisions[0].phase.in_serve
    assert decide(failed, serve(), 1.0 + 10 * RETRY_FAILED_S) == failed  # tried again only when somebody asks


def test_a_start_that_takes_for_ever_fails() -> None:
    candidate = view(revision("a", Phase.CANDIDATE, since=0.0))
    waiting = serve(app("a", App.DEPLOYING, message="no node has 4 GPUs"))
    assert decide(candidate, waiting, START_TIMEOUT_S).state is State.STARTING
    late = decide(candidate, waiting, START_TIMEOUT_S + 1)
    assert late.state is State.FAILED
    assert late.message == "No replica was ready after 120 minutes. Ray Serve says: no node has 4 GPUs"


def test_a_rollout_creates_waits_shifts_drains_and_deletes() -> None:
    start = view(
        revision("a", Phase.SERVING, was_ready=True), revision("b", Phase.QUEUED), wanted="b", state=State.READY
    )
    old = app("a", App.RUNNING, replicas=1)
    created = decide(start, serve(old), 1.0)
    assert phases(created) == {"a": Phase.SERVING, "b": Phase.CANDIDATE}
    waiting = decide(created, serve(old, app("b", App.DEPLOYING)), 2.0)
    assert phases(waiting) == phases(created) and waiting.state is State.READY
    assert waiting.message == "b is starting, a serves until it is ready"
    shifted = decide(waiting, serve(old, app("b", App.RUNNING, replicas=1)), 3.0)
    assert phases(shifted) == {"a": Phase.DRAINING, "b": Phase.SERVING} and shifted.message is None
    both = serve(old, app("b", App.RUNNING, replicas=1))
    assert phases(decide(shifted, both, 3.0 + DRAIN_SETTLE_S - 0.1)) == phases(shifted)
    assert phases(decide(shifted, both, 3.0 + DRAIN_SETTLE_S)) == {"a": Phase.GONE, "b": Phase.SERVING}


def test_a_broken_new_revision_never_takes_traffic_and_the_old_one_stays() -> None:
    start = view(
        revision("a", Phase.SERVING, was_ready=True), revision("b", Phase.CANDIDATE), wanted="b", state=State.READY
    )
    old = app("a", App.RUNNING, replicas=1)
    broken = decide(start, serve(old, app("b", App.DEPLOY_FAILED, message="no such file")), 1.0)
    assert phases(broken) == {"a": Phase.SERVING, "b": Phase.FAILED}
    assert (broken.state, broken.message) == (State.READY, "b failed, a goes on serving: no such file")
    assert decide(broken, serve(old), 10_000.0) == broken


WIDE = DeploymentSpec(model="m", version="2", autoscaling=Autoscaling(max_replicas=10))


def rollout(**fields: object) -> DeploymentView:
    """Eight replicas of `a` serve, and `b` has just been asked for and begins."""
    start = view(
        revision("a", Phase.SERVING, was_ready=True), revision("b", Phase.QUEUED, spec=WIDE), wanted="b", **fields
    )  # type: ignore[arg-type]
    return decide(start, serve(app("a", App.RUNNING, replicas=8)), 1.0)


def test_a_new_revision_begins_with_as_many_replicas_as_the_old_one_has() -> None:
    begun = rollout().revisions[1]
    assert (begun.phase, begun.start) == (Phase.CANDIDATE, Start(replicas=8, hold_s=FILL_WAIT_S + LOAD_SETTLES_S))
    trial = rollout(canary=CANARY).revisions[1].start
    assert trial is not None and trial.hold_s == FILL_WAIT_S + CANARY.for_s + LOAD_SETTLES_S
    assert WIDE.revision() == begun.spec.revision()  # with how many it starts makes no revision of its own


@pytest.mark.parametrize(
    ("served_by", "bounds", "expected"),
    [
        (8, Autoscaling(max_replicas=10), 8),
        (8, Autoscaling(max_replicas=5), 5),  # never beyond its own bounds
        (8, Autoscaling(min_replicas=9, max_replicas=10), None),  # it begins with more by itself
        (1, Autoscaling(max_replicas=10), None),
        (0, Autoscaling(min_replicas=0, max_replicas=10), None),  # the old one sleeps
    ],
)
def test_it_begins_within_its_own_bounds(served_by: int, bounds: Autoscaling, expected: int | None) -> None:
    spec = WIDE.model_copy(update={"autoscaling": bounds})
    start = view(revision("a", Phase.SERVING), revision("b", Phase.QUEUED, spec=spec), wanted="b")
    begun = decide(start, serve(app("a", App.RUNNING, replicas=served_by)), 1.0).revisions[1].start
    assert (begun.replicas if begun else None) == expected


def test_one_that_serves_and_that_ray_has_lost_comes_back_as_its_load_needs() -> None:
    old = app("a", App.RUNNING, replicas=8)
    serving = decide(rollout(), serve(old, app("b", App.RUNNING, replicas=8)), 50.0)
    assert decide(serving, serve(app("b", App.RUNNING, replicas=2)), 999.0).revisions[1].start is not None
    assert decide(serving, serve(), 999.0).revisions[1].start is None
    assert decide(rollout(), serve(old), 999.0).revisions[1].start is not None  # it is still to take over


def test_a_first_start_has_nobody_to_follow() -> None:
    first = decide(view(revision("a", Phase.QUEUED, spec=WIDE)), serve(), 1.0)
    assert first.revisions[0].start is None


def test_it_takes_over_when_all_of_them_run() -> None:
    old = app("a", App.RUNNING, replicas=8)
    filling = decide(rollout(), serve(old, app("b", App.DEPLOYING, replicas=3)), 50.0)
    assert phases(filling) == {"a": Phase.SERVING, "b": Phase.FILLING} and filling.state is State.READY
    assert filling.message is not None and "b has 3 replicas and waits for the others" in filling.message
    full = decide(filling, serve(old, app("b", App.RUNNING, replicas=8)), 60.0)
    assert phases(full) == {"a": Phase.DRAINING, "b": Phase.SERVING}


def test_without_room_for_all_it_takes_over_with_those_that_run() -> None:
    """Replicas that have no place until the old ones leave theirs are not waited for."""
    old, part = app("a", App.RUNNING, replicas=8), app("b", App.DEPLOYING, replicas=3)
    filling = decide(rollout(), serve(old, part), 50.0)
    assert phases(decide(filling, serve(old, part), 49.9 + FILL_WAIT_S))["b"] is Phase.FILLING
    shifted = decide(filling, serve(old, part), 50.0 + FILL_WAIT_S)
    assert phases(shifted) == {"a": Phase.DRAINING, "b": Phase.SERVING} and shifted.state is State.READY
    trial = decide(replace(filling, canary=CANARY), serve(old, part), 50.0 + FILL_WAIT_S)
    assert phases(trial) == {"a": Phase.SERVING, "b": Phase.CANARY}
    assert phases(decide(trial, serve(old, part), 51.0 + FILL_WAIT_S)) == phases(trial)


def test_one_that_loses_its_first_replicas_is_waited_for_no_longer() -> None:
    """A replica that comes and goes starts no time anew; only an application that Ray has lost does."""
    old, part, none = app("a", App.RUNNING, replicas=8), app("b", App.DEPLOYING, replicas=1), app("b", App.DEPLOYING)
    filling = decide(rollout(), serve(old, part), 50.0)
    flapping = filling
    for second in range(60, 300, 10):
        flapping = decide(flapping, serve(old, none if second % 20 else part), float(second))
    assert flapping.revisions == filling.revisions
    assert phases(decide(flapping, serve(old, part), 50.0 + FILL_WAIT_S))["b"] is Phase.SERVING
    assert phases(decide(flapping, serve(old, none), 51.0 + START_TIMEOUT_S))["b"] is Phase.FAILED
    assert phases(decide(flapping, serve(old), 60.0))["b"] is Phase.CANDIDATE
    broken = decide(filling, serve(old, app("b", App.DEPLOY_FAILED, message="out of memory")), 60.0)
    assert phases(broken) == {"a": Phase.SERVING, "b": Phase.FAILED}


CANARY = Canary(weight=0.1, for_s=60)
OLD, NEW = app("a", App.RUNNING, replicas=1), app("b", App.RUNNING, replicas=1)


def in_canary(since: float = 0.0) -> DeploymentView:
    return view(
        revision("a", Phase.SERVING, was_ready=True),
        revision("b", Phase.CANARY, since=since),
        wanted="b",
        state=State.READY,
        canary=CANARY,
    )


def test_a_canary_takes_a_share_and_then_all() -> None:
    start = replace(
        in_canary(), revisions=(revision("a", Phase.SERVING, was_ready=True), revision("b", Phase.CANDIDATE))
    )
    trial = decide(start, serve(OLD, NEW), 5.0)
    assert phases(trial) == {"a": Phase.SERVING, "b": Phase.CANARY} and trial.state is State.READY
    assert trial.message == "b is a canary with 10% of the requests for 60 s, a has the rest"
    assert decide(trial, serve(OLD, NEW), 5.0 + 59.9) == trial
    promoted = decide(trial, serve(OLD, NEW), 5.0 + 60)
    assert phases(promoted) == {"a": Phase.DRAINING, "b": Phase.SERVING} and promoted.message is None


@pytest.mark.parametrize("broken", [App.UNHEALTHY, App.DEPLOY_FAILED])
def test_a_canary_that_fails_gets_nothing_any_more_and_says_why(broken: App) -> None:
    hurt = decide(in_canary(), serve(OLD, app("b", broken, replicas=1, message="out of memory")), 9.0)
    assert phases(hurt) == {"a": Phase.SERVING, "b": Phase.FAILED} and hurt.state is State.READY
    assert hurt.message is not None and hurt.message.startswith("b failed, a goes on serving: ")
    assert hurt.message.endswith("out of memory")
    assert decide(hurt, serve(OLD), 9.0 + 10 * RETRY_FAILED_S) == hurt  # not before somebody asks for it again


@pytest.mark.parametrize(
    ("requests", "failed", "goes_on"),
    [
        (0, 0, True),
        (1, 1, True),
        (2, 2, False),
        (19, 1, True),
        (40, 2, True),
        (40, 3, False),
        (1000, 50, True),
        (1000, 51, False),
    ],
)
def test_a_canary_is_judged_by_what_gateways_saw(requests: int, failed: int, goes_on: bool) -> None:
    after = decide(in_canary(), serve(OLD, NEW), 9.0, Seen(requests, failed))
    assert phases(after)["b"] is (Phase.CANARY if goes_on else Phase.FAILED)
    assert phases(after)["a"] is Phase.SERVING and after.state is State.READY
    if not goes_on:
        assert after.message == (
            f"b failed, a goes on serving: As a canary it failed {failed} of {requests} requests, "
            "and 5% of at least 20 may fail."
        )
        # It is not tried again by itself, and its counts do not follow it into its next trial.
        assert phases(decide(after, serve(OLD, NEW), 9.0 + 2 * RETRY_FAILED_S))["b"] is Phase.FAILED


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0, 0.99), st.integers(1, 100))
def test_a_canary_s_bounds(requests: int, failed: int, share: float, least: int) -> None:
    failed = min(failed, requests)
    bounds = Canary(max_failed_share=share, min_requests=least)
    fault = canary_fault(bounds, Seen(requests, failed))
    if failed == 0:
        assert fault is None
    if requests >= least:
        assert (fault is None) is (failed <= share * requests)
    if fault is not None:  # however many follow without a failure until there are enough
        assert canary_fault(bounds, Seen(max(requests, least), failed)) is not None


def test_a_canary_that_ray_has_lost_begins_anew() -> None:
    lost = decide(in_canary(), serve(OLD, app("b", App.RUNNING)), 30.0)
    assert phases(lost) == {"a": Phase.SERVING, "b": Phase.CANDIDATE}
    back = decide(lost, serve(OLD, NEW), 40.0)
    assert phases(back)["b"] is Phase.CANARY
    assert phases(decide(back, serve(OLD, NEW), 99.0))["b"] is Phase.CANARY
    assert phases(decide(back, serve(OLD, NEW), 100.0))["b"] is Phase.SERVING


def test_a_canary_takes_all_when_the_old_one_cannot_serve_or_the_wish_is_without() -> None:
    assert phases(decide(in_canary(), serve(NEW), 1.0)) == {"a": Phase.DRAINING, "b": Phase.SERVING}
    promoted = decide(replace(in_canary(), canary=None), serve(OLD, NEW), 1.0)
    assert phases(promoted) == {"a": Phase.DRAINING, "b": Phase.SERVING}


def test_a_canary_that_is_no_longer_wanted_drains() -> None:
    back = decide(replace(in_canary(), wanted="a", canary=None), serve(OLD, NEW), 1.0)
    assert phases(back) == {"a": Phase.SERVING, "b": Phase.DRAINING} and back.message is None
    assert phases(decide(back, serve(OLD, NEW), 1.0 + DRAIN_SETTLE_S))["b"] is Phase.GONE


def test_a_first_revision_needs_no_canary() -> None:
    first = view(revision("a", Phase.CANDIDATE), canary=CANARY)
    assert phases(decide(first, serve(OLD), 1.0)) == {"a": Phase.SERVING}


def test_how_a_spec_takes_over_makes_no_revision_of_its_own() -> None:
    assert SPEC.model_copy(update={"canary": CANARY}).revision() == SPEC.revision()
    with pytest.raises(ValueError, match="canary must be awake"):
        DeploymentSpec(model="m", version="1", autoscaling=Autoscaling(min_replicas=0), canary=CANARY)


def test_a_wish_changed_back_and_forth_keeps_what_serves() -> None:
    start = view(
        revision("a", Phase.SERVING, was_ready=True),
        revision("b", Phase.CANDIDATE),
        revision("c", Phase.QUEUED),
        wanted="c",
    )
    old = app("a", App.RUNNING, replicas=1)
    decided = decide(start, serve(old, app("b", App.RUNNING, replicas=1)), 1.0)
    assert phases(decided) == {"a": Phase.SERVING, "b": Phase.GONE, "c": Phase.CANDIDATE}
    back = decide(replace(decided, wanted="a"), serve(old), 2.0)
    assert phases(back) == {"a": Phase.SERVING, "b": Phase.GONE, "c": Phase.GONE} and back.state is State.READY


def test_a_draining_revision_that_is_wanted_again_serves_again() -> None:
    start = view(
        revision("a", Phase.DRAINING, was_ready=True), revision("b", Phase.SERVING, was_ready=True), wanted="a"
    )
    both = serve(app("a", App.RUNNING, replicas=1), app("b", App.RUNNING, replicas=1))
    again = decide(decide(start, both, 1.0), both, 1.0)
    assert phases(again) == {"a": Phase.SERVING, "b": Phase.DRAINING}


def test_a_restarted_ray_is_given_everything_again() -> None:
    serving = view(revision("a", Phase.SERVING, was_ready=True), state=State.READY)
    lost = decide(serving, serve(), 1.0)
    assert (lost.state, phases(lost)) == (State.STARTING, {"a": Phase.SERVING})
    assert decide(lost, serve(app("a", App.RUNNING, replicas=1)), 2.0).state is State.READY


def test_what_once_served_is_tried_again_after_a_failure() -> None:
    serving = view(revision("a", Phase.SERVING, was_ready=True), state=State.READY)
    failed = decide(serving, serve(app("a", App.DEPLOY_FAILED, message="store away")), 1.0)
    assert (failed.state, failed.message) == (State.FAILED, "store away")
    assert decide(failed, serve(), 1.0 + RETRY_FAILED_S - 1) == failed
    assert phases(decide(failed, serve(), 1.0 + RETRY_FAILED_S)) == {"a": Phase.QUEUED}


def test_an_unhealthy_application_serves_with_what_is_left_and_recovers() -> None:
    serving = view(revision("a", Phase.SERVING, was_ready=True), state=State.READY)
    hurt = decide(serving, serve(app("a", App.UNHEALTHY, replicas=1, message="one died")), 1.0)
    assert (hurt.state, hurt.message) == (State.READY, "one died")
    dead = decide(hurt, serve(app("a", App.UNHEALTHY, message="all died")), 2.0)
    assert (dead.state, dead.message) == (State.FAILED, "all died")
    assert decide(dead, serve(app("a", App.RUNNING, replicas=1)), 3.0).state is State.READY


def test_undeploying_withdraws_drains_and_ends_when_ray_has_nothing_left() -> None:
    start = view(revision("a", Phase.SERVING, was_ready=True), revision("b", Phase.CANDIDATE), wanted="b", stop=True)
    running = serve(app("a", App.RUNNING, replicas=1), app("b", App.DEPLOYING))
    draining = decide(start, running, 1.0)
    assert (draining.state, phases(draining)) == (State.STOPPING, {"a": Phase.DRAINING, "b": Phase.GONE})
    gone = decide(draining, running, 1.0 + DRAIN_SETTLE_S)
    assert (gone.state, phases(gone)) == (State.STOPPING, {"a": Phase.GONE, "b": Phase.GONE})
    assert decide(gone, serve(app("a", App.DELETING)), 10.0).state is State.STOPPING
    assert decide(gone, serve(), 11.0).state is State.STOPPED


def test_while_ray_is_away_everything_stays_and_the_reason_is_shown() -> None:
    serving = view(revision("a", Phase.SERVING, was_ready=True), state=State.READY)
    assert unreachable(serving, "away") == replace(serving, message="away")
    stopped = replace(serving, state=State.STOPPED)
    assert unreachable(stopped, "away") == stopped


# Half of what is drawn lets a rollout get somewhere: nothing there yet, or running.
APPS = st.sampled_from([None, (App.RUNNING, 1), (App.RUNNING, 0)]) | st.sampled_from(
    [(state, count) for state in App for count in (0, 1)]
)


@given(st.lists(st.tuples(st.sampled_from("abc"), APPS, APPS, APPS, st.floats(0, 100)), max_size=25), st.data())
def test_whatever_ray_says_traffic_moves_only_to_what_is_ready(
    rounds: list[tuple[str, object, object, object, float]], data: st.DataObject
) -> None:
    now = 0.0
    current = view(*[revision(name, Phase.GONE) for name in "abc"])
    for wanted, *states, elapsed in rounds:
        now += float(elapsed)  # type: ignore[arg-type]
        status = serve(*[app(name, *each) for name, each in zip("abc", states, strict=True) if each])  # type: ignore[misc]
        before = replace(
            current,
            wanted=wanted,
            stop=data.draw(st.integers(0, 5)) == 0,
            canary=data.draw(st.sampled_from([None, CANARY])),
        )
        after = decide(before, status, now)
        was, is_ = before.serving(), after.serving()
        assert sum(each.phase is Phase.SERVING for each in after.revisions) <= 1
        if is_ is not None and is_ != was:
            found = status.applications[is_.name]
            (earlier,) = (each for each in before.revisions if each.name == is_.name)
            filled = earlier.phase is Phase.FILLING and now - earlier.since >= FILL_WAIT_S
            assert is_.name == wanted and found.replica_urls
            if earlier.phase is not Phase.CANARY:  # that one has proved itself
                assert found.state is App.RUNNING or (found.state is App.DEPLOYING and filled)
        if was is not None and is_ is None and not before.stop:
            assert was.name == wanted and status.applications[was.name].state is App.DEPLOY_FAILED
        if before.stop:
            assert is_ is None and after.state in (State.STOPPING, State.STOPPED)
        for old, new in zip(before.revisions, after.revisions, strict=True):
            # What took traffic is not deleted in the round in which it stops taking it.
            assert not (old.phase is Phase.SERVING and new.phase is Phase.GONE)
        if after.state.takes_traffic:
            assert is_ is not None
        trial = after.in_canary()
        if trial is not None:  # only what is wanted and runs gets a share, beside one that serves, for a bounded time
            found = status.applications[trial.name]
            assert trial.name == wanted and found.state in (App.RUNNING, App.DEPLOYING) and found.replica_urls
            assert after.canary is not None and now - trial.since < CANARY.for_s
            assert is_ is not None and is_.name != trial.name
        current = after
