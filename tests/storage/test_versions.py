"""Publishing, listing, verifying and discarding versions, over the store that fails when told to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zenray.spec.clock import FakeClock
from zenray.spec.errors import Conflict, CorruptData, InvalidRequest, InvalidValue, NotFound, StorageUnavailable
from zenray.spec.versions import Parents, VersionRef
from zenray.storage.fake import FakeStore
from zenray.storage.versions import (
    CLAIM_NAME,
    Problem,
    discard,
    find_manifest,
    list_models,
    list_versions,
    newest,
    publish,
    read_manifest,
    verify,
)

REF = VersionRef(model="tiny", version="v1")


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "a.safetensors").write_bytes(b"a" * 1000)
    (path / "sub" / "b.txt").write_bytes(b"b")
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("hidden")
    (path / ".DS_Store").write_text("hidden")
    return path


def test_publish_writes_files_then_the_manifest(store: FakeStore, folder: Path) -> None:
    parents = Parents(source="folder:model")
    manifest = publish(store, REF, folder, parents=parents, metadata={"k": "v"}, clock=FakeClock(5.0))
    assert [(entry.path, entry.size_bytes) for entry in manifest.files] == [
        ("a.safetensors", 1000),
        ("config.json", 2),
        ("sub/b.txt", 1),
    ]
    assert (manifest.parents, manifest.metadata, manifest.created_at) == (parents, {"k": "v"}, 5.0)
    assert read_manifest(store, REF) == manifest
    assert list(store.objects)[-1] == REF.manifest_key
    assert {REF.manifest_key, REF.prefix + "a.safetensors"} <= store.immutable
    assert not any("hidden" in data.decode() for data in store.objects.values())


def test_publishing_again_changes_nothing(store: FakeStore, folder: Path) -> None:
    first = publish(store, REF, folder, metadata={"run": "1"})
    before, puts = dict(store.objects), store.calls["put_file"]
    assert publish(store, REF, folder, metadata={"run": "2"}) == first
    assert (store.objects, store.calls["put_file"]) == (before, puts)


def test_other_content_is_a_conflict_that_names_the_file(store: FakeStore, folder: Path) -> None:
    publish(store, REF, folder)
    before = dict(store.objects)
    (folder / "config.json").write_text('{"x": 1}')
    with pytest.raises(Conflict, match=r"config\.json differ"):
        publish(store, REF, folder)
    assert store.objects == before


@pytest.mark.parametrize("method", ["put_file", "put_if_absent", "head", "list"])
@pytest.mark.parametrize("key_part", ["", "config.json", "manifest.json"])
def test_a_failure_leaves_no_version_and_the_next_attempt_finishes(
    store: FakeStore, folder: Path, method: str, key_part: str
) -> None:
    store.fail(method, StorageUnavailable("away"), key_part=key_part)
    try:
        publish(store, REF, folder)
    except StorageUnavailable:
        assert find_manifest(store, REF) is None
        assert list_versions(store, "tiny") == []
        with pytest.raises(NotFound):
            newest(store, "tiny")
    publish(store, REF, folder)
    assert verify(store, REF) == []


def test_the_next_attempt_sends_only_what_is_missing(store: FakeStore, folder: Path) -> None:
    store.fail("put_if_absent", StorageUnavailable("away"), key_part="manifest.json")
    with pytest.raises(StorageUnavailable):
        publish(store, REF, folder)
    assert store.calls["put_file"] == 3
    store.delete(REF.prefix + "sub/b.txt")
    store.objects[REF.prefix + "config.json"] = b"[]"  # of the right size, without its note: it is read and found wrong
    store._sha256.pop(REF.prefix + "config.json")
    publish(store, REF, folder)
    assert store.calls["put_file"] == 5
    assert verify(store, REF) == []


def test_a_lost_answer_to_the_manifest_is_no_conflict(
    store: FakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put_if_absent

    def put_twice(key: str, data: bytes, *, immutable: bool = False) -> bool:
        put(key, data, immutable=immutable)
        return put(key, data, immutable=immutable)

    monkeypatch.setattr(store, "put_if_absent", put_twice)
    assert publish(store, REF, folder) == read_manifest(store, REF)


def test_half_published_files_are_not_mixed_with_others(store: FakeStore, folder: Path) -> None:
    store.fail("put_file", StorageUnavailable("away"), key_part="config.json")
    with pytest.raises(StorageUnavailable):
        publish(store, REF, folder)
    (folder / "config.json").write_text('{"x": 1}')
    before = dict(store.objects)
    with pytest.raises(Conflict, match="discard"):
        publish(store, REF, folder)
    assert store.objects == before
    assert discard(store, REF) == len(before)
    assert discard(store, REF) == 0
    publish(store, REF, folder)
    with pytest.raises(Conflict, match="never changed"):
        discard(store, REF)
    assert verify(store, REF) == []


def test_a_file_that_changes_under_way_is_not_published(
    store: FakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = store.head

    def change(key: str):  # type: ignore[no-untyped-def]
        (folder / "a.safetensors").write_bytes(b"x" * 1000)
        return head(key)

    monkeypatch.setattr(store, "head", change)
    with pytest.raises(InvalidRequest, match=r"a\.safetensors changed"):
        publish(store, REF, folder)
    assert find_manifest(store, REF) is None


def test_a_store_that_loses_a_file_gets_no_manifest(
    store: FakeStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = store.put_file

    def lose(key: str, path: Path, **rest):  # type: ignore[no-untyped-def]
        if not key.endswith("config.json"):
            put(key, path, **rest)

    monkeypatch.setattr(store, "put_file", lose)
    with pytest.raises(StorageUnavailable, match=r"config\.json was uploaded with 2 bytes, but the store has none"):
        publish(store, REF, folder)
    assert find_manifest(store, REF) is None


def test_folders_that_cannot_be_a_version(store: FakeStore, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidValue, match="no files"):
        publish(store, REF, tmp_path / "absent")
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(InvalidValue, match=r"manifest\.json"):
        publish(store, REF, folder)
    assert store.objects == {}


def test_verify_names_every_file_that_is_wrong(store: FakeStore, folder: Path) -> None:
    publish(store, REF, folder)
    store.objects[REF.prefix + "a.safetensors"] = b"a" * 999 + b"b"
    store.objects[REF.prefix + "config.json"] = b"{} "
    del store.objects[REF.prefix + "sub/b.txt"]
    problems = verify(store, REF)
    assert [problem.path for problem in problems] == ["a.safetensors", "config.json", "sub/b.txt"]
    assert "SHA-256" in problems[0].what
    assert problems[1] == Problem("config.json", "3 bytes, the manifest says 2")
    assert str(problems[2]) == "sub/b.txt: missing"


def test_lists_and_newest(store: FakeStore, folder: Path) -> None:
    for version, format, at in [("v2", "safetensors", 3.0), ("v10", "safetensors", 2.0), ("v1", "gguf", 9.0)]:
        ref = VersionRef(model="tiny", version=version, format=format)
        publish(store, ref, folder, clock=FakeClock(at))
    publish(store, VersionRef(model="tiny-2", version="v9"), folder)
    store.put_bytes("zen/tiny/adapters/mine/v1/manifest.json", b"{}")
    store.put_bytes("zen/other/v1/safetensors/config.json", b"{}")
    assert list_models(store) == ["tiny", "tiny-2"]
    assert [manifest.ref.version for manifest in list_versions(store, "tiny")] == ["v10", "v2", "v1"]
    assert list_versions(store, "tin") == []
    assert newest(store, "tiny").ref.version == "v2"
    assert newest(store, "tiny", "gguf").ref.version == "v1"
    with pytest.raises(NotFound, match="It has versions in: gguf, safetensors"):
        newest(store, "tiny", "awq-int4")
    with pytest.raises(NotFound, match="zenray models pull other"):
        newest(store, "other")
    with pytest.raises(NotFound, match="Did you mean 'v10/safetensors'"):
        read_manifest(store, VersionRef(model="tiny", version="v11"))


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"path": "../../../etc/passwd", "size_bytes": 1, "sha256": "0" * 64}]},
        {"files": [{"path": "/etc/passwd", "size_bytes": 1, "sha256": "0" * 64}]},
        {"files": [{"path": ".zenray-verified.json", "size_bytes": 1, "sha256": "0" * 64}]},
        {"files": [{"path": "manifest.json", "size_bytes": 1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size_bytes": 1, "sha256": "0" * 64}] * 2},
        {"files": []},
        {"files": [{"path": "a", "size_bytes": -1, "sha256": "0" * 64}]},
        {"ref": {"model": "tiny", "version": "v2", "format": "safetensors"}},
        {"created_at": "yesterday"},
        {"unknown": 1},
    ],
)
def test_a_manifest_that_cannot_be_trusted_is_refused(store: FakeStore, folder: Path, change: dict) -> None:  # type: ignore[type-arg]
    publish(store, REF, folder)
    manifest = json.loads(store.objects[REF.manifest_key]) | change
    store.objects[REF.manifest_key] = json.dumps(manifest).encode()
    with pytest.raises(CorruptData, match=r"tiny/v1/safetensors/manifest\.json"):
        read_manifest(store, REF)


def test_a_broken_claim_says_what_to_do(store: FakeStore, folder: Path) -> None:
    store.put_bytes(REF.prefix + CLAIM_NAME, b"{")
    with pytest.raises(CorruptData, match="discard"):
        publish(store, REF, folder)


def test_progress_adds_up(store: FakeStore, folder: Path) -> None:
    told: list[tuple[str, int, int]] = []
    publish(store, REF, folder, progress=lambda *step: told.append(step))
    verify(store, REF, progress=lambda *step: told.append(step))
    last = {phase: (done, total) for phase, done, total in told}
    assert last == {"hash": (1003, 1003), "upload": (1003, 1003), "verify": (1003, 1003)}
