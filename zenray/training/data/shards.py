"""Tokens that the cluster makes once: Ray Data reads each text file on some machine and keeps its tokens in the store.

A file's tokens lie under the SHA-256 of its bytes, of the tokenizer and the end token, so nothing is made twice,
whatever job asks. Which file is where in a domain stays in `TokenShards`, which goes to the workers.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow.fs import FileSystem, FileType
from tokenizers import Tokenizer

from zenray.spec.training import DataSource, TrainingData
from zenray.spec.versions import FileEntry
from zenray.training.data.documents import TextFile, source_files

_MAGIC = b"zenray-tokens-1\n"


@dataclass(frozen=True)
class TokenShards:
    """Where the tokens of a run's text files are. `files`: of each domain that has files, those in their order.

    May be pickled; holds no secret.
    """

    filesystem: FileSystem
    folder: str
    files: dict[str, tuple[FileEntry, ...]]

    def has(self, source: DataSource) -> bool:
        return source.domain in self.files

    def documents(self, source: DataSource) -> Iterator[np.ndarray]:
        """The tokens of each document, as `tokens.encoded` gives them."""
        for file in self.files[source.domain]:
            yield from read_shard(self.filesystem, shard_path(self.folder, file.sha256))


def tokenise_on_cluster(
    data: TrainingData, tokenizer_file: Path, end_token: int, filesystem: FileSystem, folder: str
) -> TokenShards:
    """Make the tokens of all text files of `data` in `folder`, those which are not there yet. Blocks; needs Ray.

    Idempotent. Files of a domain keep their order; which machine reads which does not matter.
    """
    import ray.data

    tokenizer_json = tokenizer_file.read_bytes()
    about = f"{hashlib.sha256(tokenizer_json).hexdigest()}-{end_token}"
    folder = f"{folder}/{hashlib.sha256(about.encode()).hexdigest()[:24]}"
    sources = [source for source in data.sources if source.path is not None]
    found = {source.domain: source_files(source) for source in sources}
    rows = [
        {"domain": domain, "place": place, "file": file}
        for domain, files in found.items()
        for place, file in enumerate(files)
    ]
    tokenizer = ray.put(tokenizer_json)

    def make(row: dict[str, Any]) -> dict[str, Any]:
        entry = make_shard(row["file"], ray.get(tokenizer), end_token, filesystem, folder)
        return {"domain": row["domain"], "place": row["place"], **entry.model_dump()}

    made: dict[str, dict[int, FileEntry]] = {domain: {} for domain in found}
    if rows:
        for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(make).iter_rows():
            entry = FileEntry(path=row["path"], size_bytes=row["size_bytes"], sha256=row["sha256"])
            made[row["domain"]][row["place"]] = entry
    files = {domain: tuple(places[place] for place in sorted(places)) for domain, places in made.items()}
    return TokenShards(filesystem, folder, files)


def make_shard(file: TextFile, tokenizer_json: bytes, end_token: int, filesystem: FileSystem, folder: str) -> FileEntry:
    """Tokenise one file into its shard, unless that is there; what the file is. A shard appears whole."""
    from zenray.training.data.tokens import encoded

    entry = file.entry()
    path = shard_path(folder, entry.sha256)
    if filesystem.get_file_info(path).type == FileType.File:
        return entry
    documents = encoded(file.documents(), _tokenizer(tokenizer_json), end_token)
    filesystem.create_dir(folder, recursive=True)
    with tempfile.TemporaryFile() as scratch:  # the lengths go first, and are known last
        lengths = []
        dtype = np.dtype(np.uint16)
        for document in documents:
            dtype = document.dtype
            scratch.write(document.data)
            lengths.append(len(document))
        scratch.seek(0)
        unfinished = f"{path}.{np.random.default_rng().integers(1 << 62)}"
        with filesystem.open_output_stream(unfinished) as sink:
            sink.write(_MAGIC + np.array([len(lengths), dtype.itemsize], dtype="<i8").tobytes())
            sink.write(np.array(lengths, dtype="<i8").tobytes())
            while chunk := scratch.read(8 << 20):
                sink.write(chunk)
    filesystem.move(unfinished, path)
    return entry


def read_shard(filesystem: FileSystem, path: str) -> Iterator[np.ndarray]:
    """The tokens of each of its documents."""
    with filesystem.open_input_stream(path) as file:
        head = file.read(len(_MAGIC) + 16)
        count, width = np.frombuffer(head[len(_MAGIC) :], dtype="<i8")
        lengths = np.frombuffer(file.read(int(count) * 8), dtype="<i8")
        dtype = np.dtype(f"<u{width}")
        for length in lengths:
            yield np.frombuffer(file.read(int(length) * int(width)), dtype=dtype)


def shard_path(folder: str, digest: str) -> str:
    return f"{folder}/{digest}.tokens"


@lru_cache(maxsize=1)
def _tokenizer(tokenizer_json: bytes) -> Tokenizer:
    return Tokenizer.from_buffer(tokenizer_json)
