"""Model versions in an object store: published whole or not at all, then never changed.

How a version comes to be, in `publish`:

1. its files are hashed;
2. a *claim* (the list of files) is put at `.../claim.json` unless one is there. A claim with other files is a
   Conflict. So two publications of different bytes never write under one prefix, and the same bytes may be sent again
   by whoever goes on with a broken publication, even while the first still runs;
3. files that are not there yet are uploaded;
4. the manifest is put, unless one is there. From now on the version exists.

A publication that dies at any moment leaves no manifest, so no version; started again, it sends only what is missing.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from zenray.spec.clock import Clock, SystemClock
from zenray.spec.errors import (
    Conflict,
    CorruptData,
    InvalidValue,
    NotFound,
    StorageUnavailable,
    suggest,
)
from zenray.spec.versions import MANIFEST_NAME, RESERVED_VERSIONS, FileEntry, Manifest, Parents, VersionRef
from zenray.storage.base import ObjectStore, Progress, check_key
from zenray.storage.progress import Counter
from zenray.storage.transfer import hash_file, hash_object, run_all

CLAIM_NAME = "claim.json"
_ROOT = "zen/"
_PARALLEL_FILES = 4
_PARALLEL_READS = 8
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Problem:
    """What is wrong with one stored file of a version."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


class _Claim(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    files: tuple[FileEntry, ...]


def publish(
    store: ObjectStore,
    ref: VersionRef,
    folder: Path,
    *,
    parents: Parents | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    clock: Clock | None = None,
) -> Manifest:
    """Make the files of `folder` the version `ref`; returns the manifest that is now in the store. Blocks.

    Symbolic links to files are followed; hidden files and folders (a leading dot) are left out. Idempotent: files equal
    to those already published (or half published) under `ref` are a no-op (or the rest of the work), and `parents` and
    `metadata` of the first publication stay. Progress phases: "hash", "upload".

    Raises Conflict when `ref` has, or has begun to have, other files; InvalidValue for a folder without files;
    InvalidRequest when a file changes meanwhile (call `discard` then); StorageUnavailable.
    """
    sources = _files_of(folder)
    files = _hash_all(sources, progress)

    existing = find_manifest(store, ref)
    if existing is not None:
        return _same_or_conflict(existing, files)
    _claim(store, ref, files)
    _upload_all(store, ref, sources, files, progress)
    _check_sizes(store, ref, files)

    manifest = Manifest(
        ref=ref,
        files=files,
        parents=parents or Parents(),
        created_at=(clock or SystemClock()).now(),
        metadata=dict(metadata or {}),
    )
    if store.put_if_absent(ref.manifest_key, manifest.model_dump_json(indent=1).encode(), immutable=True):
        return manifest
    return _same_or_conflict(read_manifest(store, ref), files)


def find_manifest(store: ObjectStore, ref: VersionRef) -> Manifest | None:
    """The manifest of a version, or None when there is no such version. CorruptData, StorageUnavailable."""
    try:
        data = store.get_bytes(ref.manifest_key)
    except NotFound:
        return None
    return parse_manifest(data, ref, where=f"{store.uri}: {ref.manifest_key}")


def read_manifest(store: ObjectStore, ref: VersionRef) -> Manifest:
    """As `find_manifest`; raises NotFound, naming the versions there are, when there is none."""
    manifest = find_manifest(store, ref)
    if manifest is not None:
        return manifest
    known = sorted({f"{other.version}/{other.format}" for other in _refs(store, ref.model)})
    raise NotFound(f"{ref} is not in {store.uri}.", hint=suggest(f"{ref.version}/{ref.format}", known))


def parse_manifest(data: bytes, ref: VersionRef, *, where: str) -> Manifest:
    """The manifest of `ref` out of its bytes. CorruptData when it is not one, or names files it must not."""
    try:
        manifest = Manifest.model_validate_json(data)
        for entry in manifest.files:
            check_key(ref.prefix + entry.path)
    except (ValidationError, InvalidValue) as error:
        raise CorruptData(f"{where} is not a manifest: {error}") from None
    if manifest.ref != ref:
        raise CorruptData(f"{where} is the manifest of {manifest.ref}, not of {ref}.")
    names = [entry.path for entry in manifest.files]
    if len(set(names)) != len(names) or {MANIFEST_NAME, CLAIM_NAME} & set(names):
        raise CorruptData(f"{where} lists a file twice, or lists itself.")
    return manifest


def list_models(store: ObjectStore) -> list[str]:
    """Names of the models that have a version, sorted."""
    return sorted({ref.model for ref in _refs(store)})


def list_versions(store: ObjectStore, model: str) -> list[Manifest]:
    """The versions of a model in all their formats, the oldest first; [] for an unknown model. Reads each manifest."""
    with ThreadPoolExecutor(_PARALLEL_READS) as executor:
        manifests = run_all(executor, lambda ref: read_manifest(store, ref), _refs(store, model))
    return sorted(manifests, key=lambda manifest: (manifest.created_at, str(manifest.ref)))


def newest(store: ObjectStore, model: str, format: str = "safetensors") -> Manifest:
    """The version of a model that was published last in this format. NotFound says how to get one."""
    versions = list_versions(store, model)
    of_format = [manifest for manifest in versions if manifest.ref.format == format]
    if of_format:
        return of_format[-1]
    formats = sorted({manifest.ref.format for manifest in versions})
    hint = f"It has versions in: {', '.join(formats)}." if formats else f"Get one with: zenray models pull {model}"
    raise NotFound(f"{model} has no version in format {format!r} in {store.uri}.", hint=hint)


def verify(store: ObjectStore, ref: VersionRef, *, progress: Progress | None = None) -> list[Problem]:
    """Read all of a version's bytes and compare them with its manifest: what is wrong, file by file; [] is sound.

    Progress phase: "verify". Raises NotFound (no such version), CorruptData (a broken manifest), StorageUnavailable.
    """
    manifest = read_manifest(store, ref)
    counter = Counter(progress, "verify", manifest.size_bytes)
    with ThreadPoolExecutor(_PARALLEL_READS) as readers, ThreadPoolExecutor(_PARALLEL_FILES) as executor:

        def examine(entry: FileEntry) -> Problem | None:
            key = ref.prefix + entry.path
            info = store.head(key)
            if info is None:
                return Problem(entry.path, "missing")
            if info.size_bytes != entry.size_bytes:
                return Problem(entry.path, f"{info.size_bytes} bytes, the manifest says {entry.size_bytes}")
            found = hash_object(store, key, entry.size_bytes, readers, counter.add)
            if found != entry.sha256:
                return Problem(entry.path, f"its SHA-256 is {found}, the manifest says {entry.sha256}")
            return None

        return [problem for problem in run_all(executor, examine, manifest.files) if problem]


def discard(store: ObjectStore, ref: VersionRef) -> int:
    """Remove what a broken publication of `ref` left; the number of objects removed. Idempotent.

    Only for a version that does not exist: Conflict when it has a manifest. Nobody may be publishing it meanwhile.
    """
    if find_manifest(store, ref) is not None:
        raise Conflict(f"{ref} is published: published versions are never changed.")
    keys = [info.key for info in store.list(ref.prefix)]
    claim_key = ref.prefix + CLAIM_NAME
    for key in sorted(keys, key=lambda key: key == claim_key):  # the claim guards the others, so it goes last
        store.delete(key)
    return len(keys)


def _files_of(folder: Path) -> dict[str, Path]:
    """Path below the folder (with "/") → file, sorted."""
    found: dict[str, Path] = {}
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                file = Path(path, name)
                found[check_key(file.relative_to(folder).as_posix())] = file
    if not found:
        raise InvalidValue(f"{folder} has no files to publish.")
    for name in (MANIFEST_NAME, CLAIM_NAME):
        if name in found:
            raise InvalidValue(f"{found[name]}: a version may have no file of its own called {name!r}.")
    return dict(sorted(found.items()))


def _hash_all(sources: dict[str, Path], progress: Progress | None) -> tuple[FileEntry, ...]:
    sizes = {name: path.stat().st_size for name, path in sources.items()}
    counter = Counter(progress, "hash", sum(sizes.values()))
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        digests = run_all(executor, lambda path: hash_file(path, counter.add), sources.values())
    return tuple(
        FileEntry(path=name, size_bytes=sizes[name], sha256=digest)
        for name, digest in zip(sources, digests, strict=True)
    )


def _same_or_conflict(existing: Manifest, files: tuple[FileEntry, ...]) -> Manifest:
    if set(existing.files) == set(files):
        return existing
    raise Conflict(
        f"{existing.ref} is already published with other files: {_difference(existing.files, files)}.",
        hint="Published versions are never changed: choose another version name.",
    )


def _claim(store: ObjectStore, ref: VersionRef, files: tuple[FileEntry, ...]) -> None:
    key = ref.prefix + CLAIM_NAME
    if store.put_if_absent(key, _Claim(files=files).model_dump_json().encode()):
        return
    try:
        claimed = _Claim.model_validate_json(store.get_bytes(key))
    except ValidationError:
        raise CorruptData(f"{store.uri}: {key} is broken.", hint=f"Call discard for {ref}.") from None
    if set(claimed.files) != set(files):
        raise Conflict(
            f"A publication of {ref} was begun with other files: {_difference(claimed.files, files)}.",
            hint="Choose another version name, or finish that one, or remove what it left with discard.",
        )


def _difference(theirs: Iterable[FileEntry], ours: Iterable[FileEntry]) -> str:
    names = sorted({entry.path for entry in set(theirs) ^ set(ours)})
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more differ" if len(names) > 5 else " differ")


def _upload_all(
    store: ObjectStore,
    ref: VersionRef,
    sources: dict[str, Path],
    files: tuple[FileEntry, ...],
    progress: Progress | None,
) -> None:
    counter = Counter(progress, "upload", sum(entry.size_bytes for entry in files))
    with ThreadPoolExecutor(_PARALLEL_READS) as readers, ThreadPoolExecutor(_PARALLEL_FILES) as executor:

        def upload(entry: FileEntry) -> None:
            key = ref.prefix + entry.path
            info = store.head(key)
            if info is not None and info.size_bytes == entry.size_bytes:
                there = info.sha256 or hash_object(store, key, entry.size_bytes, readers)
                if there == entry.sha256:
                    counter.add(entry.size_bytes)
                    return
            store.put_file(key, sources[entry.path], sha256=entry.sha256, immutable=True, on_bytes=counter.add)

        run_all(executor, upload, files)


def _check_sizes(store: ObjectStore, ref: VersionRef, files: tuple[FileEntry, ...]) -> None:
    """The last look before the manifest: a discard meanwhile, or a store that lost a file, must not go unnoticed."""
    there = {info.key: info.size_bytes for info in store.list(ref.prefix)}
    for entry in files:
        size_bytes = there.get(ref.prefix + entry.path)
        if size_bytes != entry.size_bytes:
            raise StorageUnavailable(
                f"{store.uri}: {ref.prefix}{entry.path} was uploaded with {entry.size_bytes} bytes, "
                f"but the store has {size_bytes if size_bytes is not None else 'none'}.",
                hint="Nothing was published; publish again.",
            )


def _refs(store: ObjectStore, model: str | None = None) -> list[VersionRef]:
    """Every version that exists, of one model or of all, in all formats. Adapters are not among them."""
    found = []
    for info in store.list(f"{_ROOT}{model}/" if model else _ROOT):
        parts = info.key.split("/")
        if len(parts) == 5 and parts[4] == MANIFEST_NAME and parts[2] not in RESERVED_VERSIONS:
            try:
                found.append(VersionRef(model=parts[1], version=parts[2], format=parts[3]))
            except ValidationError:
                _log.warning("%s: %s is not the manifest of a version; left out", store.uri, info.key)
    return found
