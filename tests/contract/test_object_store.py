"""What every object store promises, over the fake, a local directory, and a real S3 server."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest

from tests.contract.seaweedfs import ACCESS_KEY, SECRET_KEY, S3Server, seaweedfs
from zenray.spec.errors import (
    Conflict,
    CorruptData,
    InvalidRequest,
    InvalidValue,
    NotFound,
    StorageUnavailable,
)
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.cache import fetch
from zenray.storage.fake import FakeStore
from zenray.storage.opening import open_store
from zenray.storage.transfer import hash_file
from zenray.storage.versions import list_versions, newest, publish, verify

pytestmark = pytest.mark.contract
REF = VersionRef(model="tiny", version="v1")
MULTIPART_BYTES = 40 << 20  # three parts of an S3 upload


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with seaweedfs() as server:
        yield server


@pytest.fixture
def s3_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture(params=["fake", "local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "fake":
        return FakeStore()
    if request.param == "local":
        return open_store(StorageSettings(uri="file:store"), tmp_path)
    request.getfixturevalue("s3_environment")
    server: S3Server = request.getfixturevalue("s3_server")
    prefix = hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:16]
    return open_store(
        StorageSettings(uri=f"s3://{server.bucket}/{prefix}/deep", endpoint_url=server.endpoint_url), tmp_path
    )


def put_file(store: ObjectStore, key: str, path: Path) -> None:
    store.put_file(key, path, sha256=hash_file(path))


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    path = tmp_path / "big.bin"
    block = hashlib.sha256(b"seed").digest() * 32768
    path.write_bytes(b"".join(i.to_bytes(4, "big") + block[4:] for i in range(MULTIPART_BYTES // len(block))) + b"tail")
    return path


def test_bytes_come_back(store: ObjectStore) -> None:
    store.put_bytes("a/b/c.txt", b"hello")
    assert store.get_bytes("a/b/c.txt") == b"hello"
    assert store.head("a/b/c.txt").size_bytes == 5
    store.put_bytes("a/b/c.txt", b"")
    assert store.get_bytes("a/b/c.txt") == b""
    assert store.get_range("a/b/c.txt", 0, 10) == b""


def test_missing_objects(store: ObjectStore) -> None:
    store.put_bytes("there/x", b"1")
    for key in ("absent", "there", "there/x/below", "there/y"):
        assert store.head(key) is None
        store.delete(key)
        for read in (lambda key: store.get_bytes(key), lambda key: store.get_range(key, 0, 1)):
            with pytest.raises(NotFound, match=key):
                read(key)
        with pytest.raises(NotFound):
            store.get_range(key, 0, 0)
    assert store.get_bytes("there/x") == b"1"


def test_ranges_give_the_bytes_that_exist(store: ObjectStore) -> None:
    store.put_bytes("k", b"0123456789")
    assert store.get_range("k", 0, 3) == b"012"
    assert store.get_range("k", 7, 3) == b"789"
    assert store.get_range("k", 8, 100) == b"89"
    assert store.get_range("k", 10, 1) == b""
    assert store.get_range("k", 500, 1) == b""
    assert store.get_range("k", 3, 0) == b""
    with pytest.raises(InvalidValue):
        store.get_range("k", -1, 5)


def test_list_is_by_text_prefix(store: ObjectStore) -> None:
    keys = ["zen/m/v1/a", "zen/m/v10/a", "zen/m/v2/a", "zen/m-2/v1/a", "other/x", "zen/m/v1/sub/é ü+%20.txt"]
    for key in keys:
        store.put_bytes(key, key.encode())
    assert sorted(info.key for info in store.list("")) == sorted(keys)
    assert sorted(info.key for info in store.list("zen/m/v1")) == sorted(k for k in keys if k.startswith("zen/m/v1"))
    assert sorted(info.key for info in store.list("zen/m")) == sorted(k for k in keys if k.startswith("zen/m"))
    assert sorted(info.key for info in store.list("zen/m/v2/")) == ["zen/m/v2/a"]
    assert list(store.list("nothing/here")) == []
    assert {info.key: info.size_bytes for info in store.list("")} == {key: len(key.encode()) for key in keys}
    assert store.get_bytes(keys[-1]) == keys[-1].encode()


def test_list_goes_past_one_page(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as executor:
        list(executor.map(lambda n: store.put_bytes(f"many/{n:04}", b"x"), range(1005)))
    assert sorted(info.key for info in store.list("many/")) == [f"many/{n:04}" for n in range(1005)]


def test_delete_is_idempotent(store: ObjectStore) -> None:
    store.put_bytes("a/x", b"1")
    store.put_bytes("a/y", b"2")
    store.delete("a/x")
    store.delete("a/x")
    assert store.head("a/x") is None
    assert sorted(info.key for info in store.list("a/")) == ["a/y"]
    assert store.put_if_absent("a/x", b"3")


def test_put_if_absent_never_replaces(store: ObjectStore) -> None:
    assert store.put_if_absent("m.json", b"first") is True
    assert store.put_if_absent("m.json", b"second") is False
    assert store.get_bytes("m.json") == b"first"
    store.put_bytes("n.json", b"plain")
    assert store.put_if_absent("n.json", b"second") is False


def test_of_many_conditional_puts_one_wins(store: ObjectStore) -> None:
    for round_number in range(5):
        key = f"race/{round_number}"
        start = threading.Barrier(8)

        def put(number: int, key: str = key, start: threading.Barrier = start) -> bool:
            start.wait()
            return store.put_if_absent(key, f"from {number}".encode())

        with ThreadPoolExecutor(8) as executor:
            won = list(executor.map(put, range(8)))
        assert won.count(True) == 1
        assert store.get_bytes(key) == f"from {won.index(True)}".encode()


def test_files_small_and_multipart(store: ObjectStore, tmp_path: Path, big_file: Path) -> None:
    small, empty = tmp_path / "small", tmp_path / "empty"
    small.write_bytes(b"small")
    empty.touch()
    moved = {"small": 0, "empty": 0, "big": 0}
    for key, path in {"small": small, "empty": empty, "big": big_file}.items():

        def count(more_bytes: int, key: str = key) -> None:
            moved[key] += more_bytes

        store.put_file(key, path, sha256=hash_file(path), on_bytes=count)
        info = store.head(key)
        assert info.size_bytes == path.stat().st_size == moved[key]
        assert info.sha256 in (None, hash_file(path))
    data = big_file.read_bytes()
    assert store.get_bytes("small") == b"small"
    assert store.get_bytes("empty") == b""
    assert store.get_range("big", (16 << 20) - 5, 10) == data[(16 << 20) - 5 : (16 << 20) + 5]
    assert hashlib.sha256(store.get_bytes("big")).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("size_bytes", [5, MULTIPART_BYTES])
def test_a_file_that_changed_is_not_stored(store: ObjectStore, tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * size_bytes)
    digest = hash_file(path)
    path.write_bytes(b"a" * (size_bytes - 1) + b"b")
    with pytest.raises(InvalidRequest, match="changed"):
        store.put_file("k", path, sha256=digest)
    assert store.head("k") is None
    assert list(store.list("")) == []


BAD_KEYS = ["", "/etc/passwd", "../up", "a/../../b", "a//b", "a/", ".", "a/./b", "a\\b", "a\x00b", "a\nb", "x" * 1025]


@pytest.mark.parametrize("key", [*BAD_KEYS, "a/.zenray-unfinished/b", "é" * 513])
def test_keys_that_could_leave_the_store_are_refused(store: ObjectStore, tmp_path: Path, key: str) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"1")
    calls: list[Callable[[], object]] = [
        lambda: store.put_bytes(key, b"1"),
        lambda: put_file(store, key, file),
        lambda: store.put_if_absent(key, b"1"),
        lambda: store.get_bytes(key),
        lambda: store.get_range(key, 0, 1),
        lambda: store.head(key),
        lambda: store.delete(key),
    ]
    for call in calls:
        with pytest.raises(InvalidValue, match="cannot be an object's key"):
            call()
    assert list(store.list("")) == []


@pytest.fixture
def model_folder(tmp_path: Path, big_file: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "empty.txt").touch()
    big_file.rename(folder / "model.safetensors")
    return folder


def test_a_version_goes_in_and_comes_out(store: ObjectStore, model_folder: Path, tmp_path: Path) -> None:
    manifest = publish(store, REF, model_folder, metadata={"licence": "apache-2.0"})
    assert [entry.path for entry in manifest.files] == ["config.json", "model.safetensors", "sub/empty.txt"]
    assert publish(store, REF, model_folder) == manifest
    assert list_versions(store, "tiny") == [manifest] == [newest(store, "tiny")]
    assert verify(store, REF) == []
    folder = fetch(store, REF, tmp_path / "cache")
    for entry in manifest.files:
        assert (folder / entry.path).read_bytes() == (model_folder / entry.path).read_bytes()

    (model_folder / "config.json").write_text('{"other": 1}')
    with pytest.raises(Conflict, match=r"config\.json differ"):
        publish(store, REF, model_folder)


def test_a_corrupt_shard_is_found_and_named(store: ObjectStore, model_folder: Path, tmp_path: Path) -> None:
    publish(store, REF, model_folder)
    key = REF.prefix + "model.safetensors"
    data = bytearray(store.get_bytes(key))
    data[20 << 20] ^= 1
    store.put_bytes(key, bytes(data))
    assert [problem.path for problem in verify(store, REF)] == ["model.safetensors"]
    with pytest.raises(CorruptData, match=r"tiny/v1/safetensors/model\.safetensors"):
        fetch(store, REF, tmp_path / "cache")
    assert not (tmp_path / "cache" / "tiny" / "v1" / "safetensors").exists()
    assert not list((tmp_path / "cache").rglob("model.safetensors*"))


def test_many_publish_the_same_version_at_once(store: ObjectStore, model_folder: Path) -> None:
    with ThreadPoolExecutor(3) as executor:
        manifests = list(executor.map(lambda _: publish(store, REF, model_folder), range(3)))
    assert manifests[0] == manifests[1] == manifests[2]
    assert verify(store, REF) == []


def test_s3_keeps_checksums_and_tells_caches(
    s3_server: S3Server, s3_environment: None, tmp_path: Path, big_file: Path
) -> None:
    store = open_store(StorageSettings(uri=f"s3://{s3_server.bucket}/headers", endpoint_url=s3_server.endpoint_url))
    folder = tmp_path / "model"
    folder.mkdir()
    big_file.rename(folder / "big.safetensors")
    (folder / "config.json").write_text("{}")
    publish(store, REF, folder)
    client = boto3.client("s3", endpoint_url=s3_server.endpoint_url, region_name="us-east-1")
    for name in ("big.safetensors", "config.json", "manifest.json"):
        answer = client.head_object(Bucket=s3_server.bucket, Key=f"headers/{REF.prefix}{name}", ChecksumMode="ENABLED")
        assert answer["CacheControl"] == "max-age=31536000, immutable"
        assert answer["ChecksumSHA256"]
    assert client.list_multipart_uploads(Bucket=s3_server.bucket).get("Uploads", []) == []


def test_s3_that_is_away_or_refuses_says_so(
    s3_server: S3Server, s3_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zenray.storage.s3._ATTEMPTS", 1)
    away = open_store(StorageSettings(uri="s3://bucket/x", endpoint_url="http://127.0.0.1:1"))
    with pytest.raises(StorageUnavailable, match=r"Is http://127\.0\.0\.1:1 up"):
        away.get_bytes("k")
    with pytest.raises(StorageUnavailable, match="Make the bucket 'no-such-bucket' first"):
        open_store(StorageSettings(uri="s3://no-such-bucket", endpoint_url=s3_server.endpoint_url)).get_bytes("k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageUnavailable, match="Check the credentials"):
        open_store(StorageSettings(uri=f"s3://{s3_server.bucket}", endpoint_url=s3_server.endpoint_url)).get_bytes("k")
