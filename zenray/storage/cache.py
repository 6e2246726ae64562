"""The cache of a node: published versions as local folders, verified, shared by all processes on the node.

{cache_dir}/{model}/{version}/{format}/    complete and verified: it appears in one rename
{cache_dir}/.zenray-partial/…              downloads under way: ranges that arrived are kept for the next attempt
{cache_dir}/.zenray-locks/…                one process downloads a version at a time, the others wait for it
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from zenray.spec.errors import CorruptData, NotFound, StorageUnavailable
from zenray.spec.versions import MANIFEST_NAME, FileEntry, Manifest, VersionRef
from zenray.storage.base import ObjectStore, Progress
from zenray.storage.progress import Counter
from zenray.storage.transfer import RANGE_BYTES, hash_file, run_all
from zenray.storage.versions import parse_manifest, read_manifest

_STAMPS_NAME = ".zenray-verified.json"
_PARALLEL_RANGES = 8
_PARALLEL_FILES = 2
_SPARE_BYTES = 64 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FetchReport:
    """What it took to have a version on this machine."""

    ref: VersionRef
    total_bytes: int
    fetched_bytes: int  # from the store, now; 0: it was in the cache
    resumed_bytes: int  # left by an attempt that was broken off
    took_s: float

    @property
    def was_cached(self) -> bool:
        return self.fetched_bytes == self.resumed_bytes == 0

    def __str__(self) -> str:
        if self.was_cached:
            return f"{self.ref}: {self.total_bytes / 1e6:,.1f} MB found in the cache"
        earlier = (
            f", {self.resumed_bytes / 1e6:,.1f} MB were there from an earlier attempt" if self.resumed_bytes else ""
        )
        speed = self.fetched_bytes / 1e6 / max(self.took_s, 1e-9)
        return f"{self.ref}: {self.fetched_bytes / 1e6:,.1f} MB in {self.took_s:.1f} s, {speed:,.0f} MB/s{earlier}"


def fetch(
    store: ObjectStore,
    ref: VersionRef,
    cache_dir: Path,
    *,
    progress: Progress | None = None,
    full_check: bool = False,
    on_done: Callable[[FetchReport], None] | None = None,
) -> Path:
    """The folder of a version on this machine, downloaded if need be, each file's SHA-256 checked. Blocks; idempotent.

    What is cached already is looked over cheaply (size and modification time of each file; with `full_check` its
    SHA-256): a file that was touched since is hashed again and, if it differs, downloaded again. While the store cannot
    be reached, a cached version is used as it is, with a warning: published versions never change.
    The folder also holds the manifest. It is shared: nobody may write to it. Progress phase: "download". What it took
    is logged, and told to `on_done`.

    Raises NotFound, StorageUnavailable (also for a full disk here), CorruptData naming the file whose bytes in the
    store are not the manifest's; then nothing is left that looks whole.
    """
    began_s = time.monotonic()
    tally = _Tally()
    folder, manifest = _fetched(store, ref, cache_dir, progress, full_check, tally)
    took_s = time.monotonic() - began_s
    report = FetchReport(ref, manifest.size_bytes, tally.fetched_bytes, tally.resumed_bytes, took_s)
    _log.info("%s", report)
    if on_done is not None:
        on_done(report)
    return folder


@dataclass
class _Tally:
    fetched_bytes: int = 0
    resumed_bytes: int = 0


def _fetched(
    store: ObjectStore, ref: VersionRef, cache_dir: Path, progress: Progress | None, full_check: bool, tally: _Tally
) -> tuple[Path, Manifest]:
    folder = cache_dir / ref.model / ref.version / ref.format
    try:
        manifest = read_manifest(store, ref)
    except StorageUnavailable as error:
        cached = _cached_manifest(folder, ref)
        if cached is None or _unsound(folder, cached, full_check):
            raise
        _log.warning("%s cannot be reached; using %s as cached in %s (%s)", store.uri, ref, folder, error)
        return folder, cached
    if _cached_manifest(folder, ref) == manifest and _stamps_hold(folder, manifest) and not full_check:
        return folder, manifest
    with _disk_errors(cache_dir), _locked(cache_dir, ref):
        if _cached_manifest(folder, ref) != manifest:
            partial = _partial_folder(cache_dir, manifest)
            _fill(store, manifest, partial, manifest.files, progress, tally)
            _seal(partial, manifest)
            _put_in_place(partial, folder)
        elif full_check or not _stamps_hold(folder, manifest):
            broken = _unsound(folder, manifest, full_check)
            if broken:
                _log.warning("%s: %s changed on disk; downloading again", folder, ", ".join(e.path for e in broken))
                _fill(store, manifest, folder, broken, progress, tally)
            _seal(folder, manifest)
    return folder, manifest


@contextmanager
def _locked(cache_dir: Path, ref: VersionRef) -> Iterator[None]:
    """Held by one process of this machine at a time, for one version; released by the system when its holder dies."""
    lock = cache_dir / ".zenray-locks" / ref.model / ref.version / f"{ref.format}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock):
        yield


def _partial_folder(cache_dir: Path, manifest: Manifest) -> Path:
    """Where this very manifest's files arrive. What was begun under this name for another manifest is removed."""
    digest = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:16]
    ref = manifest.ref
    folder = cache_dir / ".zenray-partial" / ref.model / ref.version / ref.format / digest
    folder.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other.name != digest:
            shutil.rmtree(other, ignore_errors=True)
    return folder


