"""The object store in memory, for tests: it counts what is asked, and fails when told to."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from zenray.storage.base import ObjectInfo, ObjectStore, OnBytes, check_key, check_range, missing
from zenray.storage.transfer import read_expected


class FakeStore(ObjectStore):
    """Objects live in `objects`: a test may read, change or break them there. `calls` counts methods by name."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.immutable: set[str] = set()
        self.calls: Counter[str] = Counter()
        self._sha256: dict[str, str] = {}
        self._failures: list[tuple[str, str, Exception]] = []
        self._lock = threading.Lock()

    @property
    def uri(self) -> str:
        return "memory:"

    def fail(self, method: str, error: Exception, *, key_part: str = "", times: int = 1) -> None:
        """Let the next `times` calls of `method` on a key that contains `key_part` raise `error` and do nothing."""
        self._failures += [(method, key_part, error)] * times

    def _enter(self, method: str, key: str) -> None:
        self.calls[method] += 1
        for index, (failing, key_part, error) in enumerate(self._failures):
            if failing == method and key_part in key:
                del self._failures[index]
                raise error

    def _write(self, key: str, data: bytes, *, sha256: str | None, immutable: bool) -> None:
        self.objects[key] = data
        self._sha256.pop(key, None)
        if sha256:
            self._sha256[key] = sha256
        (self.immutable.add if immutable else self.immutable.discard)(key)

    def put_bytes(self, key: str, data: bytes, *, immutable: bool = False) -> None:
        check_key(key)
        with self._lock:
            self._enter("put_bytes", key)
            self._write(key, bytes(data), sha256=None, immutable=immutable)

    def put_file(
        self, key: str, path: Path, *, sha256: str, immutable: bool = False, on_bytes: OnBytes | None = None
    ) -> None:
        check_key(key)
        data = b"".join(read_expected(path, sha256, 1 << 20))
        with self._lock:
            self._enter("put_file", key)
            self._write(key, data, sha256=sha256, immutable=immutable)
        if on_bytes:
            on_bytes(len(data))

    def put_if_absent(self, key: str, data: bytes, *, immutable: bool = False) -> bool:
        check_key(key)
        with self._lock:
            self._enter("put_if_absent", key)
            if key in self.objects:
                return False
            self._write(key, bytes(data), sha256=None, immutable=immutable)
            return True

    def get_bytes(self, key: str) -> bytes:
        check_key(key)
        with self._lock:
            self._enter("get_bytes", key)
            if key not in self.objects:
                raise missing(self, key)
            return self.objects[key]

    def get_range(self, key: str, start_bytes: int, length_bytes: int) -> bytes:
        check_key(key)
        check_range(start_bytes, length_bytes)
        with self._lock:
            self._enter("get_range", key)
            if key not in self.objects:
                raise missing(self, key)
            return self.objects[key][start_bytes : start_bytes + length_bytes]

    def head(self, key: str) -> ObjectInfo | None:
        check_key(key)
        with self._lock:
            self._enter("head", key)
            if key not in self.objects:
                return None
            return ObjectInfo(key, len(self.objects[key]), self._sha256.get(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._lock:
            self._enter("list", prefix)
            found = [ObjectInfo(key, len(data)) for key, data in self.objects.items() if key.startswith(prefix)]
        yield from found

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._enter("delete", key)
            self.objects.pop(key, None)
            self._sha256.pop(key, None)
            self.immutable.discard(key)
