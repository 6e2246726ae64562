"""The documents of a data source, in a fixed order, and the digest that names them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from zenray.spec.errors import InvalidValue, NotFound
from zenray.spec.training import DataSource
from zenray.training.data.corpus import builtin_documents, builtin_version

_SUFFIXES = (".jsonl", ".parquet", ".txt", ".md", ".py")


def read_documents(source: DataSource) -> Iterator[str]:
    """The source's texts. NotFound for a path that is not there, InvalidValue for what cannot be read as text."""
    if source.builtin is not None:
        yield from builtin_documents(source.builtin)
        return
    assert source.path is not None
    for path in source_files(Path(source.path)):
        yield from _read_file(path)


def source_files(path: Path) -> list[Path]:
    """The files of `path`, itself or those below it, in the order of their names."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise NotFound(f"{path}: no such file or folder.", hint="A data source names a file, or a folder of files.")
    found = sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES and file.is_file())
    if not found:
        raise NotFound(f"{path} has no file that ends in {', '.join(_SUFFIXES)}.")
    return found


def _read_file(path: Path) -> Iterator[str]:
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _text_of(line, path, number)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from (text for text in batch.column("text").to_pylist() if text)
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidValue(f"{path}:{number} is not a JSON object with a key `text`: {error!r}.") from None
    if not isinstance(text, str):
        raise InvalidValue(f"{path}:{number}: `text` is a {type(text).__name__}, not a string.")
    return text


def identity(source: DataSource) -> str:
    """What the texts are, without reading those of installed packages: their versions, or a SHA-256 over the files."""
    if source.builtin is not None:
        return builtin_version(source.builtin)
    assert source.path is not None
    found = hashlib.sha256()
    for path in source_files(Path(source.path)):
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{found.hexdigest()}"


def write_corpus(folder: Path, sources: Iterable[DataSource]) -> dict[str, int]:
    """One `DOMAIN.jsonl` for each source, each line {"text", "domain"}; returns documents per domain."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for source in sources:
        counts[source.domain] = 0
        with (folder / f"{source.domain}.jsonl").open("w", encoding="utf-8") as file:
            for text in read_documents(source):
                file.write(json.dumps({"text": text, "domain": source.domain}, ensure_ascii=False) + "\n")
                counts[source.domain] += 1
    return counts
