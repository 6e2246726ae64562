"""Which version a job starts from, and which it makes."""

from __future__ import annotations

from pydantic import Field, field_validator

from zenray.spec.documents import Document
from zenray.spec.versions import RESERVED_VERSIONS, check_name


class BaseVersion(Document):
    """A published version to start from."""

    model: str
    version: str | None = Field(None, description="None: the newest published one.")
    format: str = "safetensors"

    @field_validator("model", "version", "format")
    @classmethod
    def _legal(cls, value: str | None) -> str | None:
        return value if value is None else check_name("model, version or format", value)


class NewVersion(Document):
    """The version that a run publishes."""

    model: str
    version: str

    @field_validator("model", "version")
    @classmethod
    def _legal(cls, value: str) -> str:
        if value in RESERVED_VERSIONS:
            raise ValueError(f"{value!r} is a reserved version name")
        return check_name("model or version", value)
