"""Checkpoints on their way to the store, with Ray Train's part of it played by one thread, as Ray has one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs
import pytest
import ray.train

from zenray.spec.errors import StorageUnavailable
from zenray.spec.training import Checkpoints
from zenray.training.uploads import RayRecorder


class Store:
    """A local file system whose writes wait while it is shut, and fail where it is broken."""

    def __init__(self) -> None:
        self.is_open, self.is_broken = threading.Event(), False
        self.is_open.set()
        self.real = pyarrow.fs.LocalFileSystem()

    def create_dir(self, path: str, recursive: bool) -> None:
        self.is_open.wait()
        if self.is_broken:
            raise OSError("gone")
        self.real.create_dir(path, recursive=recursive)

    def open_output_stream(self, path: str):
        return self.real.open_output_stream(path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """What `ray.train` would do with reports: one upload after the other, in the background."""
    store = Store()
    place = SimpleNamespace(storage_filesystem=store, experiment_fs_path=str(tmp_path / "store"))
    context = SimpleNamespace(get_storage=lambda: place)
    uploads = ThreadPoolExecutor(1)

    def report(metrics, checkpoint, checkpoint_dir_name, checkpoint_upload_fn, **_) -> None:
        uploads.submit(checkpoint_upload_fn, checkpoint, checkpoint_dir_name)

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)

    class OfStore(ray.train.Checkpoint):
        """Read from where the store keeps it."""

        def __init__(self, path: str, filesystem: object = None) -> None:
            super().__init__(path, pyarrow.fs.LocalFileSystem())

    monkeypatch.setattr("zenray.training.uploads.RayCheckpoint", OfStore)
    yield store
    store.is_open.set()
    uploads.shutdown()


def recorder(tmp_path: Path, **policy: float) -> RayRecorder:
    return RayRecorder(tmp_path / "scratch", Checkpoints(**policy))


def writing(text: str):
    return lambda folder: (folder / "state").write_text(text)


def test_training_goes_on_while_checkpoints_wait_and_waits_when_there_are_too_many(store, tmp_path) -> None:
    found = recorder(tmp_path, most_waiting=2)
    store.is_open.clear()
    found.record("step-1", {}, writing("one"))
    found.record("step-2", {}, writing("two"))
    third = threading.Thread(target=found.record, args=("step-3", {}, writing("three")))
    third.start()
    third.join(0.05)
    assert third.is_alive() and not (tmp_path / "store").exists()
    store.is_open.set()
    third.join()
    found.settle()
    assert {path.parent.name: path.read_text() for path in (tmp_path / "store").rglob("state")} == {
        "step-1": "one",
        "step-2": "two",
        "step-3": "three",
    }
    assert not list((tmp_path / "scratch").iterdir())


def test_the_newest_checkpoint_is_the_one_recorded_last_once_it_is_whole(store, tmp_path) -> None:
    found = recorder(tmp_path)
    assert found.latest() is None
    store.is_open.clear()
    found.record("step-1", {}, writing("one"))
    found.record("step-2", {}, writing("two"))
    threading.Timer(0.03, store.is_open.set).start()
    newest = found.latest()
    assert newest is not None and newest.read_bytes("state") == b"two"


@pytest.mark.parametrize("fault", ["store", "disk"])
def test_what_went_wrong_in_the_background_is_told_when_it_matters(store, tmp_path, fault) -> None:
    found = recorder(tmp_path, upload_patience_s=0)
    found.record("step-1", {}, writing("one"))
    found.settle()

    def full(folder: Path) -> None:
        raise StorageUnavailable("The disk is full")

    store.is_broken = fault == "store"
    found.record("step-2", {}, writing("two") if fault == "store" else full)
    with pytest.raises(StorageUnavailable, match="could not be written" if fault == "store" else "disk is full"):
        found.settle()
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["step-1"]
    assert not list((tmp_path / "scratch").iterdir())


def test_what_a_worker_of_this_place_left_behind_is_swept(tmp_path) -> None:
    (tmp_path / "scratch" / "step-9-left").mkdir(parents=True)
    recorder(tmp_path)
    assert not list((tmp_path / "scratch").iterdir())
