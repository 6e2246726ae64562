"""Pulling models into the store. The import itself is stood in for here; test_pull.py runs the real one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from zenray.control.registry import service
from zenray.control.registry.conversion import ConversionReport
from zenray.control.registry.service import find, pull, show, verify, versions
from zenray.spec.errors import Conflict, InvalidDocument, InvalidValue, NotFound, StorageUnavailable
from zenray.spec.versions import VersionRef
from zenray.storage.fake import FakeStore

REPORT = ConversionReport(
    architecture="LlamaForCausalLM",
    model_type="llama",
    dtype="bfloat16",
    parameters=7,
    tensors=1,
    notes=("a note",),
    template_overhead_tokens=30,
)


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"weights")
    (path / "README.md").write_text("no part of the model")
    return path


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the import: notes what it was asked, and writes a folder that depends on source and dtype."""
    seen: list[Path] = []

    def convert(source: Path, target: Path, *, dtype: str, format: str, progress: object = None) -> ConversionReport:
        seen.append(source)
        target.mkdir()
        weights = (source / "model.safetensors").read_bytes()
        (target / "model.safetensors").write_bytes(hashlib.sha256(weights + f"{dtype}{format}".encode()).digest())
        return REPORT

    monkeypatch.setattr(service, "convert", convert)
    return seen


def test_a_pull_publishes_and_the_next_does_nothing(
    store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path
) -> None:
    first = pull(store, "mine", str(checkpoint), cache_dir=tmp_path / "cache")
    assert first.created
    assert first.notes == ("a note",)
    manifest = first.manifest
    assert manifest.ref.model == "mine"
    assert manifest.ref.version.startswith("v-")
    assert len(manifest.ref.version) == 14
    assert manifest.parents.source == "folder:my-model"
    assert manifest.metadata["architecture"] == "LlamaForCausalLM"
    assert manifest.metadata["parameters"] == "7"
    assert manifest.metadata["template_overhead_tokens"] == "30"

    (checkpoint / "README.md").write_text("changed")
    second = pull(store, "mine", str(checkpoint), cache_dir=tmp_path / "cache")
    assert (second.created, second.manifest) == (False, manifest)
    assert len(conversions) == 1
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


def test_other_content_or_another_dtype_is_another_version(
    store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path
) -> None:
    names = [pull(store, "mine", str(checkpoint), cache_dir=tmp_path).manifest.ref.version]
    names.append(pull(store, "mine", str(checkpoint), cache_dir=tmp_path, dtype="float32").manifest.ref.version)
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    names.append(pull(store, "mine", str(checkpoint), cache_dir=tmp_path).manifest.ref.version)
    assert len(set(names)) == 3
    assert {manifest.ref.version for manifest in versions(store, "mine")} == set(names)


