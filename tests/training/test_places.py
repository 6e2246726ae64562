"""Room for workers: counted by machine, said when it is missing, and who goes on where some are gone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import ray

from tests.training.tiny import job
from zenray.spec.errors import InvalidValue, ZenrayError
from zenray.spec.platform import StorageSettings
from zenray.storage.job_record import job_journal
from zenray.storage.opening import open_store
from zenray.training import attempts
from zenray.training import places as places_module
from zenray.training.attempts import Attempt, _go_on_with
from zenray.training.events import EventPlace
from zenray.training.places import NoRoomError, WaitsForRoom, fewer_workers, missing, places, require_places


def of_workers(count: int, sequences_per_step: int, **axes: int):
    text = {"count": Path("/text.jsonl")}
    return job(text, sequences_per_step=sequences_per_step, sequences_per_pass=1, workers={"count": count, **axes})


def test_room_is_counted_on_each_machine_by_itself() -> None:
    machines = [{"CPU": 3.0, "GPU": 1.0}, {"CPU": 3.0}, {"memory": 1e9}]
    assert places(machines, {"CPU": 2.0}) == 2
    assert places(machines, {"CPU": 0.1}) == 60
    assert places(machines, {"CPU": 1.0, "GPU": 1.0}) == 1
    require_places(machines, 2, {"CPU": 2.0})
    with pytest.raises(InvalidValue, match=r"3 workers need 3 × 2 CPU, and this machine has 6 CPU: room for 2"):
        require_places(machines, 3, {"CPU": 2.0})


def test_what_is_missing_is_said_with_the_sum() -> None:
    assert missing({"CPU": 2.0}, 2, {"CPU": 1.0}) is None
    assert missing({"CPU": 0.3}, 3, {"CPU": 0.1}) is None
    assert (
        missing({"CPU": 9.0, "GPU": 1.0}, 8, {"CPU": 1.0, "GPU": 1.0})
        == "they need 8 × 1 CPU and 1 GPU, and 9 CPU and 1 GPU is free"
    )


@pytest.mark.parametrize(
    ("left", "axes", "goes_on_with"),
    [
        (3, {"expert_parallel": 2}, 2),  # an odd count of workers for pairs
        (7, {"expert_parallel": 2}, 4),  # six would not share out 16 sequences
        (5, {"pipeline_parallel": 4}, 4),
        (3, {"pipeline_parallel": 4}, 0),
        (7, {}, 4),
    ],
)
def test_those_go_on_that_form_whole_groups_and_share_out_the_step(
    left: int, axes: dict[str, int], goes_on_with
) -> None:
    assert fewer_workers(of_workers(8, 16, **axes), left) == goes_on_with


def test_a_run_that_cannot_go_on_says_which_counts_are_legal() -> None:
    wanted = of_workers(8, 16, pipeline_parallel=2, expert_parallel=2)
    assert _go_on_with(wanted, "r", 8, 6) == 4
    with pytest.raises(ZenrayError, match="for 8 workers in vain: there is room for 3, and it can go on with 4 or 8"):
        _go_on_with(wanted, "r", 8, 3)


def test_room_that_only_seemed_to_be_there_is_not_tried_for_ever() -> None:
    wanted = of_workers(8, 16)
    assert [_go_on_with(wanted, "r", before, 8) for before in (8, 4, 2)] == [4, 2, 1]


def test_those_go_on_that_have_room_beside_what_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, tried = of_workers(4, 16), []

    def with_workers(attempt: Attempt, count: int) -> None:
        tried.append(count)
        if count == 4:
            raise NoRoomError

    monkeypatch.setattr(attempts, "can_grow", lambda: True)
    monkeypatch.setattr(attempts, "_has_checkpoint", lambda attempt: True)
    monkeypatch.setattr(attempts, "_with_workers", with_workers)
    monkeypatch.setattr(attempts, "machines_of_cluster", lambda: [{"CPU": 3.0}])
    monkeypatch.setattr(attempts, "free_on_machines", lambda: [{"CPU": 1.0}])
    attempts.fit(SimpleNamespace(job=wanted, name="r"))  # type: ignore[arg-type]
    assert tried == [4, 1]


def test_every_wait_has_all_of_the_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(places_module, "time", SimpleNamespace(monotonic=lambda: now_s))
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 2.0})
    context = SimpleNamespace(num_workers=2, resources_per_worker={"CPU": 1.0})
    callback, patient = (
        WaitsForRoom(StorageSettings(uri=f"file:{tmp_path}"), EventPlace("tiny-1"), patience_s)
        for patience_s in (100, None)
    )
    for _ in range(5):  # failures, and after each a minute without room
        for _ in range(2):
            callback.before_worker_group_start(context)
            patient.before_worker_group_start(context)
            now_s += 60
        callback.after_worker_group_start([1, 2])
    callback.before_worker_group_start(context)
    now_s += 100
    with pytest.raises(NoRoomError, match="in 100 s"):
        callback.before_worker_group_start(context)
    patient.before_worker_group_start(context)


def test_waiting_is_told_and_so_is_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = StorageSettings(uri=f"file:{tmp_path}")
    callback = WaitsForRoom(storage, EventPlace("tiny-1", "teach"))
    context = SimpleNamespace(num_workers=2, resources_per_worker={"CPU": 1.0})
    for free in (1.0, 2.0):
        monkeypatch.setattr(ray, "available_resources", lambda free=free: {"CPU": free})
        callback.before_worker_group_start(context)
    callback.after_worker_group_start([1, 2])
    callback.after_worker_group_start([1, 2])
    told, _ = job_journal(open_store(storage), "tiny-1").read(0)
    assert [(event["event"], event["phase"], event["missing"]) for event in told] == [
        ("workers", "teach", "they need 2 × 1 CPU, and 1 CPU is free"),
        ("workers", "teach", None),
    ]
