"""Disks that fill up, power that is cut, logs that grow: nothing recorded is lost, nothing half-recorded counts."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from tests.gateway.metering.conftest import MakeMeter, die, open_charge
from tests.gateway.metering.test_meter import FINAL, Ledger
from zenray.gateway.metering import Meter, MeterFull, replay
from zenray.gateway.metering import meter as meter_module
from zenray.gateway.metering.records import Damage, frame, read_records
from zenray.spec.errors import CorruptData, StorageUnavailable
from zenray.spec.usage import Outcome, Usage


@contextlib.contextmanager
def files_end_at(size_bytes: int) -> Iterator[None]:
    """A disk that is full: a write past `size_bytes` of any file is taken in part or not at all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def newest_segment(folder: Path) -> Path:
    return max(folder.glob("*.wal"))


def test_an_open_that_does_not_fit_leaves_no_trace(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter()
    kept = open_charge(meter).close(Outcome.COMPLETED, FINAL)
    segment = newest_segment(tmp_path / "wal")
    size_bytes = segment.stat().st_size
    for room_bytes in (0, 1, 7, 8, 9, 300):
        with files_end_at(size_bytes + room_bytes), pytest.raises(MeterFull, match="cannot be written") as refused:
            open_charge(meter)
        assert refused.value.hint
        assert segment.stat().st_size == size_bytes
    assert meter.open_streams == 0
    after = open_charge(meter).close(Outcome.COMPLETED, FINAL)
    die(meter)
    assert make_meter().pending(10) == [kept, after]


def test_a_close_that_does_not_fit_waits_and_is_billed_once(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter()
    first, second = open_charge(meter), open_charge(meter)
    first.count(0, 10, 2)
    with files_end_at(newest_segment(tmp_path / "wal").stat().st_size + 100):
        events = [first.close(Outcome.COMPLETED, FINAL), second.close(Outcome.COMPLETED, FINAL)]
        with pytest.raises(MeterFull, match="2 closed requests wait"):
            open_charge(meter)
        with pytest.raises(ValueError):
            first.count(0, 10, 9)
        meter.commit()
        assert (meter.pending(10), meter.unshipped_events) == ([], 2)
        assert meter.unshipped_nano_usd("acme") == sum(event.cost_nano_usd() for event in events)
    meter.commit()
    assert meter.pending(10) == replay(tmp_path / "wal") == events
    meter.acknowledge(event.billing_key for event in events)
    assert (meter.unshipped_events, meter.unshipped_nano_usd("acme"), meter.open_streams) == (0, 0, 0)
    open_charge(meter).close(Outcome.COMPLETED, FINAL)


@pytest.mark.parametrize("prompts", [1, 2])
def test_killed_while_a_close_waits_the_slots_hold_the_final_count(make_meter: MakeMeter, prompts: int) -> None:
    meter = make_meter()
    charge = open_charge(meter, choices=4, prompts=prompts)
    for choice in range(4):
        charge.count(choice, 6, choice)
    final = Usage(input_tokens=6 * prompts, cached_input_tokens=3, output_tokens=17)
    with files_end_at(1):
        charge.close(Outcome.COMPLETED, final)
    die(meter)
    (event,) = make_meter().pending(10)
    assert event.outcome == Outcome.INTERRUPTED
    assert event.usage == Usage(input_tokens=6 * prompts, output_tokens=17)


def test_without_room_for_a_new_segment_requests_are_refused(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter(max_wal_bytes=1 << 16)  # segments of 4 KiB
    while newest_segment(tmp_path / "wal").stat().st_size < 4096:
        open_charge(meter).close(Outcome.COMPLETED, FINAL)
    events = meter.pending(100)
    with files_end_at(0), pytest.raises(MeterFull):
        open_charge(meter)
    events.append(open_charge(meter).close(Outcome.COMPLETED, FINAL))
    assert meter.pending(100) == events


def test_past_its_bound_the_log_refuses_and_drops_nothing(make_meter: MakeMeter, tmp_path: Path) -> None:
    bound_bytes = 1 << 16
    meter = make_meter(max_wal_bytes=bound_bytes)
    events, held = [], [open_charge(meter) for _ in range(10)]
    with pytest.raises(MeterFull, match="wait to be shipped"):
        while True:
            events.append(open_charge(meter).close(Outcome.COMPLETED, FINAL))
    events += [charge.close(Outcome.COMPLETED, FINAL) for charge in held]
    on_disk_bytes = sum(path.stat().st_size for path in (tmp_path / "wal").glob("*.wal"))
    assert bound_bytes * 0.8 < on_disk_bytes == meter.wal_bytes <= bound_bytes
    assert meter.pending(1000) == replay(tmp_path / "wal") == events
    ledger = Ledger()
    ledger.take(meter)
    meter.commit()
    assert list(ledger.events.values()) == events
    assert meter.wal_bytes <= bound_bytes / 8
    open_charge(meter)


def test_segments_go_when_all_in_them_is_acknowledged(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter, ledger, expected = make_meter(max_wal_bytes=1 << 16), Ledger(), {}
    long = open_charge(meter, request_id="long")
    for number in range(500):  # several times the bound, with one stream open all the while
        event = open_charge(meter).close(Outcome.COMPLETED, FINAL)
        expected[event.billing_key] = event
        long.count(0, 10, number)
        if number % 20 == 0:
            ledger.take(meter)
            meter.commit()
    ledger.take(meter)
    meter.commit()
    assert len(list((tmp_path / "wal").glob("*.wal"))) <= 2
    die(meter)
    ledger.take(make_meter())
    assert ledger.events.pop(long.billing_key).usage == Usage(input_tokens=10, output_tokens=499)
    assert ledger.events == expected


def test_acknowledged_out_of_order_nothing_unshipped_is_deleted(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter(max_wal_bytes=1 << 16)
    events = [open_charge(meter).close(Outcome.COMPLETED, FINAL) for _ in range(20)]
    assert len(list((tmp_path / "wal").glob("*.wal"))) > 3
    meter.acknowledge(event.billing_key for event in events[1:])
    meter.commit()
    assert meter.pending(100) == events[:1]
    die(meter)
    assert make_meter(max_wal_bytes=1 << 16).pending(100)[0] == events[0]


def test_a_start_that_fails_half_way_bills_the_interrupted_at_the_next(make_meter: MakeMeter) -> None:
    meter = make_meter()
    charges = [open_charge(meter) for _ in range(10)]
    for tokens, charge in enumerate(charges):
        charge.count(0, 5, tokens)
    die(meter)
    with files_end_at(3000), pytest.raises(MeterFull, match="cannot be written"):  # three of ten closes, and slots
        make_meter()
    events = {event.billing_key: event.usage for event in make_meter().pending(100)}
    assert events == {
        charge.billing_key: Usage(input_tokens=5, output_tokens=tokens) for tokens, charge in enumerate(charges)
    }


def test_what_memory_does_not_hold_is_shipped_from_the_disk(
    make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter, ledger, expected = make_meter(max_wal_bytes=1 << 18), Ledger(), []
    monkeypatch.setattr(meter._outbox, "_max_in_memory", 10)
    for number in range(150):
        expected.append(open_charge(meter, request_id=str(number)).close(Outcome.COMPLETED, FINAL))
    assert meter._outbox._in_memory < 75
    assert meter.unshipped_events == 150
    ledger.take(meter)
    assert list(ledger.events.values()) == expected
    assert (meter.unshipped_events, meter._outbox._in_memory, meter.unshipped_nano_usd("acme")) == (0, 0, 0)


def test_a_log_cut_at_any_byte_bills_each_request_once(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter()
    open_charge(meter, request_id="0").close(Outcome.COMPLETED, FINAL)
    second = open_charge(meter, request_id="1")
    second.count(0, 10, 3)
    second.close(Outcome.COMPLETED, FINAL)
    log = newest_segment(tmp_path / "wal").read_bytes()
    whole = {event.request_id: event for event in meter.pending(10)}
    die(meter)
    seen = set()
    for length in range(len(log) + 1):
        newest_segment(tmp_path / "wal").write_bytes(log[:length])
        events = replay(tmp_path / "wal")
        assert len({event.request_id for event in events}) == len(events)
        for event in events:
            counted = Usage() if event.request_id == "0" else Usage(input_tokens=10, output_tokens=3)
            assert event == whole[event.request_id] or (event.outcome, event.usage) == (Outcome.INTERRUPTED, counted)
        seen.add(tuple(event.outcome for event in events))
    done, cut = Outcome.COMPLETED, Outcome.INTERRUPTED
    assert seen == {(), (cut,), (done,), (done, cut), (done, done)}


def power_cut(meter: Meter, folder: Path, committed: dict[str, int], kept_share: float) -> None:
    """The disk after a power cut: what was committed, some of what came after, and slots as new as may be."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy)
    die(meter)
    for path in copy.glob("*.wal"):
        sure_bytes = committed.get(path.name, 0)
        os.truncate(path, sure_bytes + int(kept_share * (path.stat().st_size - sure_bytes)))
    shutil.rmtree(folder)
    copy.rename(folder)


@pytest.mark.parametrize("kept_share", [0, 0.3, 0.5, 0.9])
def test_a_power_cut_loses_only_what_came_after_the_last_commit(
    make_meter: MakeMeter, tmp_path: Path, kept_share: float
) -> None:
    folder = tmp_path / "wal"
    meter = make_meter(max_streams=4)
    closed = [open_charge(meter).close(Outcome.COMPLETED, FINAL) for _ in range(3)]
    running = open_charge(meter)
    running.count(0, 10, 40)
    meter.commit()
    committed = {path.name: path.stat().st_size for path in folder.glob("*.wal")}
    running.close(Outcome.COMPLETED, Usage(input_tokens=10, output_tokens=41))
    for _ in range(4):  # their slots must not be the one whose close is not on the disk yet
        open_charge(meter).count(0, 99, 99)
    power_cut(meter, folder, committed, kept_share)
    events = {event.billing_key: event for event in make_meter().pending(100)}
    for event in closed:
        assert events[event.billing_key] == event
    assert events[running.billing_key].usage.output_tokens in (40, 41)


def test_a_failed_sync_stops_new_requests(make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    meter = make_meter()
    charge = open_charge(meter)
    monkeypatch.setattr(os, "fdatasync", broken)
    with pytest.raises(OSError):
        meter.commit()
    monkeypatch.undo()
    with pytest.raises(MeterFull, match="could not be synced"):
        open_charge(meter)
    event = charge.close(Outcome.COMPLETED, FINAL)
    assert meter.pending(10) == [event]


def test_more_closes_than_spare_slots_wait_for_the_disk(make_meter: MakeMeter, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = []
    meter = make_meter(max_streams=4)
    monkeypatch.setattr(meter_module.Meter, "commit", lambda self, real=Meter.commit: (syncs.append(1), real(self))[1])
    for _ in range(40):
        open_charge(meter).close(Outcome.COMPLETED, FINAL)
    assert 4 <= len(syncs) <= 6  # eight slots: one wait for every eight requests


def test_the_thread_commits_by_itself(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter(commit_interval_s=0.001, max_wal_bytes=1 << 16)
    first = newest_segment(tmp_path / "wal")
    while newest_segment(tmp_path / "wal") == first:
        open_charge(meter).close(Outcome.COMPLETED, FINAL)
    Ledger().take(meter)
    for _ in range(5000):
        if not first.exists():
            return
        meter._stopping.wait(0.001)
    pytest.fail("the finished segment was not deleted")


def test_a_clean_stop_after_shipping_leaves_no_log(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter()
    open_charge(meter).close(Outcome.COMPLETED, FINAL)
    Ledger().take(meter)
    meter.close()
    assert [path.name for path in (tmp_path / "wal").iterdir()] == ["owner.json"]
    again = make_meter()
    open_charge(again).close(Outcome.COMPLETED, FINAL)
    again.close()
    assert len(make_meter().pending(10)) == 1


def test_a_damaged_segment_is_kept_as_evidence(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter()
    first = open_charge(meter, request_id="first").close(Outcome.COMPLETED, FINAL)
    second = open_charge(meter).close(Outcome.COMPLETED, FINAL)
    path = newest_segment(tmp_path / "wal")
    die(meter)
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(b'"first"') + 1] ^= 1  # in the open record of the first
    path.write_bytes(damaged)
    meter = make_meter()
    assert meter.pending(10) == [first, second]
    Ledger().take(meter)
    meter.commit()
    assert not path.exists()
    assert path.with_suffix(".damaged").read_bytes() == damaged


def test_a_record_of_a_younger_version_stops_the_start_and_keeps_the_log(make_meter: MakeMeter, tmp_path: Path) -> None:
    meter = make_meter()
    open_charge(meter).close(Outcome.COMPLETED, FINAL)
    die(meter)
    path = newest_segment(tmp_path / "wal")
    log = path.read_bytes()
    close = next(record for record in read_records(path) if not isinstance(record, Damage) and record["t"] == "close")
    close["event"]["carbon_g"] = 3
    path.write_bytes(log + frame(orjson.dumps(close)))
    with pytest.raises(CorruptData, match="carbon_g"):
        make_meter()
    path.write_bytes(log)
    assert len(make_meter().pending(10)) == 1


@pytest.mark.parametrize("text", [b"", b"\0" * 40, b"[]", b'{"gateway_'])
def test_an_owner_file_that_a_power_cut_spoiled_is_no_obstacle(
    make_meter: MakeMeter, tmp_path: Path, text: bytes
) -> None:
    die(make_meter())
    (tmp_path / "wal" / "owner.json").write_bytes(text)
    make_meter()


def test_a_folder_that_cannot_be_used_is_named(make_meter: MakeMeter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageUnavailable, match="file/wal"):
        make_meter(folder=tmp_path / "file" / "wal")


def test_a_disk_without_room_for_the_slots_is_named_and_the_folder_stays_free(
    make_meter: MakeMeter, tmp_path: Path
) -> None:
    with files_end_at(4096), pytest.raises(MeterFull, match="No room for 131072 slots"):
        make_meter(max_streams=1 << 16)
    make_meter()
