"""What would spoil a run: steps that go wrong, notice that a worker goes, a store that is away, a full disk."""

from __future__ import annotations

import math
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.training.spoilt import spoilt_run
from tests.training.tiny import FolderRecorder, job
from zenray.spec.errors import InvalidValue, StorageUnavailable
from zenray.spec.training import Faults
from zenray.training import notice
from zenray.training.faults import data_step, decide, divergence, in_a_row, taken_losses
from zenray.training.networks import Checkpoint
from zenray.training.uploads import upload

POLICY = Faults(diverging="skip", window_steps=4, most_in_a_row=3)
hundredths = st.integers(0, 5000).map(lambda number: number / 100)  # floats near 0 fail where denormals are flushed
losses_around = st.lists(hundredths, min_size=4, max_size=4)


def step(loss: float, was_skipped: bool = False) -> dict[str, Any]:
    return {"event": "step", "loss": loss, "was_skipped": was_skipped}


@pytest.mark.parametrize(
    ("losses", "loss", "diverges"),
    [
        ([3.0, 3.0, 3.0, 3.0], 4.0, False),  # no more than least_rise
        ([3.0, 3.0, 3.0, 3.0], 4.01, True),
        ([2.0, 3.0, 4.0, 5.0], 15.3, False),  # median 3.5, median distance 1: 8 deviations are 11.86
        ([2.0, 3.0, 4.0, 5.0], 15.4, True),
        ([3.0, 3.0, 3.0], 99.0, False),  # the window is not full yet
        ([3.0, 3.0, 3.0, 3.0], -99.0, False),  # better is no fault
        ([3.0, 3.0, 3.0, 99.0], 4.01, True),  # one outlier that was learnt from hides no other
    ],
)
def test_a_loss_diverges_by_the_stated_rule(losses, loss, diverges) -> None:
    assert bool(divergence(losses, loss, POLICY)) is diverges


@given(losses_around, hundredths, hundredths, hundredths)
def test_divergence_is_about_the_distance_alone_and_a_worse_loss_is_no_better(losses, rise, shift, more) -> None:
    loss = max(losses) + rise
    found = bool(divergence(losses, loss, POLICY))
    moved = bool(divergence([one + shift for one in losses], loss + shift, POLICY))
    near = abs(rise) < 1e-9 or abs(loss - _limit(losses)) < 1e-6
    assert near or moved == found
    assert not found or divergence(losses, loss + more, POLICY)


def _limit(losses: list[float]) -> float:
    middle = sorted(losses)[1] / 2 + sorted(losses)[2] / 2
    away = sorted(abs(one - middle) for one in losses)
    return middle + max(1.0, 8 * 1.4826 * (away[1] + away[2]) / 2)


@given(st.lists(st.tuples(hundredths, st.booleans())), st.sampled_from(["nan", "inf", "-inf", "5.0"]))
def test_what_is_not_finite_is_never_learnt_from_and_what_is_taken_is_finite(steps, loss) -> None:
    history = [step(*one) for one in steps]
    for norm in (1.0, math.nan, math.inf):
        found = decide(history, float(loss), norm, Faults(), checkpoint=5)
        is_sound = math.isfinite(float(loss)) and math.isfinite(norm)
        assert (found.action == "take") is is_sound and bool(found.reason) is not is_sound


@pytest.mark.parametrize("policy", ["skip", "roll_back", "stop"])
@pytest.mark.parametrize("fault", ["not_finite", "diverging"])
def test_each_fault_has_its_own_policy(policy, fault) -> None:
    faults = Faults(**{"window_steps": 4, fault: policy})
    loss = math.nan if fault == "not_finite" else 50.0
    found = decide([step(3.0)] * 4, loss, 1.0, faults, checkpoint=2)
    assert found.action == policy
    assert ("diverges from the last 4 steps' median of 3" in found.reason) is (fault == "diverging")


def test_divergence_is_not_looked_for_unless_asked() -> None:
    assert decide([step(3.0)] * 99, 1e9, 1.0, Faults(), 0).action == "take"


def test_too_many_in_a_row_stop_the_run_whatever_the_policy() -> None:
    history = [step(3.0), step(math.nan, True), step(math.nan, True)]
    assert decide(history, math.nan, 1.0, POLICY, 0).action == "skip"
    found = decide([*history, {"event": "evaluation"}, step(math.nan, True)], math.nan, 1.0, POLICY, 0)
    assert found.action == "stop" and "3 times in a row" in found.reason
    back = Faults(not_finite="roll_back", most_in_a_row=2)
    history = [
        {"event": "rolled_back", "step": 4, "from": 6},
        step(3.0),
        {"event": "rolled_back", "step": 4, "from": 5},
    ]
    assert in_a_row(history, 4) == 2 and in_a_row(history, 8) == 0
    assert decide(history, math.nan, 1.0, back, 4).action == "stop"
    assert decide(history, math.nan, 1.0, back, 8).action == "roll_back"


def test_without_a_checkpoint_there_is_nothing_to_roll_back_to() -> None:
    found = decide([], math.nan, 1.0, Faults(not_finite="roll_back"), 0)
    assert found.action == "stop" and "no checkpoint yet" in found.reason


