"""The supervisor: order of start and stop, restarts, and what it says when a part cannot start."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zenray.cli.supervisor.policy import CALM_S, LONGEST_DELAY_S, GiveUp, Restart, after_death
from zenray.cli.supervisor.supervisor import Supervisor
from zenray.spec.errors import Unavailable


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

    def start(self) -> None:
        self._diary.append(f"start {self.name}")
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
    assert changes == [0, 1]


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
