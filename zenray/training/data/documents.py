"""The documents of a data source, in a fixed order, and the digest that names them."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pyarrow.fs import FileSelector, FileSystem, FileType

from zenray.spec.errors import InvalidValue, NotFound
from zenray.spec.training import BuiltinCorpus, DataSource
from zenray.spec.versions import FileEntry
from zenray.storage.arrow import arrow_filesystem
from zenray.training.data.corpus import builtin_documents, builtin_version

_SUFFIXES = (".jsonl", ".parquet", ".txt", ".md", ".py")
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class TextFile:
    """One file of a source, on this machine or in S3. May be pickled; holds no secret."""

    filesystem: FileSystem
    path: str

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    def documents(self) -> Iterator[str]:
        """Its texts, one after the other, never all in memory but for plain text. InvalidValue for broken lines."""
        if self.suffix == ".parquet":
            import pyarrow.parquet

            with self.filesystem.open_input_file(self.path) as file:
                for batch in pyarrow.parquet.ParquetFile(file).iter_batches(columns=["text"], batch_size=1024):
                    yield from (text for text in batch.column("text").to_pylist() if text)
        elif self.suffix == ".jsonl":
            with self.filesystem.open_input_stream(self.path) as file:
                for number, line in enumerate(io.TextIOWrapper(file, encoding="utf-8"), 1):
                    if line.strip():
                        yield _text_of(line, self.path, number)
        else:
            with self.filesystem.open_input_stream(self.path) as file:
                yield file.read().decode("utf-8", errors="replace")

    def stamp(self) -> str:
        """What changes when its text does, as far as the file system says: its size and the time of the last write."""
        about = self.filesystem.get_file_info(self.path)
        return f"{self.filesystem.type_name}:{self.path} {about.size} {about.mtime_ns}"

    def entry(self) -> FileEntry:
        """Its size and its SHA-256. Reads all of it."""
        found, size_bytes = hashlib.sha256(), 0
        with self.filesystem.open_input_stream(self.path) as file:
            while chunk := file.read(_CHUNK_BYTES):
                found.update(chunk)
                size_bytes += len(chunk)
        return FileEntry(path=self.path, size_bytes=size_bytes, sha256=found.hexdigest())


def read_documents(source: DataSource) -> Iterator[str]:
    """The source's texts. NotFound for a path that is not there, InvalidValue for what cannot be read as text."""
    if source.builtin is not None:
        yield from builtin_documents(source.builtin)
        return
    for file in source_files(source):
        yield from file.documents()


def source_files(source: DataSource) -> list[TextFile]:
    """The files of the source's path, itself or those below it, in the order of their names. NotFound."""
    assert source.path is not None
    uri = source.path if "://" in source.path else f"file:{Path(source.path).absolute()}"
    filesystem, root = arrow_filesystem(uri, source.endpoint_url)
    about = filesystem.get_file_info(root)
    if about.type == FileType.NotFound:
        raise NotFound(
            f"{source.path}: no such file or folder.", hint="A data source names a file, or a folder of files."
        )
    if about.type == FileType.File:
        return [TextFile(filesystem, root)]
    below = filesystem.get_file_info(FileSelector(root, recursive=True))
    found = sorted((info.path for info in below if info.is_file), key=lambda path: PurePosixPath(path).parts)
    files = [TextFile(filesystem, path) for path in found if PurePosixPath(path).suffix in _SUFFIXES]
    if not files:
        raise NotFound(f"{source.path} has no file that ends in {', '.join(_SUFFIXES)}.")
    return files


def _text_of(line: str, path: str, number: int) -> str:
    try:
        text: Any = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidValue(f"{path}:{number} is not a JSON object with a key `text`: {error!r}.") from None
    if not isinstance(text, str):
        raise InvalidValue(f"{path}:{number}: `text` is a {type(text).__name__}, not a string.")
    return text


def text_entries(source: DataSource, known: dict[str, FileEntry] | None = None) -> tuple[FileEntry, ...]:
    """The source's files in their order; a corpus of installed packages as one, which its version names.

    `known`: those that were read before, by their stamps; gets what is read now.
    """
    known = {} if known is None else known
    if source.builtin is not None:
        version = builtin_version(source.builtin)
        if version not in known:
            known[version] = _entry_of_corpus(source.builtin, version)
        return (known[version],)
    found = []
    for file in source_files(source):
        stamp = file.stamp()
        if stamp not in known:
            known[stamp] = file.entry()
        found.append(known[stamp])
    return tuple(found)


def _entry_of_corpus(name: BuiltinCorpus, version: str) -> FileEntry:
    """As of one file that has the documents in their order, each ended by a zero byte."""
    found, size_bytes = hashlib.sha256(), 0
    for document in builtin_documents(name):
        data = document.encode("utf-8", errors="replace") + b"\0"
        found.update(data)
        size_bytes += len(data)
    return FileEntry(path=version, size_bytes=size_bytes, sha256=found.hexdigest())


def identity(source: DataSource, files: Iterable[FileEntry]) -> str:
    """What the texts are: the version of those of installed packages, or a SHA-256 over those of the files."""
    if source.builtin is not None:
        return builtin_version(source.builtin)
    digests = b"".join(bytes.fromhex(file.sha256) for file in files)
    return f"sha256:{hashlib.sha256(digests).hexdigest()}"


def write_corpus(
    folder: Path, sources: Iterable[DataSource], progress: Callable[[str, int], None] = lambda domain, done: None
) -> dict[str, int]:
    """One `DOMAIN.jsonl` for each source, each line {"text", "domain"}; returns documents per domain.

    `progress` is told each domain's documents so far.
    """
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for source in sources:
        counts[source.domain] = 0
        with (folder / f"{source.domain}.jsonl").open("w", encoding="utf-8") as file:
            for text in read_documents(source):
                file.write(json.dumps({"text": text, "domain": source.domain}, ensure_ascii=False) + "\n")
                counts[source.domain] += 1
                progress(source.domain, counts[source.domain])
    return counts
