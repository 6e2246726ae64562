"""The object store in a local directory. Objects are plain files, so that a person can look at them."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from zenray.spec.errors import InvalidValue, StorageUnavailable, ZenrayError
from zenray.storage.base import (
    RESERVED_SEGMENT_PREFIX,
    ObjectInfo,
    ObjectStore,
    OnBytes,
    check_key,
    check_range,
    missing,
)
from zenray.storage.transfer import file_changed, hash_file

_UNFINISHED = RESERVED_SEGMENT_PREFIX + "unfinished"
_COPY_BYTES = 16 << 20
_LOCKED_WITHIN_S = 60  # a writer surely holds its lock this long after it made the file


class LocalStore(ObjectStore):
    """Objects below `root`, which is made when first written to.

    A write goes to a temporary file below `root`, is flushed to disk, then takes its name by rename (or, where it must
    not replace anything, by a hard link), and the folder is flushed: it survives a power cut once the call returned.
    """

    def __init__(self, root: Path) -> None:
        self._root = root.absolute()
        self._swept = False
        self._sweep_lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"file:{self._root}"

    def put_bytes(self, key: str, data: bytes, *, immutable: bool = False) -> None:
        self._write(key, lambda file: _write_all(file, data), os.replace)

    def put_file(
        self, key: str, path: Path, *, sha256: str, immutable: bool = False, on_bytes: OnBytes | None = None
    ) -> None:
        self._write(key, lambda file: _copy(path, sha256, file, on_bytes), os.replace)

    def put_if_absent(self, key: str, data: bytes, *, immutable: bool = False) -> bool:
        target = self._path(key)
        if target.is_file():  # saves the flush; the link below is what decides
            return False
        try:
            self._write(key, lambda file: _write_all(file, data), os.link)
        except FileExistsError:
            return False
        return True

    def get_bytes(self, key: str) -> bytes:
        with self._reading(key) as file:
            return file.read()

    def get_range(self, key: str, start_bytes: int, length_bytes: int) -> bytes:
        check_range(start_bytes, length_bytes)
        with self._reading(key) as file:
            file.seek(start_bytes)
            return file.read(length_bytes)

    def head(self, key: str) -> ObjectInfo | None:
        path = self._path(key)
        with self._explained(key):
            return ObjectInfo(key, path.stat().st_size) if path.is_file() else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        folder, _, _ = prefix.rpartition("/")
        if folder:
            check_key(folder)
        with self._explained(prefix):
            found = [info for info in _walk(self._root, self._root / folder) if info.key.startswith(prefix)]
        yield from found

    def delete(self, key: str) -> None:
        path = self._path(key)
        with self._explained(key), suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            path.unlink()
            _flush_folder(path.parent)

    def _path(self, key: str) -> Path:
        return self._root / check_key(key)

    @contextmanager
    def _reading(self, key: str) -> Iterator[BinaryIO]:
        path = self._path(key)
        with self._explained(key):
            try:
                file = path.open("rb")
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise missing(self, key) from None
            with file:
                yield file

    def _write(self, key: str, fill: Callable[[BinaryIO], None], place: Callable[[str, Path], None]) -> None:
        target = self._path(key)
        with self._explained(key):
            if target.is_dir():
                raise InvalidValue(f"{key!r} cannot be written to {self.uri}: other objects lie below it.")
            unfinished = self._root / _UNFINISHED
            _make_folders(unfinished)
            self._sweep(unfinished)
            _make_folders(target.parent)
            descriptor, name = tempfile.mkstemp(dir=unfinished)
            try:
                os.close(descriptor)
                with open(name, "wb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives; a sweeper lets go at once
                    fill(file)
                    file.flush()
                    os.fchmod(file.fileno(), 0o644)
                    os.fsync(file.fileno())
                    place(name, target)
                _flush_folder(target.parent)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(name)

    def _sweep(self, unfinished: Path) -> None:
        """Once per process: remove what writers that died left behind."""
        with self._sweep_lock:
            if self._swept:
                return
            self._swept = True
        for path in unfinished.iterdir():
            with suppress(OSError), path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - path.stat().st_mtime > _LOCKED_WITHIN_S:
                    path.unlink()

    @contextmanager
    def _explained(self, key: str) -> Iterator[None]:
        """Operating-system errors as StorageUnavailable; FileExistsError passes, it is `put_if_absent`'s answer."""
        try:
            yield
        except (ZenrayError, FileExistsError):
            raise
        except NotADirectoryError:
            raise InvalidValue(f"{key!r} cannot be used in {self.uri}: a part of its path is an object.") from None
        except OSError as error:
            raise StorageUnavailable(
                f"{self.uri}: {key!r}: {error.strerror or error}.", hint=_HINTS.get(error.errno or 0)
            ) from error


_HINTS = {
    errno.ENOSPC: "The disk is full: free some space, or move the store.",
    errno.EDQUOT: "The disk quota is used up: free some space, or move the store.",
    errno.EACCES: "Give the user that runs zenray read and write access to that folder.",
    errno.EROFS: "The file system is mounted read-only.",
    errno.EPERM: "The file system must allow hard links, and the user that runs zenray must own the folder.",
}


def _write_all(file: BinaryIO, data: bytes) -> None:
    file.write(data)


def _copy(source: Path, sha256: str, target: BinaryIO, on_bytes: OnBytes | None) -> None:
    """Copied by the kernel, which is several times as fast as through here; what arrived is then hashed."""
    with source.open("rb") as file:
        while copied := os.sendfile(target.fileno(), file.fileno(), None, _COPY_BYTES):
            if on_bytes:
                on_bytes(copied)
    found = hash_file(Path(target.name))
    if found != sha256:
        raise file_changed(source, found, sha256)


def _walk(root: Path, folder: Path) -> Iterator[ObjectInfo]:
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(RESERVED_SEGMENT_PREFIX)]
        for name in names:
            file = Path(path, name)
            with suppress(FileNotFoundError):  # deleted meanwhile
                yield ObjectInfo(file.relative_to(root).as_posix(), file.stat().st_size)


def _make_folders(folder: Path) -> None:
    """`folder` and its parents, each new one's name flushed to disk."""
    if folder.is_dir():
        return
    _make_folders(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
