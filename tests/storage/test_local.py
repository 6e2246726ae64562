"""What only the local directory promises: plain files, leftovers swept, clear errors of the operating system."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

import pytest

from zenray.spec.errors import InvalidDocument, InvalidValue, StorageUnavailable
from zenray.spec.platform import StorageSettings
from zenray.storage.local import LocalStore
from zenray.storage.opening import absolute, open_store


def test_objects_are_plain_readable_files(tmp_path: Path) -> None:
    LocalStore(tmp_path / "store").put_bytes("zen/m/x.json", b"{}")
    path = tmp_path / "store" / "zen" / "m" / "x.json"
    assert path.read_bytes() == b"{}"
    assert path.stat().st_mode & 0o777 == 0o644


def test_nothing_is_made_before_the_first_write(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    assert list(store.list("")) == []
    assert store.head("x") is None
    assert not (tmp_path / "store").exists()


def test_leftovers_of_dead_writers_are_swept_and_those_of_living_ones_kept(tmp_path: Path) -> None:
    unfinished = tmp_path / ".zenray-unfinished"
    unfinished.mkdir()
    dead, living, young = (unfinished / name for name in ("dead", "living", "young"))
    for path in (dead, living, young):
        path.write_bytes(b"half")
    hour_ago = time.time() - 3600
    os.utime(dead, (hour_ago, hour_ago))
    os.utime(living, (hour_ago, hour_ago))
    with living.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        LocalStore(tmp_path).put_bytes("k", b"1")
    assert sorted(path.name for path in unfinished.iterdir()) == ["living", "young"]
    assert [info.key for info in LocalStore(tmp_path).list("")] == ["k"]


def test_an_object_cannot_lie_below_another(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put_bytes("a/b", b"1")
    with pytest.raises(InvalidValue, match="other objects lie below"):
        store.put_bytes("a", b"2")
    with pytest.raises(InvalidValue, match="a part of its path is an object"):
        store.put_bytes("a/b/c", b"2")
    assert store.get_bytes("a/b") == b"1"


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "The disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "write access")]
)
def test_errors_of_the_disk_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    store = LocalStore(tmp_path)
    store.put_bytes("k", b"before")

    def fail(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageUnavailable, match=hint):
        store.put_bytes("k", b"after")
    with pytest.raises(StorageUnavailable, match=hint):
        store.put_if_absent("new", b"after")
    monkeypatch.undo()
    assert store.get_bytes("k") == b"before"
    assert store.head("new") is None
    assert not list((tmp_path / ".zenray-unfinished").iterdir())


def test_uris(tmp_path: Path) -> None:
    relative = StorageSettings(uri="file:store")
    assert open_store(relative, tmp_path).uri == f"file:{tmp_path}/store"
    assert absolute(relative, tmp_path) == StorageSettings(uri=f"file:{tmp_path}/store")
    assert open_store(absolute(relative, tmp_path)).uri == f"file:{tmp_path}/store"
    assert open_store(StorageSettings(uri="file:///srv/store")).uri == "file:/srv/store"
    s3 = StorageSettings(uri="s3://bucket/some/prefix/", endpoint_url="http://127.0.0.1:1")
    assert open_store(s3).uri == "s3://bucket/some/prefix"
    assert absolute(s3, tmp_path) == s3
    with pytest.raises(InvalidDocument, match="is relative"):
        open_store(relative)
    for uri in ("store", "", "file:", "s3://", "s3:bucket", "http://x/y", "s3://bucket/x?y=1"):
        with pytest.raises(InvalidDocument, match="names no store"):
            open_store(StorageSettings(uri=uri), tmp_path)
    with pytest.raises(InvalidValue):
        open_store(StorageSettings(uri="s3://bucket/../x"))
