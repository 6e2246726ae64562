"""Names and places of model versions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from zenray.spec.versions import FileEntry, Manifest, Parents, VersionRef, check_name

names = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True)


@given(names, names.filter(lambda v: v != "adapters"), names)
def test_a_version_lies_where_its_name_says(model: str, version: str, format: str) -> None:
    ref = VersionRef(model=model, version=version, format=format)
    assert ref.prefix == f"zen/{model}/{version}/{format}/"
    assert ref.manifest_key == f"{ref.prefix}manifest.json"
    assert str(ref) == f"{model}@{version}/{format}"
    assert VersionRef.model_validate_json(ref.model_dump_json()) == ref


@pytest.mark.parametrize("name", ["", "A", "-a", ".a", "..", "a/b", "a b", "ü", "a" * 64, "a\n"])
def test_names_that_cannot_be(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be a model name"):
        check_name("model", name)
    for part in ("model", "version", "format"):
        with pytest.raises(ValidationError):
            VersionRef.model_validate({"model": "m", "version": "v", "format": "f"} | {part: name})


def test_adapters_is_reserved_as_a_version_only() -> None:
    with pytest.raises(ValidationError, match="'adapters' is a reserved version name"):
        VersionRef(model="m", version="adapters")
    assert VersionRef(model="adapters", version="1").format == "safetensors"


def test_a_manifest_adds_up_and_survives_json() -> None:
    files = tuple(FileEntry(path=f"{i}.bin", size_bytes=i, sha256=f"{i:064x}") for i in range(1, 4))
    manifest = Manifest(
        ref=VersionRef(model="m", version="1"),
        files=files,
        parents=Parents(base_version="b@1/safetensors", data_files=files[:1]),
        created_at=1.5,
        metadata={"licence": "Apache-2.0"},
    )
    assert manifest.size_bytes == 6
    assert Manifest.model_validate_json(manifest.model_dump_json()) == manifest


@pytest.mark.parametrize(
    "bad", [{"size_bytes": -1}, {"sha256": "A" * 64}, {"sha256": "0" * 63}, {"more": 1}, {"sha256": "0" * 64 + "\n"}]
)
def test_a_file_entry_that_cannot_be(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        FileEntry.model_validate({"path": "p", "size_bytes": 1, "sha256": "0" * 64} | bad)


def test_a_manifest_without_files_is_refused() -> None:
    with pytest.raises(ValidationError):
        Manifest(ref=VersionRef(model="m", version="1"), files=(), created_at=0)
