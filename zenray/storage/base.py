"""The seam to object storage: named, whole blobs of bytes in a local directory, in S3, or in memory.

Rules that every implementation keeps (tests/contract/test_object_store.py):

- A key is a relative path of plain segments (`check_key`); InvalidValue otherwise, before anything is touched.
- Whole or absent: a reader never sees part of an object, whoever dies at whatever moment.
- What was written is seen by every later read and list.
- All methods block; all may be called from several threads at once.
- A store that cannot be reached, is full or refuses raises StorageUnavailable after its own retries.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from zenray.spec.errors import InvalidValue, NotFound

RESERVED_SEGMENT_PREFIX = ".zenray-"  # a store's or a cache's own files; never part of a key
_MAX_KEY_BYTES = 1024  # S3's limit
_CONTROL_OR_BACKSLASH = re.compile(r"[\x00-\x1f\x7f\\]")

OnBytes = Callable[[int], None]
"""Told how many more bytes were moved; may be told a negative number when an attempt is repeated."""


class Progress(Protocol):
    """Told where a long piece of work stands; called from several threads, so it is quick and safe to be."""

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None: ...


@dataclass(frozen=True)
class ObjectInfo:
    """One object, without its bytes. `sha256` is what `put_file` checked; None where the store keeps no such note."""

    key: str
    size_bytes: int
    sha256: str | None = None


class ObjectStore(ABC):
    """Named, whole blobs of bytes. See the module's rules."""

    @property
    @abstractmethod
    def uri(self) -> str:
        """Where this is, for messages: `file:/srv/store`, `s3://bucket/prefix`."""

    @abstractmethod
    def put_bytes(self, key: str, data: bytes, *, immutable: bool = False) -> None:
        """Write an object, replacing what was there. Idempotent. `immutable` tells caches that it never changes."""

    @abstractmethod
    def put_file(
        self, key: str, path: Path, *, sha256: str, immutable: bool = False, on_bytes: OnBytes | None = None
    ) -> None:
        """Write an object from a file, replacing what was there. Idempotent.

        Raises InvalidRequest, and writes nothing, when the SHA-256 of the bytes that were sent is not `sha256`: the
        file changed. The digest is kept beside the object where the store can.
        """

    @abstractmethod
    def put_if_absent(self, key: str, data: bytes, *, immutable: bool = False) -> bool:
        """Write an object unless one has that key; whether it was written. Of several at once exactly one writes.

        After a lost answer the store may say False to the very caller whose write landed: who must know compares
        the bytes that are there.
        """

    @abstractmethod
    def get_bytes(self, key: str) -> bytes:
        """A whole object, meant for small ones. NotFound."""

    @abstractmethod
    def get_range(self, key: str, start_bytes: int, length_bytes: int) -> bytes:
        """The bytes of the range that exist: fewer at the object's end, none past it. NotFound."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """What is known of an object without reading it; None when there is none."""

    @abstractmethod
    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix` (plain text, "" for all), in no particular order, without sha256."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object. Idempotent: none there is well."""


def check_key(key: str) -> str:
    """`key` if it can name an object; InvalidValue with the reason otherwise."""
    reason = None
    if not key:
        reason = "it is empty"
    elif _CONTROL_OR_BACKSLASH.search(key):
        reason = "it has a control character or a backslash"
    elif len(key.encode("utf-8", "surrogatepass")) > _MAX_KEY_BYTES:
        reason = f"it is longer than {_MAX_KEY_BYTES} bytes"
    else:
        for segment in key.split("/"):
            if segment in ("", ".", ".."):
                reason = f"it has the path segment {segment!r}"
            elif segment.startswith(RESERVED_SEGMENT_PREFIX):
                reason = f"the segment {segment!r} is reserved"
    if reason:
        raise InvalidValue(f"{key[:200]!r} cannot be an object's key: {reason}.")
    return key


def check_range(start_bytes: int, length_bytes: int) -> None:
    """InvalidValue unless both are at least 0."""
    if start_bytes < 0 or length_bytes < 0:
        raise InvalidValue(f"A byte range needs numbers of at least 0, got {start_bytes} and {length_bytes}.")


def missing(store: ObjectStore, key: str) -> NotFound:
    """The error of every implementation for an object that is not there."""
    return NotFound(f"{key!r} is not in {store.uri}.")
