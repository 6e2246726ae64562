"""What a run says: into the store, into a file beside it, and out loud, whatever the store and the disk do."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from zenray.spec.errors import StorageUnavailable
from zenray.storage.fake import FakeStore
from zenray.storage.job_record import job_journal
from zenray.storage.journal import Journal
from zenray.training.events import EventPlace, EventStream, _narrate


def test_the_narrator_waits_for_a_store_that_is_away(capsys: pytest.CaptureFixture[str]) -> None:
    store, stop = FakeStore(), threading.Event()
    journal = Journal(store, "jobs/one/journal/")
    journal.append([{"event": "checkpoint", "step": 4}])
    store.fail("get_bytes", StorageUnavailable("away"))
    stop.set()  # one look that fails, and the last
    _narrate(journal, 0, stop)
    assert capsys.readouterr().out == "step 4  checkpoint\n"


def test_a_disk_that_is_full_ends_the_file_of_events_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store, kept = FakeStore(), tmp_path / "events.jsonl"
    kept.symlink_to("/dev/full")
    with EventStream(store, EventPlace("tiny-1"), keep=kept) as tell:
        for step in (1, 2):
            tell({"event": "checkpoint", "step": step})
    assert caplog.text.count("is not written any more") == 1
    records, _ = job_journal(store, "tiny-1").read(0)
    assert [record["step"] for record in records] == [1, 2]