def _cached_manifest(folder: Path, ref: VersionRef) -> Manifest | None:
    """The manifest of a complete folder; None when there is none, or it is not readable as one."""
    try:
        return parse_manifest((folder / MANIFEST_NAME).read_bytes(), ref, where=str(folder))
    except (OSError, CorruptData):
        return None


def _stamps_hold(folder: Path, manifest: Manifest) -> bool:
    """The cheap look: every file is as it was when it was last verified."""
    stamps = _read_stamps(folder)
    try:
        return all(stamps.get(entry.path) == _stamp(folder / entry.path) for entry in manifest.files)
    except OSError:
        return False


def _unsound(folder: Path, manifest: Manifest, full_check: bool) -> list[FileEntry]:
    """The files that differ from the manifest. Files as they were when last verified are not read."""
    stamps = _read_stamps(folder)
    broken = []
    for entry in manifest.files:
        path = folder / entry.path
        try:
            same = path.stat().st_size == entry.size_bytes
            if same and (full_check or stamps.get(entry.path) != _stamp(path)):
                same = hash_file(path) == entry.sha256
        except OSError:
            same = False
        if not same:
            broken.append(entry)
    return broken


def _read_stamps(folder: Path) -> dict[str, list[int]]:
    try:
        stamps: dict[str, list[int]] = json.loads((folder / _STAMPS_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return stamps


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _fill(
    store: ObjectStore,
    manifest: Manifest,
    folder: Path,
    entries: tuple[FileEntry, ...] | list[FileEntry],
    progress: Progress | None,
    tally: _Tally,
) -> None:
    """Bring `entries` into `folder`, each verified. What is there and right is kept.

    Two files are under way at a time: while one is hashed, ranges of the next arrive.
    """
    folder.mkdir(parents=True, exist_ok=True)
    downloads = [_Download(store, manifest.ref, entry, folder) for entry in entries]
    done = [download.is_done() for download in downloads]
    tally.resumed_bytes += sum(d.entry.size_bytes for d, is_done in zip(downloads, done, strict=True) if is_done)
    downloads = [download for download, is_done in zip(downloads, done, strict=True) if not is_done]
    counter = Counter(progress, "download", sum(download.entry.size_bytes for download in downloads))
    missing_bytes = sum(download.missing_bytes for download in downloads)
    _check_room(folder, missing_bytes)
    with ThreadPoolExecutor(_PARALLEL_RANGES) as ranges, ThreadPoolExecutor(_PARALLEL_FILES) as files:
        run_all(files, lambda download: download.run(ranges, counter), downloads)
    tally.fetched_bytes += missing_bytes
    tally.resumed_bytes += sum(download.entry.size_bytes for download in downloads) - missing_bytes


class _Download:
    """One file on its way: `{path}.zenray-part` with `{path}.zenray-ranges`, the numbers of the ranges that arrived."""

    def __init__(self, store: ObjectStore, ref: VersionRef, entry: FileEntry, folder: Path) -> None:
        self.entry = entry
        self._store = store
        self._key = ref.prefix + entry.path
        self._target = folder / entry.path
        self._part = folder / f"{entry.path}.zenray-part"
        self._ranges = folder / f"{entry.path}.zenray-ranges"
        self._arrived = self._read_arrived()

    def _read_arrived(self) -> set[int]:
        try:
            if self._part.stat().st_size != self.entry.size_bytes:
                return set()
            lines = self._ranges.read_text().split("\n")[:-1]  # a last line without its end was cut off
            header, numbers = lines[0], {int(line) for line in lines[1:]}
        except (OSError, ValueError, IndexError):
            return set()
        return numbers if header == self.entry.sha256 else set()

    @property
    def missing_bytes(self) -> int:
        return sum(length for number, (_, length) in self._all_ranges().items() if number not in self._arrived)

    def _all_ranges(self) -> dict[int, tuple[int, int]]:
        size = self.entry.size_bytes
        starts = range(0, size, RANGE_BYTES)
        return {number: (start, min(RANGE_BYTES, size - start)) for number, start in enumerate(starts)}

    def is_done(self) -> bool:
        """Whether the file is there and right: a part of an earlier attempt that was finished."""
        try:
            return self._target.stat().st_size == self.entry.size_bytes and (
                hash_file(self._target) == self.entry.sha256
            )
        except OSError:
            return False

    def run(self, executor: ThreadPoolExecutor, counter: Counter) -> None:
        """Download, verify, put in place. Bytes left by an earlier attempt that prove wrong are fetched once more."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        resumed = bool(self._arrived)
        self._transfer(executor, counter)
        found = hash_file(self._part)
        if found != self.entry.sha256 and resumed:
            self._arrived = set()
            counter.add(-self.entry.size_bytes)
            self._transfer(executor, counter)
            found = hash_file(self._part)
        if found != self.entry.sha256:
            self._part.unlink()
            self._ranges.unlink(missing_ok=True)
            raise CorruptData(
                f"{self._store.uri}: {self._key} is corrupt: its SHA-256 is {found}, "
                f"the manifest says {self.entry.sha256}.",
                hint="Publish this version's files again under a new version name.",
            )
        with self._part.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(self._part, self._target)
        self._ranges.unlink(missing_ok=True)

    def _transfer(self, executor: ThreadPoolExecutor, counter: Counter) -> None:
        missing = {n: span for n, span in self._all_ranges().items() if n not in self._arrived}
        counter.add(self.entry.size_bytes - sum(length for _, length in missing.values()))
        if not self._arrived:
            self._ranges.write_text(self.entry.sha256 + "\n")
        descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT, 0o644)
        journal = os.open(self._ranges, os.O_WRONLY | os.O_APPEND)
        try:
            os.ftruncate(descriptor, self.entry.size_bytes)

            def bring(item: tuple[int, tuple[int, int]]) -> None:
                number, (start, length) = item
                data = self._get_range(start, length)
                written = 0
                while written < length:
                    written += os.pwrite(descriptor, memoryview(data)[written:], start + written)
                os.write(journal, f"{number}\n".encode())
                counter.add(length)

            run_all(executor, bring, missing.items())  # once it returns or raises, nothing writes any more
        finally:
            os.close(journal)
            os.close(descriptor)

    def _get_range(self, start: int, length: int) -> bytes:
        try:
            data = self._store.get_range(self._key, start, length)
        except NotFound:
            raise CorruptData(
                f"{self._store.uri}: {self._key} is missing, though its manifest names it.",
                hint="Publish this version's files again under a new version name.",
            ) from None
        if len(data) != length:
            raise CorruptData(
                f"{self._store.uri}: {self._key} is corrupt: it ends at byte {start + len(data)} "
                f"of {self.entry.size_bytes}.",
                hint="Publish this version's files again under a new version name.",
            )
        return data


def _seal(folder: Path, manifest: Manifest) -> None:
    """Write down that the folder is complete, and how its verified files look."""
    stamps = {entry.path: _stamp(folder / entry.path) for entry in manifest.files}
    _write_flushed(folder / _STAMPS_NAME, json.dumps(stamps).encode())
    _write_flushed(folder / MANIFEST_NAME, manifest.model_dump_json(indent=1).encode())


def _write_flushed(path: Path, data: bytes) -> None:
    unfinished = path.with_name(path.name + ".zenray-part")
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _put_in_place(partial: Path, folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():  # another store's version of this name, or a folder that lost its manifest
        aside = partial.with_name(".replaced")
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        os.rename(partial, folder)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.rename(partial, folder)
    descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_room(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes + _SPARE_BYTES > free_bytes:
        raise StorageUnavailable(
            f"{folder}: {needed_bytes / 1e9:.2f} GB are to be downloaded, the disk has {free_bytes / 1e9:.2f} GB free.",
            hint="Free some space, or set the cache to a larger disk.",
        )


@contextmanager
def _disk_errors(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = "Give the user that runs zenray read and write access to the cache folder."
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "The disk is full: free some space, or set the cache to a larger disk."
        where = error.filename or cache_dir
        raise StorageUnavailable(f"{where}: {error.strerror or error}.", hint=hint) from error
