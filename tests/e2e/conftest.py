"""One real platform for the session: Ray, control, gateway, SmolLM2 on vLLM, and a scripted engine beside it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.platform import TestPlatform, wait_until


@pytest.fixture(scope="session")
def platform() -> Iterator[TestPlatform]:
    """Up once (about a minute and a half), down once; after that no process of it may be left."""
    root = Path(tempfile.mkdtemp(prefix="zr-", dir="/tmp"))  # short: Ray's sockets have a limit of 107 bytes
    running = TestPlatform(root)
    try:
        running.prepare()
        running.zenray("up", "-f", str(running.file), "--detach")
        yield running
    finally:
        running.zenray("down", check=False)
        wait_until(lambda: not running.processes(), f"no process is left: {running.processes()}", 20)
        shutil.rmtree(root, ignore_errors=True)
