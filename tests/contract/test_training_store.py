"""Checkpoints in a real S3 server: the file system that Ray Train uses, and a store that is away for a while."""

from __future__ import annotations

import pickle
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.fs
import pytest

from tests.cluster.ray_session import new_home
from tests.contract.seaweedfs import ACCESS_KEY, SECRET_KEY, S3Server, seaweedfs
from tests.contract.training_platform import TWO_WORKERS, Run, finished, same_result
from zenray.spec.platform import StorageSettings
from zenray.storage.arrow import arrow_filesystem
from zenray.storage.base import ObjectStore
from zenray.storage.opening import open_store
from zenray.training.uploads import upload

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def s3_server() -> Iterator[S3Server]:
    with seaweedfs() as server:
        yield server


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[pyarrow.fs.FileSystem, str]:
    if request.param == "folder":
        return arrow_filesystem(f"file:{tmp_path / 'store'}")
    server: S3Server = request.getfixturevalue("s3_server")
    filesystem, path = arrow_filesystem(f"s3://{server.bucket}/{tmp_path.name}", server.endpoint_url)
    return pickle.loads(pickle.dumps(filesystem)), path  # noqa: S301


def test_a_checkpoint_is_sent_found_read_and_deleted(place, tmp_path: Path) -> None:
    """With the calls that Ray Train makes: merged from two workers, listed, downloaded, deleted as a folder."""
    filesystem, path = place
    parts = {"one": {".metadata": b"m", "__0_0.distcp": b"0" * (24 << 20)}, "two": {"__1_0.distcp": b"1" * 1000}}
    for part, files in parts.items():
        folder = tmp_path / part
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        upload(folder, filesystem, f"{path}/run/step-1", patience_s=30)
        upload(folder, filesystem, f"{path}/run/step-2", patience_s=30)
    assert filesystem.get_file_info(f"{path}/run/step-1").type == pyarrow.fs.FileType.Directory
    assert filesystem.get_file_info(f"{path}/run/step-3").type == pyarrow.fs.FileType.NotFound
    selector = pyarrow.fs.FileSelector(f"{path}/run", recursive=False)
    assert sorted(info.base_name for info in filesystem.get_file_info(selector)) == ["step-1", "step-2"]
    (tmp_path / "down").mkdir()
    pyarrow.fs.copy_files(f"{path}/run/step-1", str(tmp_path / "down"), source_filesystem=filesystem)
    expected = {name: content for files in parts.values() for name, content in files.items()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "down").iterdir()} == expected
    filesystem.delete_dir(f"{path}/run/step-1")
    selector = pyarrow.fs.FileSelector(f"{path}/run", recursive=True)
    files = [info.path for info in filesystem.get_file_info(selector) if info.is_file]
    assert sorted(files) == [f"{path}/run/step-2/{name}" for name in sorted(expected)]
    with filesystem.open_output_stream(f"{path}/run/snapshot.json") as file:
        file.write(b"{}")
    with filesystem.open_input_stream(f"{path}/run/snapshot.json") as file:
        assert file.read() == b"{}"


@dataclass
class Door:
    """A way to a server that can be shut: connections are cut, and new ones refused. On loopback."""

    port_behind: int
    listener: socket.socket = field(init=False)
    port: int = field(init=False, default=0)
    open_ones: set[socket.socket] = field(init=False, default_factory=set)

    def open(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._serve, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for each in list(self.open_ones):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self.open_ones.clear()

    def _serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.port_behind))
                self.open_ones |= {client, server}
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


class RunInS3(Run):
    """Its store is an S3 server, which the run reaches at another address than the test does."""

    def __init__(self, folder: Path, environment: dict[str, str], server: S3Server, endpoint_url: str) -> None:
        self.uri, self.endpoint_url, self.server = f"s3://{server.bucket}/{folder.name}", endpoint_url, server
        super().__init__(folder, environment)

    def open_store(self) -> ObjectStore:
        return open_store(StorageSettings(uri=self.uri, endpoint_url=self.server.endpoint_url))

    def store_options(self) -> list[str]:
        return ["--store", self.uri, "--endpoint-url", self.endpoint_url]


@pytest.mark.nightly
def test_training_goes_on_while_the_store_is_away(s3_server: S3Server, tmp_path: Path) -> None:
    """Two checkpoints wait on disk until it is back; the result is that of a run that never missed it."""
    job = {**TWO_WORKERS, "steps": 60, "checkpoints": {"every_steps": 8, "most_waiting": 9, "keep": 2}}
    home = new_home()
    door = Door(int(s3_server.endpoint_url.rpartition(":")[2]))
    door.open()
    run = RunInS3(tmp_path / "away", {"RAY_TMPDIR": str(home)}, s3_server, f"http://127.0.0.1:{door.port}")
    try:
        driver = run.start(**job)
        run.await_event(driver, "checkpoint", 8)
        door.shut()
        run.await_event(driver, "checkpoint", 32)
        door.open()
        finished(driver)
        left = [info.key for info in run.store.list("training/") if "/step-" in info.key]
        assert left == [], "checkpoints of a run whose version is published"
        assert not any(event["event"] == "resumed" for event in run.events)
        unbroken = Run(tmp_path / "unbroken", {"RAY_TMPDIR": str(home)})
        unbroken.finish(**job)
        same_result(run, unbroken)
    finally:
        door.shut()
        shutil.rmtree(home, ignore_errors=True)
