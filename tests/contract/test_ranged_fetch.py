"""Weights from a real S3 server: ranges in parallel, a killed fetch goes on where it was, every byte is checked."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.seaweedfs import ACCESS_KEY, SECRET_KEY, S3Server, seaweedfs
from zenray.spec.errors import CorruptData
from zenray.spec.versions import VersionRef
from zenray.storage import cache
from zenray.storage.cache import FetchReport, fetch
from zenray.storage.s3 import S3Store
from zenray.storage.versions import publish

pytestmark = pytest.mark.contract
REF = VersionRef(model="big", version="v1")
RANGE_BYTES = 1 << 20
RANGES = 24  # eight are under way at once

# Fetches until more than a third has arrived, says so, and then stands still: no more than eighteen ranges are ever
# given to it, however late its parent is to kill it, and who asks for the next one has written down the one before.
_PROGRAM = """
import itertools, sys, threading
from pathlib import Path
from zenray.spec.versions import VersionRef
from zenray.storage import cache
from zenray.storage.s3 import S3Store

cache.RANGE_BYTES = int(sys.argv[4])

class Slow(S3Store):
    asked = itertools.count(1)

    def get_range(self, *range):
        if (number := next(self.asked)) > 18:
            if number == 19:
                print("a third", flush=True)
            threading.Event().wait()
        return super().get_range(*range)

store = Slow(sys.argv[1], endpoint_url=sys.argv[2])
cache.fetch(store, VersionRef(model="big", version="v1"), Path(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with seaweedfs() as running:
        yield running


@pytest.fixture(autouse=True)
def smaller_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RANGE_BYTES", RANGE_BYTES)


@pytest.fixture
def store(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    return S3Store(server.bucket, endpoint_url=server.endpoint_url)


def test_a_killed_fetch_goes_on_where_it_was(store: S3Store, server: S3Server, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    data = random.Random(0).randbytes(RANGES * RANGE_BYTES - 1)
    (source / "model.safetensors").write_bytes(data)
    (source / "config.json").write_text("{}")
    publish(store, REF, source)

    cache_dir = tmp_path / "cache"
    command = [sys.executable, "-c", _PROGRAM, server.bucket, server.endpoint_url, str(cache_dir), str(RANGE_BYTES)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ))
    assert child.stdout is not None
    assert child.stdout.readline() == b"a third\n"
    child.kill()
    child.wait()
    assert not (cache_dir / "big").exists(), "nothing looks whole"

    asked: list[tuple[int, str]] = []
    get_range = store.get_range

    def seen(key: str, start_bytes: int, length_bytes: int) -> bytes:
        asked.append((start_bytes, threading.current_thread().name))
        return get_range(key, start_bytes, length_bytes)

    store.get_range = seen  # type: ignore[method-assign]
    reports: list[FetchReport] = []
    folder = fetch(store, REF, cache_dir, on_done=reports.append)
    assert (folder / "model.safetensors").read_bytes() == data
    (report,) = reports
    print(report)
    assert report.resumed_bytes * 3 > len(data)
    assert report.fetched_bytes > 0
    assert report.fetched_bytes + report.resumed_bytes == len(data) + 2
    of_weights = [start for start, _ in asked]
    assert len(of_weights) == len(set(of_weights)) + (of_weights.count(0) > 1), "no range twice"
    assert sum(1 for start in of_weights if start) < RANGES - 1
    fetch(store, REF, cache_dir, on_done=reports.append)
    assert reports[1].was_cached


def test_ranges_are_asked_for_side_by_side(store: S3Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(bytes(3 * RANGE_BYTES))
    ref = VersionRef(model="side", version="v1")
    publish(store, ref, source)
    together = threading.Barrier(3, timeout=30)
    get_range = store.get_range

    def meet(key: str, start_bytes: int, length_bytes: int) -> bytes:
        together.wait()  # all three are under way at once, or none ever returns
        return get_range(key, start_bytes, length_bytes)

    store.get_range = meet  # type: ignore[method-assign]
    assert (fetch(store, ref, tmp_path / "cache") / "model.safetensors").stat().st_size == 3 * RANGE_BYTES


def test_bytes_that_changed_in_the_bucket_are_refused_by_name(store: S3Store, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"right")
    ref = VersionRef(model="changed", version="v1")
    publish(store, ref, source)
    store.put_bytes(ref.prefix + "model.safetensors", b"wrong")
    with pytest.raises(CorruptData, match=r"zen/changed/v1/safetensors/model\.safetensors is corrupt"):
        fetch(store, ref, tmp_path / "cache")
