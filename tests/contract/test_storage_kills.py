"""A process killed (−9) at any step of a publication or a download leaves nothing that looks whole and is not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zenray.spec.versions import Manifest, VersionRef
from zenray.storage.cache import fetch
from zenray.storage.local import LocalStore
from zenray.storage.versions import find_manifest, publish, verify

pytestmark = pytest.mark.contract
REF = VersionRef(model="tiny", version="v1")
STEP = 5

# Runs one action, and kills itself when the file system is changed for the n-th time.
_PROGRAM = """
import os, signal, sys
from pathlib import Path
from zenray.spec.versions import VersionRef
from zenray.storage import cache, versions
from zenray.storage.cache import fetch
from zenray.storage.local import LocalStore

action, limit, store, folder = sys.argv[1], int(sys.argv[2]), LocalStore(Path(sys.argv[3])), Path(sys.argv[4])
ref = VersionRef(model="tiny", version="v1")
cache.RANGE_BYTES = 100
changes = 0

def count(event, arguments):
    global changes
    if event in ("open", "os.rename", "os.link", "os.mkdir", "os.truncate", "os.remove"):
        changes += 1
        if changes == limit:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
versions.publish(store, ref, folder) if action == "publish" else cache.fetch(store, ref, folder)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    (path / "sub").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "sub" / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    return path


def run(action: str, limit: int, store: Path, folder: Path) -> bool:
    """Whether it ran to its end; otherwise it was killed."""
    command = [sys.executable, "-c", _PROGRAM, action, str(limit), str(store), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in (0, -9), done.stderr
    return done.returncode == 0


def test_publish(tmp_path: Path, source: Path) -> None:
    kills_before_it_existed = 0
    for limit in range(1, 1000, STEP):
        root = tmp_path / f"store-{limit}"
        whole = run("publish", limit, root, source)
        store = LocalStore(root)
        if find_manifest(store, REF) is None:
            assert not whole
            kills_before_it_existed += 1
            publish(store, REF, source)
        assert verify(store, REF) == []
        assert all(info.key.startswith(REF.prefix) for info in store.list(""))
        if whole:
            break
    assert kills_before_it_existed >= 5


def test_fetch(tmp_path: Path, source: Path) -> None:
    store = LocalStore(tmp_path / "store")
    manifest = publish(store, REF, source)
    kills_before_it_existed = 0
    for limit in range(1, 1000, STEP):
        cache_dir = tmp_path / f"cache-{limit}"
        whole = run("fetch", limit, tmp_path / "store", cache_dir)
        folder = cache_dir / "tiny" / "v1" / "safetensors"
        if not folder.exists():
            assert not whole
            kills_before_it_existed += 1
            fetch(store, REF, cache_dir)
        assert Manifest.model_validate_json((folder / "manifest.json").read_bytes()) == manifest
        for entry in manifest.files:
            assert (folder / entry.path).read_bytes() == (source / entry.path).read_bytes()
        assert not list(folder.rglob("*.zenray-part"))
        if whole:
            break
    assert kills_before_it_existed >= 5
