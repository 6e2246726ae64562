"""The directory: applied in order, kept on disk through kills, refused when it is old."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from tests.gateway.fake_control import route
from zenray.gateway.snapshot import Directory
from zenray.spec.clock import FakeClock
from zenray.spec.edge import KeyEntry, OrgEntry, Snapshot
from zenray.spec.errors import Unavailable


def raw(version: int, *, full: bool = False, **parts: Any) -> bytes:
    return Snapshot(version=version, full=full, issued_at=0, **parts).model_dump_json().encode()


def key(key_id: str) -> KeyEntry:
    return KeyEntry(key_id=key_id, org="acme")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return tmp_path / "gateway-0" / "snapshot.jsonl"


def new(journal: Path, clock: FakeClock) -> Directory:
    return Directory(journal, clock, max_age_s=60)


def filled(journal: Path, clock: FakeClock) -> Directory:
    known = new(journal, clock)
    orgs = {"acme": OrgEntry(org="acme", cache_salt="s")}
    known.apply(raw(3, full=True, keys={"a": key("a"), "b": key("b")}, orgs=orgs, routes={"m": route("m")}))
    known.apply(raw(4, keys={"a": None, "c": key("c")}))
    known.apply(raw(5, routes={"m": None, "n": route("n")}))
    return known


def state(known: Directory) -> tuple[Any, ...]:
    return known.version, sorted(known.keys), sorted(known.orgs), sorted(known.routes)


def test_updates_add_and_remove(journal: Path, clock: FakeClock) -> None:
    assert state(filled(journal, clock)) == (5, ["b", "c"], ["acme"], ["n"])


def test_it_starts_from_disk_as_it_was(journal: Path, clock: FakeClock) -> None:
    before = filled(journal, clock)
    after = new(journal, clock)
    assert after.load() and state(after) == state(before)
    again = new(journal, clock)
    assert again.load() and state(again) == state(before)
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600  # salts and engine keys


def test_nothing_on_disk(journal: Path, clock: FakeClock) -> None:
    known = new(journal, clock)
    assert not known.load()
    with pytest.raises(Unavailable, match="not heard from control"):
        known.check_usable()


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_a_torn_last_line_is_as_if_it_never_came(journal: Path, clock: FakeClock, cut: int) -> None:
    filled(journal, clock)
    journal.write_bytes(journal.read_bytes()[:-cut])
    known = new(journal, clock)
    assert known.load() and state(known) == (4, ["b", "c"], ["acme"], ["m"])
    # What comes after the tear is not lost behind it.
    known.apply(raw(5, routes={"n": route("n")}))
    after = new(journal, clock)
    assert after.load() and state(after) == (5, ["b", "c"], ["acme"], ["m", "n"])


def test_a_full_snapshot_replaces_everything(journal: Path, clock: FakeClock) -> None:
    known = filled(journal, clock)
    known.apply(raw(2, full=True, keys={"z": key("z")}))  # control began anew
    assert state(known) == (2, ["z"], [], [])
    after = new(journal, clock)
    assert after.load() and state(after) == state(known)


def test_age_is_counted_from_control_s_last_word_over_restarts(journal: Path, clock: FakeClock) -> None:
    known = filled(journal, clock)
    clock.advance(50)
    known.confirm()
    clock.advance(50)
    known.check_usable()
    after = new(journal, clock)
    after.load()
    after.check_usable()
    clock.advance(11)
    for directory in (known, after):
        with pytest.raises(Unavailable, match="61 s") as refused:
            directory.check_usable()
        assert refused.value.retry_after_s
    after.confirm()
    after.check_usable()


def test_a_malformed_snapshot_changes_nothing(journal: Path, clock: FakeClock) -> None:
    known = filled(journal, clock)
    before = state(known), journal.read_bytes()
    for bad in (b"", b"{}", b'{"version": 9, "full": true, "issued_at": 0, "keys": {"x": {}}}'):
        with pytest.raises(ValidationError):
            known.apply(bad)
    assert (state(known), journal.read_bytes()) == before


def test_the_journal_stays_small(journal: Path, clock: FakeClock) -> None:
    known = filled(journal, clock)
    for version in range(6, 2500):
        known.apply(raw(version, keys={"c": key(f"c{version}")}))
    assert journal.read_bytes().count(b"\n") <= 1001
    after = new(journal, clock)
    assert after.load() and after.keys["c"].entry.key_id == "c2499" and state(after) == state(known)
    assert os.listdir(journal.parent) == ["snapshot.jsonl"]


@contextmanager
def full_disk(journal: Path, *, room_bytes: int = 20) -> Iterator[None]:
    """A journal can grow by so much, and then a write is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + room_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_stops_nothing_and_spoils_nothing(
    journal: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    known = filled(journal, clock)
    saved_at = journal.stat().st_mtime
    clock.advance(10)
    with full_disk(journal):
        known.apply(raw(6, keys={"d": key("d")}))
        known.apply(raw(7, full=True, keys={f"k{n}": key("k" * 50) for n in range(100)}))
        known.apply(raw(8, keys={"b": None, "d": key("d")}))
        known.confirm()
    assert known.version == 8 and "d" in known.keys
    assert [record.message for record in caplog.records] == ["snapshot_not_saved"]
    behind = new(journal, clock)
    assert behind.load() and behind.version == 5, "what was whole before"
    assert journal.stat().st_mtime == saved_at, "what it lacks makes it no younger"
    known.confirm()  # there is room again
    after = new(journal, clock)
    assert after.load() and state(after) == state(known) and journal.stat().st_mtime == clock.now()


def test_a_gateway_starts_from_a_snapshot_that_it_cannot_write_anew(journal: Path, clock: FakeClock) -> None:
    before = filled(journal, clock)
    after = new(journal, clock)
    with full_disk(journal, room_bytes=-journal.stat().st_size + 1):
        assert after.load()
    assert state(after) == state(before)


def test_a_journal_that_cannot_be_read_or_written_leaves_control_s_word(
    journal: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    journal.mkdir(parents=True)
    known = new(journal, clock)
    assert not known.load()
    known.apply(raw(3, full=True, keys={"a": key("a")}))
    known.check_usable()
    assert state(known) == (3, ["a"], [], [])
    assert [record.message for record in caplog.records] == ["snapshot_not_read", "snapshot_not_saved"]
