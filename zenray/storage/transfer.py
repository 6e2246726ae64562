"""Moving bytes with checksums: in blocks, in ranges, and several at once."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, Future, wait
from pathlib import Path
from typing import TypeVar

from zenray.spec.errors import InvalidRequest
from zenray.storage.base import ObjectStore, OnBytes

RANGE_BYTES = 8 << 20
_READ_BYTES = 4 << 20
_AHEAD = 3
T = TypeVar("T")
R = TypeVar("R")


def hash_file(path: Path, on_bytes: OnBytes | None = None) -> str:
    """The SHA-256 of a file, as lower-case hex. OSError as the system gives it."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(_READ_BYTES)
        view = memoryview(buffer)
        while count := file.readinto(buffer):
            digest.update(view[:count])
            if on_bytes:
                on_bytes(count)
    return digest.hexdigest()


def read_expected(path: Path, sha256: str, block_bytes: int) -> Iterator[bytes]:
    """A file's bytes in blocks. Raises InvalidRequest after the last one when their SHA-256 was not `sha256`.

    So whoever makes the bytes visible only after the last block never shows a file that changed under its reader.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(block_bytes):
            digest.update(block)
            yield block
    if digest.hexdigest() != sha256:
        raise file_changed(path, digest.hexdigest(), sha256)


def file_changed(path: Path, found: str, expected: str) -> InvalidRequest:
    """The error of a store that was given another file than the one that was hashed."""
    return InvalidRequest(
        f"{path} changed while it was being stored: its SHA-256 is {found}, it was {expected}.",
        hint="It was not stored. Start again once nobody writes to it.",
    )


def hash_object(
    store: ObjectStore, key: str, size_bytes: int, executor: Executor, on_bytes: OnBytes | None = None
) -> str:
    """The SHA-256 of the first `size_bytes` of an object, read from the store. NotFound, StorageUnavailable."""
    digest = hashlib.sha256()
    for chunk in _read_ahead(store, key, size_bytes, executor):
        digest.update(chunk)
        if on_bytes:
            on_bytes(len(chunk))
    return digest.hexdigest()


def _read_ahead(store: ObjectStore, key: str, size_bytes: int, executor: Executor) -> Iterator[bytes]:
    waiting: deque[Future[bytes]] = deque()
    for start in range(0, size_bytes, RANGE_BYTES):
        waiting.append(executor.submit(store.get_range, key, start, min(RANGE_BYTES, size_bytes - start)))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def run_all(executor: Executor, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Results in the order of the items. After an error nothing more is begun; it is raised once nothing runs."""
    futures = [executor.submit(function, item) for item in items]
    try:
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()
        wait(futures)
    for future in futures:
        if not future.cancelled() and (error := future.exception()) is not None:
            raise error
    return [future.result() for future in futures]
