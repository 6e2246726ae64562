"""The cache of a node: whole or absent, resumed, shared, looked over, healed."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from zenray.spec.errors import CorruptData, NotFound, StorageUnavailable
from zenray.spec.versions import VersionRef
from zenray.storage import cache, transfer
from zenray.storage.cache import FetchReport, fetch
from zenray.storage.fake import FakeStore
from zenray.storage.versions import publish

REF = VersionRef(model="tiny", version="v1")
RANGE_BYTES = 100


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "RANGE_BYTES", RANGE_BYTES)
    monkeypatch.setattr(transfer, "RANGE_BYTES", RANGE_BYTES)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "empty").touch()
    (path / "sub" / "model.safetensors").write_bytes(bytes(range(256)) * 4)  # 11 ranges
    return path


@pytest.fixture
def store(source: Path) -> FakeStore:
    store = FakeStore()
    publish(store, REF, source)
    return store


@pytest.fixture
def cache_dir(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def assert_whole(folder: Path, source: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            assert (folder / path.relative_to(source)).read_bytes() == path.read_bytes()
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"config.json", "empty", "sub/model.safetensors", "manifest.json", ".zenray-verified.json"}


def nothing_looks_whole(cache_dir: Path) -> bool:
    return not (cache_dir / "tiny").exists() or not list((cache_dir / "tiny").rglob("manifest.json"))


def test_fetch_brings_every_file_once(store: FakeStore, source: Path, cache_dir: Path) -> None:
    told: list[tuple[str, int, int]] = []
    folder = fetch(store, REF, cache_dir, progress=lambda *step: told.append(step))
    assert folder == cache_dir / "tiny" / "v1" / "safetensors"
    assert_whole(folder, source)
    assert told[-1] == ("download", 1026, 1026)
    reads = store.calls["get_range"]
    assert reads == 12
    assert fetch(store, REF, cache_dir) == folder
    assert store.calls["get_range"] == reads


def test_an_unknown_version_is_not_found(store: FakeStore, cache_dir: Path) -> None:
    with pytest.raises(NotFound, match="Known: v1/safetensors"):
        fetch(store, VersionRef(model="tiny", version="z"), cache_dir)
    assert not cache_dir.exists()


def test_a_broken_download_is_resumed(store: FakeStore, source: Path, cache_dir: Path) -> None:
    store.fail("get_range", StorageUnavailable("away"), key_part="model.safetensors")
    with pytest.raises(StorageUnavailable, match="away"):
        fetch(store, REF, cache_dir)
    assert nothing_looks_whole(cache_dir)
    calls = store.calls["get_range"]
    assert_whole(fetch(store, REF, cache_dir), source)
    assert store.calls["get_range"] <= 13
    assert store.calls["get_range"] - calls < 12


def test_resumed_bytes_that_prove_wrong_are_fetched_again(store: FakeStore, source: Path, cache_dir: Path) -> None:
    for _ in range(3):
        store.fail("get_range", StorageUnavailable("away"), key_part="model.safetensors", times=4)
        with pytest.raises(StorageUnavailable):
            fetch(store, REF, cache_dir)
        store._failures.clear()
    (part,) = cache_dir.rglob("model.safetensors.zenray-part")
    part.write_bytes(b"\0" * part.stat().st_size)
    assert_whole(fetch(store, REF, cache_dir), source)


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "longer"])
def test_a_corrupt_file_in_the_store_is_named(store: FakeStore, source: Path, cache_dir: Path, damage: str) -> None:
    key = REF.prefix + "sub/model.safetensors"
    good = store.objects[key]
    if damage == "missing":
        del store.objects[key]
    else:
        store.objects[key] = {"changed": good[:500] + b"X" + good[501:], "cut": good[:700], "longer": good}[damage]
    if damage == "longer":
        store.objects[key] += b"more"
        assert_whole(fetch(store, REF, cache_dir), source)  # the manifest's bytes are all there
        return
    with pytest.raises(CorruptData, match=r"zen/tiny/v1/safetensors/sub/model\.safetensors"):
        fetch(store, REF, cache_dir)
    assert nothing_looks_whole(cache_dir)
    store.objects[key] = good
    assert_whole(fetch(store, REF, cache_dir), source)


def test_a_touched_file_is_hashed_and_only_what_differs_is_fetched(
    store: FakeStore, source: Path, cache_dir: Path
) -> None:
    folder = fetch(store, REF, cache_dir)
    reads = store.calls["get_range"]
    os.utime(folder / "config.json", (1, 1))  # touched, and the same
    fetch(store, REF, cache_dir)
    assert store.calls["get_range"] == reads
    (folder / "config.json").write_text("[]")  # of the same size
    fetch(store, REF, cache_dir)
    assert store.calls["get_range"] == reads + 1
    (folder / "sub" / "model.safetensors").unlink()
    fetch(store, REF, cache_dir)
    assert_whole(folder, source)
    (folder / ".zenray-verified.json").unlink()
    fetch(store, REF, cache_dir)
    assert_whole(folder, source)


def test_full_check_finds_what_size_and_time_hide(store: FakeStore, source: Path, cache_dir: Path) -> None:
    folder = fetch(store, REF, cache_dir)
    path = folder / "sub" / "model.safetensors"
    status = path.stat()
    path.write_bytes(b"\0" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    fetch(store, REF, cache_dir)
    assert path.read_bytes() == b"\0" * status.st_size
    fetch(store, REF, cache_dir, full_check=True)
    assert_whole(folder, source)


def test_a_cached_version_serves_while_the_store_is_away(
    store: FakeStore, source: Path, cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.fail("get_bytes", StorageUnavailable("away"))
    with pytest.raises(StorageUnavailable):
        fetch(store, REF, cache_dir)
    folder = fetch(store, REF, cache_dir)
    store.fail("get_bytes", StorageUnavailable("away"))
    assert_whole(fetch(store, REF, cache_dir), source)
    assert "cannot be reached" in caplog.text
    (folder / "config.json").write_text("[]")
    store.fail("get_bytes", StorageUnavailable("away"))
    with pytest.raises(StorageUnavailable):
        fetch(store, REF, cache_dir)


def test_another_store_with_the_same_name_replaces_the_cached_one(
    store: FakeStore, source: Path, cache_dir: Path, tmp_path: Path
) -> None:
    fetch(store, REF, cache_dir)
    other_source = tmp_path / "other"
    shutil.copytree(source, other_source)
    (other_source / "config.json").write_text('{"other": true}')
    other = FakeStore()
    publish(other, REF, other_source)
    assert_whole(fetch(other, REF, cache_dir), other_source)
    assert_whole(fetch(store, REF, cache_dir), source)


def test_what_was_begun_for_another_manifest_does_not_mix_in(
    store: FakeStore, source: Path, cache_dir: Path, tmp_path: Path
) -> None:
    other_source = tmp_path / "other"
    shutil.copytree(source, other_source)
    (other_source / "extra.json").write_text("{}")
    other = FakeStore()
    publish(other, REF, other_source)
    other.fail("get_range", StorageUnavailable("away"), key_part="model.safetensors")
    with pytest.raises(StorageUnavailable):
        fetch(other, REF, cache_dir)
    assert_whole(fetch(store, REF, cache_dir), source)


def test_at_once_in_many_threads_it_is_downloaded_once(store: FakeStore, source: Path, cache_dir: Path) -> None:
    start = threading.Barrier(6)

    def one(_: int) -> Path:
        start.wait()
        return fetch(store, REF, cache_dir)

    with ThreadPoolExecutor(6) as executor:
        folders = set(executor.map(one, range(6)))
    assert_whole(folders.pop(), source)
    assert store.calls["get_range"] == 12


def test_a_disk_without_room_is_said_before_anything_is_read(
    store: FakeStore, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    with pytest.raises(StorageUnavailable, match=r"the disk has 0\.00 GB free"):
        fetch(store, REF, cache_dir)
    assert store.calls["get_range"] == 0


def test_a_disk_that_fills_up_is_said_and_resumed_later(
    store: FakeStore, source: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    writes = []

    def full(descriptor: int, data: bytes, offset: int) -> int:
        writes.append(offset)
        if len(writes) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageUnavailable, match="The disk is full"):
        fetch(store, REF, cache_dir)
    assert nothing_looks_whole(cache_dir)
    monkeypatch.setattr(os, "pwrite", pwrite)
    assert_whole(fetch(store, REF, cache_dir), source)


def test_what_a_fetch_took_is_told(store: FakeStore, cache_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    reports: list[FetchReport] = []
    store.fail("get_range", StorageUnavailable("away"), key_part="model.safetensors")
    with pytest.raises(StorageUnavailable):
        fetch(store, REF, cache_dir, on_done=reports.append)
    assert reports == []
    fetch(store, REF, cache_dir, on_done=reports.append)
    (resumed,) = reports
    assert resumed.total_bytes == resumed.fetched_bytes + resumed.resumed_bytes == 1026
    assert resumed.resumed_bytes >= RANGE_BYTES and resumed.fetched_bytes > 0 and not resumed.was_cached
    fetch(store, REF, cache_dir, on_done=reports.append)
    assert (reports[1].fetched_bytes, reports[1].total_bytes, reports[1].was_cached) == (0, 1026, True)
    assert "from an earlier attempt" in caplog.text and "found in the cache" in caplog.text


def test_a_store_that_is_away_is_no_miss_of_the_cache(store: FakeStore, cache_dir: Path) -> None:
    fetch(store, REF, cache_dir)
    reports: list[FetchReport] = []
    store.fail("get_bytes", StorageUnavailable("away"))
    fetch(store, REF, cache_dir, on_done=reports.append)
    assert reports[0].was_cached


def test_ranges_of_the_next_file_arrive_while_one_is_hashed(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "shards"
    source.mkdir()
    for number in range(3):
        (source / f"shard-{number}").write_bytes(bytes([number]) * 250)
    store = FakeStore()
    publish(store, REF, source)
    second_arrived = threading.Event()
    get_range = store.get_range

    def seen(key: str, start: int, length: int) -> bytes:
        if key.endswith("shard-1"):
            second_arrived.set()
        return get_range(key, start, length)

    def waiting_hash(path: Path) -> str:
        assert second_arrived.wait(10), "the second file waits for the first one's hash"
        return transfer.hash_file(path)

    monkeypatch.setattr(store, "get_range", seen)
    monkeypatch.setattr(cache, "hash_file", waiting_hash)
    folder = fetch(store, REF, cache_dir)
    assert (folder / "shard-2").read_bytes() == bytes([2]) * 250
