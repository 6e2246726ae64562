"""Journals: one order for all readers, whoever writes, and whatever the store does meanwhile."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from zenray.spec.errors import StorageUnavailable
from zenray.storage.fake import FakeStore
from zenray.storage.journal import Journal, JournalWriter


def test_several_writers_make_one_order_and_lose_nothing() -> None:
    store = FakeStore()

    def write(name: int) -> None:
        journal = Journal(store, "jobs/a/")
        for number in range(20):
            journal.append([{"writer": name, "number": number}])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    records, end = Journal(store, "jobs/a/").read(0)
    assert end == len(records) == 80 == Journal(store, "jobs/a/").end()
    for name in range(4):
        assert [r["number"] for r in records if r["writer"] == name] == list(range(20))


@pytest.mark.parametrize("appends", [0, 1, 2, 3, 4, 7, 8, 9, 100])
def test_the_end_is_found(appends: int) -> None:
    store = FakeStore()
    journal = Journal(store, "j/")
    for number in range(appends):
        journal.append([{"number": number}])
    assert Journal(store, "j/").end() == appends
    records, end = Journal(store, "j/").read(max(0, appends - 2))
    assert end == appends and len(records) == min(2, appends)


def test_a_write_whose_answer_was_lost_is_not_written_twice() -> None:
    class Forgetful(FakeStore):
        def put_if_absent(self, key: str, data: bytes, *, immutable: bool = False) -> bool:
            super().put_if_absent(key, data, immutable=immutable)
            return False

    store = Forgetful()
    journal = Journal(store, "j/")
    journal.append([{"a": 1}])
    journal.append([{"a": 2}])
    assert Journal(store, "j/").read(0) == ([{"a": 1}, {"a": 2}], 2)


def test_a_reader_goes_on_where_it_stood() -> None:
    store = FakeStore()
    journal = Journal(store, "j/")
    journal.append([{"a": 1}, {"a": 2}])
    _, place = journal.read(0)
    assert journal.read(place) == ([], place)
    journal.append([{"a": 3}])
    assert journal.read(place) == ([{"a": 3}], place + 1)
    assert journal.read(0, most=1) == ([{"a": 1}, {"a": 2}], 1)


def test_records_wait_while_the_store_is_away() -> None:
    store = FakeStore()
    store.fail("put_if_absent", StorageUnavailable("away"), times=2)
    with JournalWriter(Journal(store, "j/")) as write:
        for number in range(3):
            write({"number": number})
    records, _ = Journal(store, "j/").read(0)
    assert [record["number"] for record in records] == [0, 1, 2]


def test_what_the_store_never_takes_is_said(caplog: pytest.LogCaptureFixture) -> None:
    store = FakeStore()
    store.fail("head", StorageUnavailable("away"), times=10_000)
    writer = JournalWriter(Journal(store, "j/"))
    with writer:
        writer({"a": 1})
        writer.close(patience_s=0.05)
    assert "1 events were not written" in caplog.text
