"""The real import behind a pull: in a process of its own, refused with its words, and killed at any moment."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from zenray.control.registry.service import pull, verify, versions
from zenray.spec.errors import InvalidDocument
from zenray.storage.local import LocalStore

pytestmark = pytest.mark.contract

# Pulls, and kills itself once `phase` was told `times` times and `delay_s` have passed.
_PROGRAM = """
import os, signal, sys, threading, time
from pathlib import Path
from zenray.control.registry.service import pull
from zenray.storage.local import LocalStore

source, store, cache_dir, phase, delay_s = *map(Path, sys.argv[1:4]), sys.argv[4], float(sys.argv[5])

def kill():
    time.sleep(delay_s)
    os.kill(os.getpid(), signal.SIGKILL)

def progress(name, done_bytes, total_bytes):
    if name == phase:
        kill() if delay_s == 0 else threading.Thread(target=kill, daemon=True).start()

print(pull(LocalStore(store), "mine", str(source), cache_dir=cache_dir, progress=progress).manifest.ref)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.model.checkpoints.conftest import make_tokenizer, save_model

    return save_model(tmp_path_factory.mktemp("checkpoint") / "tiny", make_tokenizer())


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", _PROGRAM, *map(str, arguments)], capture_output=True, text=True, check=False
    )


def imports_of(cache_dir: Path) -> list[psutil.Process]:
    """Processes that import into this cache folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                any(str(cache_dir) in argument for argument in process.cmdline())
                and process.pid != psutil.Process().pid
            ):
                found.append(process)
        except psutil.Error:
            pass
    return found


def test_a_folder_becomes_a_version_without_torch_here(checkpoint: Path, tmp_path: Path) -> None:
    done = run(checkpoint, tmp_path / "store", tmp_path / "cache", "never", 0)
    assert done.returncode == 0, done.stderr
    store = LocalStore(tmp_path / "store")
    (manifest,) = versions(store, "mine")
    assert str(manifest.ref) == done.stdout.strip()
    names = {entry.path for entry in manifest.files}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors"}
    assert manifest.metadata["architecture"] == "LlamaForCausalLM"
    assert manifest.metadata["dtype"] == "bfloat16"
    assert not pull(store, "mine", str(checkpoint), cache_dir=tmp_path / "cache").created


def test_the_words_of_a_refusal_come_through(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    store = LocalStore(tmp_path / "store")
    with pytest.raises(InvalidDocument, match=r"model\.safetensors is broken or cut short"):
        pull(store, "mine", str(broken), cache_dir=tmp_path / "cache")
    assert list(store.list("")) == []


@pytest.mark.parametrize(("phase", "delay_s"), [("convert", 0.05), ("hash", 0), ("upload", 0)])
def test_killed_at_any_moment_there_is_no_version_and_no_process(
    checkpoint: Path, tmp_path: Path, phase: str, delay_s: float
) -> None:
    cache_dir = tmp_path / "cache"
    done = run(checkpoint, tmp_path / "store", cache_dir, phase, delay_s)
    assert done.returncode == -9, done.stderr
    store = LocalStore(tmp_path / "store")
    assert versions(store, "mine") == []
    deadline = time.monotonic() + 60
    while imports_of(cache_dir) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert imports_of(cache_dir) == []
    if phase == "upload":
        assert list(store.list("zen/mine/")) != []
        assert pull(store, "mine", str(checkpoint), cache_dir=cache_dir).created
        assert verify(store, "mine") == []