def test_a_given_version_is_kept_and_never_changed(
    store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path
) -> None:
    first = pull(store, "mine", str(checkpoint), version="2026-11", cache_dir=tmp_path)
    assert first.manifest.ref == VersionRef(model="mine", version="2026-11")
    assert not pull(store, "mine", str(checkpoint), version="2026-11", cache_dir=tmp_path).created
    with pytest.raises(Conflict, match="from folder:my-model"):
        pull(store, "mine", str(checkpoint), version="2026-11", dtype="float16", cache_dir=tmp_path)
    (checkpoint / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(Conflict, match="choose another version name"):
        pull(store, "mine", str(checkpoint), version="2026-11", cache_dir=tmp_path)
    assert len(conversions) == 1


def test_a_broken_publication_is_finished_by_the_next_pull(
    store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path
) -> None:
    store.fail("put_if_absent", StorageUnavailable("away"), key_part="manifest.json")
    with pytest.raises(StorageUnavailable):
        pull(store, "mine", str(checkpoint), cache_dir=tmp_path)
    assert versions(store, "mine") == []
    uploads = store.calls["put_file"]
    assert pull(store, "mine", str(checkpoint), cache_dir=tmp_path).created
    assert store.calls["put_file"] == uploads
    assert verify(store, "mine") == []


def test_a_refused_import_leaves_nothing(
    store: FakeStore, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path, **rest: object) -> ConversionReport:
        target.mkdir()
        (target / "half").write_bytes(b"half")
        raise InvalidDocument("2 tensors are missing")

    monkeypatch.setattr(service, "convert", refuse)
    with pytest.raises(InvalidDocument, match="2 tensors are missing"):
        pull(store, "mine", str(checkpoint), cache_dir=tmp_path / "cache")
    assert store.objects == {}
    assert list((tmp_path / "cache" / "staging").iterdir()) == []


@pytest.mark.parametrize(
    ("model", "version", "dtype", "match"),
    [
        ("Mine", None, "bfloat16", "'Mine' cannot be a model name"),
        ("mine", "adapters", "bfloat16", "reserved"),
        ("mine", "a/b", "bfloat16", "cannot be a version name"),
        ("mine", None, "int3", "Known: bfloat16, float16, float32"),
    ],
)
def test_bad_names_are_refused_before_anything_is_fetched(
    store: FakeStore, tmp_path: Path, model: str, version: str | None, dtype: str, match: str
) -> None:
    with pytest.raises(InvalidValue, match=match):
        pull(store, model, str(tmp_path / "absent"), version=version, dtype=dtype, cache_dir=tmp_path)
    assert store.calls.total() == 0


def test_pickles_are_refused_without_a_process(
    store: FakeStore, tmp_path: Path, conversions: list[Path], checkpoint: Path
) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(InvalidDocument, match="is a pickle"):
        pull(store, "mine", str(checkpoint), cache_dir=tmp_path)
    assert conversions == []


def test_find_show_and_verify(store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path) -> None:
    old = pull(store, "mine", str(checkpoint), version="v1", cache_dir=tmp_path).manifest
    new = pull(store, "mine", str(checkpoint), version="v2", dtype="float32", cache_dir=tmp_path).manifest
    assert find(store, "mine") == new.ref
    assert show(store, "mine@v1") == show(store, "mine@v1/safetensors") == old
    store.objects[old.ref.prefix + "model.safetensors"] = b"x" * 32
    assert [problem.path for problem in verify(store, "mine@v1")] == ["model.safetensors"]
    assert verify(store, "mine") == []
    with pytest.raises(NotFound, match="Did you mean 'v1/safetensors'"):
        show(store, "mine@v11")
    with pytest.raises(NotFound, match="zenray models pull other"):
        show(store, "other")
    for bad in ("mine@", "mine@v1/", "mine@v1/a/b", "Mine", "mine@v1@v2"):
        with pytest.raises(InvalidValue):
            show(store, bad)


def test_staging_of_a_process_that_died_is_swept(
    store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path
) -> None:
    dead = tmp_path / "staging" / "dead"
    dead.mkdir(parents=True)
    (dead / "half.safetensors").write_bytes(b"half")
    os.utime(dead, (1, 1))
    pull(store, "mine", str(checkpoint), cache_dir=tmp_path)
    assert not dead.exists()


def test_the_version_name_is_stable(
    store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path
) -> None:
    """The name stands in people's deployment files: a change of how it is made must be meant."""
    manifest = pull(store, "mine", str(checkpoint), cache_dir=tmp_path).manifest
    files = {
        name: hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
        for name in ("config.json", "model.safetensors")
    }
    listing = "".join(f"{digest}  {name}\n" for name, digest in files.items())
    content = hashlib.sha256(listing.encode()).hexdigest()
    assert manifest.ref.version == "v-" + hashlib.sha256(f"1:bfloat16:{content}".encode()).hexdigest()[:12]
    assert json.loads(store.objects[manifest.ref.manifest_key])["metadata"]["source_sha256"] == content


def test_quantized_weights_are_a_further_format_of_a_version(
    store: FakeStore, checkpoint: Path, conversions: list[Path], tmp_path: Path
) -> None:
    cache_dir = tmp_path / "cache"
    plain = pull(store, "mine", str(checkpoint), cache_dir=cache_dir, version="v1").manifest
    packed = pull(store, "mine", str(checkpoint), cache_dir=cache_dir, version="v1", format="awq-int4")
    assert packed.created and packed.manifest.ref == plain.ref.model_copy(update={"format": "awq-int4"})
    assert show(store, "mine@v1").ref == plain.ref and show(store, "mine@v1/awq-int4") == packed.manifest
    again = pull(store, "mine", str(checkpoint), cache_dir=cache_dir, version="v1", format="awq-int4")
    assert not again.created and len(conversions) == 2
    names = {pull(store, "mine", str(checkpoint), cache_dir=cache_dir, format=f).manifest.ref.version for f in FORMATS}
    assert len(names) == len(FORMATS)  # each is named for what it became
    with pytest.raises(InvalidValue, match="awq-int4"):
        pull(store, "mine", str(checkpoint), cache_dir=cache_dir, format="awq-int3")


FORMATS = (service.FORMAT, *service.QUANTIZED_FORMATS)
