"""Runs that were killed, rolled back, warned or short of disk end, bit for bit, as one that nothing interrupted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.training.spoilt import spoilt_run
from tests.training.tiny import FolderRecorder, job
from zenray.spec.errors import StorageUnavailable
from zenray.training.checkpointing import difference
from zenray.training.history import read_history
from zenray.training.networks import Checkpoint

pytestmark = pytest.mark.parity


@pytest.fixture
def run(base: Checkpoint, tokens):
    return partial(spoilt_run, base, tokens)


def without_times(history):
    return [{name: value for name, value in event.items() if name != "tokens_per_s"} for event in history]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dies_after", [1, 2])
def test_a_killed_run_ends_as_an_unbroken_one_bit_for_bit(run, text, tmp_path, dtype, dies_after) -> None:
    wanted = job(text, dtype=dtype)
    unbroken = run(wanted, FolderRecorder(tmp_path / "unbroken"))
    with pytest.raises(KeyboardInterrupt):
        run(wanted, FolderRecorder(tmp_path / "broken", dies_after))
    resumed = FolderRecorder(tmp_path / "broken")
    outcome = run(wanted, resumed)
    assert resumed.names == [f"step-{step:08}" for step in (2, 4, 6)][dies_after:]
    assert difference(tmp_path / "unbroken" / "step-00000006", tmp_path / "broken" / "step-00000006") == []
    assert without_times(outcome.history) == without_times(unbroken.history)
    assert without_times(read_history(tmp_path / "broken" / "step-00000006")) == without_times(unbroken.history)


def test_a_rollback_leaves_the_run_as_if_it_had_never_read_the_data_in_between(run, text, tmp_path) -> None:
    """Steps 2 to 4 are undone: the run goes on from the checkpoint of step 2 with the data of step 5."""
    wanted = job(text, faults={"not_finite": "roll_back"})
    outcome = run(wanted, FolderRecorder(tmp_path / "back"), bad=(3,))
    assert [(e["step"], e["from"]) for e in outcome.history if e["event"] == "rolled_back"] == [(2, 3)]
    without = run(wanted, FolderRecorder(tmp_path / "without"), shift=lambda i: i if i < 2 else i + 2)
    assert difference(tmp_path / "back" / "step-00000006", tmp_path / "without" / "step-00000006") == []
    steps = [[e["loss"] for e in found.history if e["event"] == "step"] for found in (outcome, without)]
    assert steps[0] == steps[1] and len(steps[0]) == 6


@pytest.mark.parametrize("dies_after", [1, 2])
def test_a_run_that_rolled_back_and_was_killed_decides_the_same_again(run, text, tmp_path, dies_after) -> None:
    wanted = job(text, faults={"diverging": "roll_back", "window_steps": 4}, steps=10)
    bad = (5, 8)
    unbroken = run(wanted, FolderRecorder(tmp_path / "unbroken"), bad, loss=1e4)
    assert [e["from"] for e in unbroken.history if e["event"] == "rolled_back"] == [5, 6]
    with pytest.raises(KeyboardInterrupt):
        run(wanted, FolderRecorder(tmp_path / "broken", 1 + dies_after), bad, loss=1e4)
    again = run(wanted, FolderRecorder(tmp_path / "broken"), bad, loss=1e4)
    assert difference(*(tmp_path / name / "step-00000010" for name in ("unbroken", "broken"))) == []
    assert without_times(again.history) == without_times(unbroken.history)


class NoticeAt:
    """Notice when so many steps are done; `by_ray`: found by asking, not by a signal."""

    def __init__(self, step: int, by_ray: bool) -> None:
        self.left, self.by_ray = step, by_ray

    def is_given(self) -> bool:
        self.left -= 1
        return self.left == 0 and not self.by_ray

    def is_due(self) -> bool:
        return True

    def ask(self) -> bool:
        return self.left == 0


@pytest.mark.parametrize("by_ray", [False, True])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_after_notice_all_work_is_kept_and_the_run_goes_on_where_it_was(run, text, tmp_path, step, by_ray) -> None:
    wanted = job(text)
    unbroken = run(wanted, FolderRecorder(tmp_path / "unbroken"))
    recorder = FolderRecorder(tmp_path / "noticed")
    outcome = run(wanted, recorder, notice=NoticeAt(step, by_ray))
    assert outcome.was_preempted and recorder.names[-1] == f"step-{step:08}"
    assert not run(wanted, recorder).was_preempted
    assert difference(*(tmp_path / name / "step-00000006" for name in ("unbroken", "noticed"))) == []
    kept = read_history(tmp_path / "noticed" / "step-00000006")
    assert [e["event"] for e in kept] == [e["event"] for e in unbroken.history]


def test_a_full_disk_is_named_with_the_numbers_and_the_last_checkpoint_stands(run, text, tmp_path) -> None:
    class FullLater(FolderRecorder):
        """The second checkpoint's file is one that the kernel lets nobody write to."""

        def record(self, name, metrics, write):
            def onto_full(folder: Path) -> None:
                if name != "step-00000002":
                    (folder / "__0_0.distcp").symlink_to("/dev/full")
                write(folder)

            super().record(name, metrics, onto_full)

    with pytest.raises(StorageUnavailable, match=r"disk is full: the checkpoint of step 4 takes \d+ MB") as e:
        run(job(text), FullLater(tmp_path / "full"))
    assert "goes on from the checkpoint before" in str(e.value)
    (tmp_path / "full" / "unfinished").rename(tmp_path / "rubbish")
    run(job(text), FolderRecorder(tmp_path / "full"))
    run(job(text), FolderRecorder(tmp_path / "unbroken"))
    assert difference(*(tmp_path / name / "step-00000006" for name in ("unbroken", "full"))) == []
