"""Finding the processes of one session, and no others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from zenray.cluster import head
from zenray.cluster.head import LocalRay
from zenray.cluster.session import SessionRecord
from zenray.spec.errors import Unavailable
from zenray.spec.platform import RaySettings

# A leader with a child that ignores SIGTERM, and that outlives it.
STUBBORN = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child])
time.sleep(60)
"""


@pytest.fixture
def record() -> Iterator[SessionRecord]:
    started_at = time.time()
    leader = subprocess.Popen([sys.executable, "-c", STUBBORN], start_new_session=True, stdout=subprocess.PIPE)
    assert leader.stdout is not None
    leader.stdout.readline()
    record = SessionRecord(leader.pid, started_at, psutil.boot_time(), "/tmp/none", 1, 2, 3)
    yield record
    record.end(patience_s=0)
    leader.wait()
    leader.stdout.close()


def test_a_session_is_found_and_ended_with_its_orphans(record: SessionRecord) -> None:
    assert len(record.processes()) == 2
    os.kill(record.sid, 9)
    assert record.end(patience_s=0.1) >= 1
    assert record.processes() == []


def test_others_are_never_ours(record: SessionRecord) -> None:
    assert replace(record, booted_at=record.booted_at - 1000).processes() == [], "the machine was started anew since"
    assert replace(record, started_at=record.started_at - 1000).processes() == [], "the number was given again"
    assert os.getpid() not in [process.pid for process in record.processes()]


def test_a_record_survives_and_a_broken_one_is_none(record: SessionRecord, tmp_path: Path) -> None:
    path = tmp_path / "ray.json"
    assert SessionRecord.read(path) is None
    record.write(path)
    assert SessionRecord.read(path) == record
    path.write_text("{")
    assert SessionRecord.read(path) is None


def test_too_little_memory_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "RAY_ITSELF_BYTES", 1 << 60)
    with pytest.raises(Unavailable, match=r"GiB are free.*lower ray.object_store_bytes"):
        LocalRay(tmp_path, RaySettings()).start()
