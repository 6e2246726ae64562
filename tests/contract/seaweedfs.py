"""A real S3 server for tests: SeaweedFS, one process, on loopback, gone with its data at the end."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY = "test-access-key"
SECRET_KEY = "test-secret-key"
_READY_S = 60


@dataclass(frozen=True)
class S3Server:
    endpoint_url: str
    bucket: str


@contextmanager
def seaweedfs(bucket: str = "zenray-test") -> Iterator[S3Server]:
    """A running S3 server that has `bucket`; ACCESS_KEY and SECRET_KEY may do everything. Ready in about 2 s."""
    folder = Path(tempfile.mkdtemp(prefix="weed-", dir="/tmp"))  # short: it holds Unix sockets
    names = ["master", "volume", "filer", "s3", "admin", "webdav"]
    ports = _free_ports(2 * len(names))
    arguments = []
    for name, port, grpc_port in zip(names, ports[::2], ports[1::2], strict=True):
        arguments.append(f"-{name}.port={port}")
        if name != "webdav":
            arguments.append(f"-{name}.port.grpc={grpc_port}")
    s3_port = ports[2 * names.index("s3")]
    command = [
        str(Path(sys.executable).parent / "weed"),
        "mini",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *arguments,
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        f"-s3.localSocket={folder}/s3.sock",
        f"-filer.localSocket={folder}/filer.sock",
        "-master.telemetry=false",
    ]
    environment = os.environ | {
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "S3_BUCKET": bucket,
        "HOME": str(folder),
    }
    log = folder / "weed.log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, s3_port, log)
        yield S3Server(f"http://127.0.0.1:{s3_port}", bucket)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    """All held open while they are chosen, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_ready(process: subprocess.Popen[bytes], s3_port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{s3_port}/healthz", timeout=2)
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        else:
            if "All enabled components are running" in log.read_text(errors="replace"):  # the bucket is made last
                return
        time.sleep(0.05)
    raise RuntimeError(f"SeaweedFS did not become ready (exit code {process.poll()}):\n{log.read_text()[-3000:]}")