def test_only_steps_that_were_learnt_from_are_the_measure() -> None:
    history = [step(float(number), number % 2 == 1) for number in range(20)]
    assert taken_losses(history, POLICY) == [12.0, 14.0, 16.0, 18.0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=5), st.integers(0, 50))
def test_data_after_rollbacks_is_data_that_was_never_read(backs, index) -> None:
    """Each rollback goes on with what follows the step at fault."""
    history: list[dict[str, Any]] = []
    checkpoint = 0
    for further, beyond in backs:
        checkpoint += further
        bad = checkpoint + beyond
        read = data_step(history, bad)
        history.append({"event": "rolled_back", "step": checkpoint, "from": bad})
        assert data_step(history, checkpoint) == read + 1
    assert data_step(history, index + 1) == data_step(history, index) + 1


@pytest.fixture
def run(base: Checkpoint, tokens):
    return partial(spoilt_run, base, tokens)


def test_a_diverging_step_is_skipped_and_the_next_is_not(run, text, tmp_path) -> None:
    wanted = job(text, faults={"diverging": "skip", "window_steps": 4}, steps=8)
    history = run(wanted, FolderRecorder(tmp_path), bad=(2, 5), loss=1e4).history
    steps = [e for e in history if e["event"] == "step"]
    assert [e["step"] for e in steps if e["was_skipped"]] == [5]  # at step 2 the window is not full
    assert "diverges" in steps[5]["fault"]


def test_stop_leaves_the_state_before_the_step_and_another_policy_goes_on_from_it(run, text, tmp_path) -> None:
    wanted = job(text, faults={"not_finite": "stop"}, steps=8)
    recorder = FolderRecorder(tmp_path)
    outcome = run(wanted, recorder, bad=(3,))
    assert outcome.stopped is not None and outcome.stopped.startswith("at step 4 a loss of nan")
    assert recorder.names == ["step-00000002", "step-00000003"]
    assert run(wanted, recorder, bad=(3,)).stopped == outcome.stopped
    assert recorder.names == ["step-00000002", "step-00000003"]
    on = run(job(text, faults={"not_finite": "skip"}, steps=8), recorder, bad=(3,))
    assert on.stopped is None and recorder.names[-1] == "step-00000008"


def test_the_first_sigterm_is_a_notice_and_the_second_is_what_it_was(monkeypatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        notice.watch_for_notice()
        assert not notice.Notice().is_given()
        os.kill(os.getpid(), signal.SIGTERM)
        assert notice.Notice().is_given() and heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        notice._given.clear()
        signal.signal(signal.SIGTERM, before)


class Away:
    """A file system that fails so many times before it works."""

    def __init__(self, times: int) -> None:
        self.left, self.real = times, pyarrow.fs.LocalFileSystem()

    def create_dir(self, path: str, recursive: bool) -> None:
        self.real.create_dir(path, recursive=recursive)

    def open_output_stream(self, path: str):
        if self.left > 0:
            self.left -= 1
            raise OSError("AWS Error NETWORK_CONNECTION")
        return self.real.open_output_stream(path)


def test_a_store_that_is_away_is_tried_again_until_patience_ends(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).write_bytes(name.encode() * 100_000)
    waited: list[float] = []
    upload(folder, Away(9), str(tmp_path / "to"), patience_s=600, sleep=waited.append)  # type: ignore[arg-type]
    assert {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }
    assert len(waited) == 9 and max(waited) <= 15.5 and sum(waited) > 60
    with pytest.raises(StorageUnavailable, match=r"could not be written to .* in 0 s: AWS Error NETWORK") as error:
        upload(folder, Away(9), str(tmp_path / "to"), patience_s=0)  # type: ignore[arg-type]
    assert "goes on from the checkpoint before" in str(error.value)


def test_the_causes_of_a_failed_run_are_said_once_each_without_tracebacks() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    from zenray.training.attempts import causes

    traceback = (
        'Traceback (most recent call last):\n  File "x.py", line 1\nzenray.StorageUnavailable: The disk is full.\n'
    )
    full = UserExceptionWithTraceback(StorageUnavailable("The disk is full."), traceback)
    dead = RuntimeError("The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker")
    told = causes(WorkerGroupError("long", {0: full, 2: full, 1: dead}))
    assert told == (
        "worker 0, 2: zenray.StorageUnavailable: The disk is full; "
        "worker 1: The actor died unexpectedly before finishing this task"
    )
    assert "no room" in causes(ControllerError(RuntimeError("no room")))


def test_what_is_wrong_with_the_job_itself_ends_the_run_and_a_machines_failure_does_not() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    from zenray.training.attempts import EndsForOwnErrors

    away = UserExceptionWithTraceback(StorageUnavailable("The store is away."), "Traceback")
    wrong = UserExceptionWithTraceback(InvalidValue("Nothing would learn.", hint="Name a part."), "Traceback")
    EndsForOwnErrors().after_exception(None, {0: away, 1: RuntimeError("The actor died.")})
    with pytest.raises(InvalidValue, match=r"Nothing would learn\. Name a part\."):
        EndsForOwnErrors().after_exception(None, {0: away, 1: wrong})
