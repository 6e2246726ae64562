"""What the registry does: pull a model into the store as a version, and list, show and verify what is there."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from zenray.catalog.entries import Source
from zenray.control.registry.conversion import convert
from zenray.control.registry.sources import bring
from zenray.model.checkpoints import REVISION
from zenray.model.checkpoints.source import GgufSource, SafetensorsSource, recognise
from zenray.spec.errors import Conflict, InvalidValue, StorageUnavailable, suggest
from zenray.spec.versions import TEMPLATE_OVERHEAD, Manifest, Parents, VersionRef
from zenray.storage import versions as stored
from zenray.storage.base import ObjectStore, Progress
from zenray.storage.progress import Counter
from zenray.storage.transfer import hash_file, run_all
from zenray.storage.versions import Problem

FORMAT = "safetensors"
QUANTIZED_FORMATS = ("awq-int4", "gptq-int8")
DTYPES = ("bfloat16", "float16", "float32")
_LOCKED_WITHIN_S = 60  # whoever made a staging folder holds its lock by then
_SOURCE_SHA256 = "source_sha256"


@dataclass(frozen=True)
class Pulled:
    """The version that `pull` found or made. `notes`: what a person should know of a new one."""

    manifest: Manifest
    created: bool
    notes: tuple[str, ...] = ()


def pull(
    store: ObjectStore,
    model: str,
    source: str = "auto",
    *,
    cache_dir: Path,
    catalog_sources: Sequence[Source] = (),
    version: str | None = None,
    format: str = FORMAT,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> Pulled:
    """Make a checkpoint a version of `model` (a catalog name) in the store. Blocks; idempotent.

    `source` and `catalog_sources`: see `sources.bring`. `version`: None names it for its source's content, so that
    pulling the same again finds it and does nothing. The checkpoint is brought here, recognised, converted to a normal
    Hugging Face folder in `dtype` by a process of its own, checked complete, and only then published; what was fetched
    stays in `cache_dir` for the next time. With a `format` of QUANTIZED_FORMATS the weights must be packed so already
    and are published as they are: a further format of `version`, or a version of its own. Progress phases: "get",
    "read", "convert", "hash", "upload".

    Raises InvalidDocument for a checkpoint that is broken, partial or of a kind that cannot be imported; Conflict when
    `version` is there with other content; NotFound, InvalidValue, UpstreamFailed, StorageUnavailable.
    """
    if dtype not in DTYPES:
        raise InvalidValue(f"Weights cannot be stored as {dtype!r}.", hint=suggest(dtype, DTYPES))
    formats = (FORMAT, *QUANTIZED_FORMATS)
    if format not in formats:
        raise InvalidValue(f"Weights cannot be pulled as {format!r}.", hint=suggest(format, formats), param="format")
    _ref(model, version or "v-0")  # before anything is fetched
    checkpoint = bring(source, catalog_sources=catalog_sources, cache_dir=cache_dir, progress=progress)
    recognised = recognise(checkpoint.path)
    content = _fingerprint(recognised, progress)
    kept_as = dtype if format == FORMAT else format  # what the same source may also have become
    ref = _ref(model, version or _version_name(content, kept_as), format)

    existing = stored.find_manifest(store, ref)
    if existing is not None:
        if (existing.metadata.get(_SOURCE_SHA256), existing.metadata.get("dtype")) == (content, kept_as):
            return Pulled(existing, created=False)
        raise Conflict(
            f"{ref} is already published, from {existing.parents.source or 'elsewhere'} and with other content.",
            hint="Published versions are never changed: choose another version name, or none.",
        )
    with _staging(cache_dir) as folder:
        target = folder / "checkpoint"
        report = convert(checkpoint.path, target, dtype=dtype, format=format, progress=progress)
        metadata = {
            _SOURCE_SHA256: content,
            "converter": str(REVISION),
            "dtype": kept_as,
            "architecture": report.architecture,
            "parameters": str(report.parameters),
        }
        if report.context_tokens:
            metadata["context_tokens"] = str(report.context_tokens)
        if report.template_overhead_tokens is not None:
            metadata[TEMPLATE_OVERHEAD] = str(report.template_overhead_tokens)
        manifest = stored.publish(
            store, ref, target, parents=Parents(source=checkpoint.origin), metadata=metadata, progress=progress
        )
    return Pulled(manifest, created=True, notes=report.notes)


def versions(store: ObjectStore, model: str) -> list[Manifest]:
    """The versions of a model in all formats, the oldest first; [] when there are none."""
    return stored.list_versions(store, model)


def show(store: ObjectStore, name: str) -> Manifest:
    """The manifest of `model`, `model@version` or `model@version/format`. NotFound, InvalidValue."""
    return stored.read_manifest(store, find(store, name))


def verify(store: ObjectStore, name: str, *, progress: Progress | None = None) -> list[Problem]:
    """Compare every stored byte of a version (named as in `show`) with its manifest; [] is sound."""
    return stored.verify(store, find(store, name), progress=progress)


def find(store: ObjectStore, name: str) -> VersionRef:
    """The version that a person means by `model` (the newest), `model@version` or `model@version/format`."""
    model, at, rest = name.partition("@")
    if not at:
        return stored.newest(store, _ref(model, "v-0").model).ref
    version, slash, format = rest.partition("/")
    return _ref(model, version, format if slash else FORMAT)


def _ref(model: str, version: str, format: str = FORMAT) -> VersionRef:
    try:
        return VersionRef(model=model, version=version, format=format)
    except ValidationError as error:
        raise InvalidValue(str(error.errors()[0]["msg"]).removeprefix("Value error, ") + ".") from None


def _version_name(content: str, kept_as: str) -> str:
    return "v-" + hashlib.sha256(f"{REVISION}:{kept_as}:{content}".encode()).hexdigest()[:12]


def _fingerprint(source: SafetensorsSource | GgufSource, progress: Progress | None) -> str:
    """SHA-256 over the names and SHA-256s of all files that an import reads."""
    files = source.files()
    counter = Counter(progress, "read", sum(path.stat().st_size for path in files))
    with ThreadPoolExecutor(os.cpu_count() or 1) as executor:
        digests = run_all(executor, lambda path: hash_file(path, counter.add), files)
    lines = [f"{digest}  {path.name}\n" for digest, path in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def _staging(cache_dir: Path) -> Iterator[Path]:
    """An empty folder that goes away, also (at the next pull) when this process is killed."""
    parent = cache_dir / "staging"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(dir=parent))
    except OSError as error:
        raise StorageUnavailable(
            f"{error.filename or parent}: {error.strerror or error}.", hint="Is the disk full, or read-only?"
        ) from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _sweep(parent: Path) -> None:
    """Remove the folders of processes that died: the lock on a folder goes with its holder."""
    for folder in parent.iterdir():
        if time.time() - folder.stat().st_mtime < _LOCKED_WITHIN_S:
            continue
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
