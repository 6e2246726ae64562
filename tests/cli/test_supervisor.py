"""The supervisor: order of start and stop, restarts, and what it says when a part cannot start."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.cli.supervisor.assembly import RayPart
from zenray.cli.supervisor.policy import CALM_S, LONGEST_DELAY_S, GiveUp, Restart, after_death
from zenray.cli.supervisor.supervisor import Supervisor, Watched
from zenray.cluster.head import LocalRay
from zenray.cluster.session import SessionRecord
from zenray.spec.errors import ClusterUnavailable, Unavailable
from zenray.spec.platform import RaySettings


class ScriptedPart:
    """A part that does what the test says, and writes down what was asked of it."""

    def __init__(self, name: str, diary: list[str], folder: Path, *, starts: bool = True) -> None:
        self.name = name
        self.log_file = folder / f"{name}.log"
        self.log_file.write_text(f"{name}: the disk is on fire\n")
        self.start_timeout_s = 5.0
        self.pid = None
        self._diary = diary
        self._starts = starts
        self.living = False
        self.refusals: list[Exception] = []  # what the next starts raise

    def start(self) -> None:
        self._diary.append(f"start {self.name}")
        if self.refusals:
            raise self.refusals.pop()
        self.living = self._starts

    def alive(self) -> bool:
        return self.living

    def ready(self) -> bool:
        return self.living

    def stop(self) -> None:
        self._diary.append(f"stop {self.name}")
        self.living = False


def test_parts_start_in_order_and_stop_in_reverse(tmp_path: Path) -> None:
    diary: list[str] = []
    parts = [ScriptedPart(name, diary, tmp_path) for name in ("ray", "control", "gateway")]
    supervisor = Supervisor(parts, on_change=lambda watched: None)
    supervisor.start()
    supervisor.stop()
    assert diary == ["start ray", "start control", "start gateway", "stop gateway", "stop control", "stop ray"]


def test_a_part_that_cannot_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    diary: list[str] = []
    parts = [ScriptedPart("ray", diary, tmp_path), ScriptedPart("control", diary, tmp_path, starts=False)]
    supervisor = Supervisor(parts, on_change=lambda watched: None)
    with pytest.raises(Unavailable, match=r"control ended while starting.*\n.*the disk is on fire"):
        supervisor.start()
    supervisor.stop()
    assert diary[-2:] == ["stop control", "stop ray"]


def test_a_part_that_dies_is_started_again_and_the_change_is_told(tmp_path: Path) -> None:
    diary: list[str] = []
    part = ScriptedPart("gateway", diary, tmp_path)
    changes = []
    supervisor = Supervisor([part], on_change=lambda watched: changes.append(len(watched[0].deaths_s)))
    supervisor.start()
    part.living = False
    supervisor._look_after(supervisor.watched[0])
    assert diary == ["start gateway", "stop gateway"], "what was left of it is cleared away first"
    supervisor.watched[0].restart_at_s = 0.0  # the delay is over
    supervisor._look_after(supervisor.watched[0])
    assert diary[-1] == "start gateway" and part.living
    assert changes == [0, 1, 1], "when it died, and when it was started again"


@pytest.mark.parametrize("refusal", [Unavailable("Too little memory for Ray."), OSError(28, "No space left on device")])
def test_a_restart_that_fails_is_tried_again_later_and_the_others_live_on(
    refusal: Exception, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    diary: list[str] = []
    ray, gateway = ScriptedPart("ray", diary, tmp_path), ScriptedPart("gateway", diary, tmp_path)
    supervisor = Supervisor([ray, gateway], on_change=lambda watched: None)
    supervisor.start()
    watched = supervisor.watched[0]
    ray.living, ray.refusals = False, [refusal, refusal]
    supervisor._look_after(watched)
    for deaths in (2, 3):
        watched.restart_at_s = 0.0  # the delay is over
        supervisor._look_after(watched)
        assert len(watched.deaths_s) == deaths and watched.restart_at_s is not None
    assert [record.message.partition(";")[0] for record in caplog.records] == [
        "ray died",
        *[f"ray could not be started ({refusal})"] * 2,
    ]
    watched.restart_at_s = 0.0
    supervisor._look_after(watched)
    assert ray.living and gateway.living and "stop gateway" not in diary


def test_news_that_cannot_be_written_down_stop_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    part = ScriptedPart("gateway", [], tmp_path)
    is_full = False

    def write(watched: list[Watched]) -> None:
        if is_full:
            raise OSError(28, "No space left on device", "platform.json")

    supervisor = Supervisor([part], on_change=write)
    supervisor.start()
    part.living, is_full = False, True
    supervisor._look_after(supervisor.watched[0])
    supervisor.watched[0].restart_at_s = 0.0
    supervisor._look_after(supervisor.watched[0])
    assert part.living and "No space left on device" in caplog.text


class SilentRay(LocalRay):
    """Its command lives and never answers."""

    def _command(self, ports: dict[str, int], temp_dir: Path) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(60)"]

    def _check_memory(self) -> None: ...


@pytest.fixture
def ray(tmp_path: Path) -> Iterator[SilentRay]:
    ray = SilentRay(tmp_path, RaySettings(gcs_port=0, dashboard_port=0, serve_port=0))
    yield ray
    ray.stop()


def test_ray_is_started_without_waiting_for_it(ray: SilentRay, tmp_path: Path) -> None:
    part = RayPart(ray, tmp_path)
    part.start()
    assert part.alive() and not part.ready() and part.pid is not None
    record = SessionRecord.read(tmp_path / "ray.json")
    assert record is not None
    part.stop()
    assert record.processes() == [] and not part.alive()


def test_a_ray_that_dies_while_it_starts_is_tried_once_more_and_then_dead(
    ray: SilentRay, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = RayPart(ray, tmp_path)
    part.start()
    pids = []
    for _ in range(2):
        record = SessionRecord.read(tmp_path / "ray.json")
        assert record is not None
        record.end(patience_s=0)
        pids.append(record.sid)
        if len(pids) == 1:
            assert part.alive(), "the second try"
    assert not part.alive() and not part.ready()
    assert len(set(pids)) == 2 and "Ray did not start: Ray is not running" in caplog.text


def test_a_ray_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        busy = RaySettings(gcs_port=0, dashboard_port=taken.getsockname()[1], serve_port=0)
        with pytest.raises(ClusterUnavailable, match=r"ray\.dashboard_port"):
            RayPart(SilentRay(tmp_path, busy), tmp_path).start()


def test_a_part_that_never_worked_is_given_up() -> None:
    assert isinstance(after_death([10.0], was_ready=False), GiveUp)


def test_the_delay_doubles_with_each_death_in_a_row_and_a_calm_stretch_forgives() -> None:
    assert after_death([0.0], was_ready=True) == Restart(0.5)
    assert after_death([0.0, 1.0, 2.0], was_ready=True) == Restart(2.0)
    assert after_death([0.0, 1.0, 2.0 + CALM_S], was_ready=True) == Restart(0.5)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_the_delay_is_always_bounded(times: list[float]) -> None:
    decision = after_death(sorted(times), was_ready=True)
    assert isinstance(decision, Restart) and 0.5 <= decision.delay_s <= LONGEST_DELAY_S
