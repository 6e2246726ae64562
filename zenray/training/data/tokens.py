"""Tokens on disk: each domain's documents, tokenised once, ended by the end token, kept from then on as one array.

A document's fate (training or validation, and its place in the order) depends on the seed and its position alone.
Text and tokens are never in memory as a whole: what grows with a domain there is eight bytes for each document.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from pydantic import TypeAdapter
from tokenizers import Tokenizer

from zenray.spec.errors import InvalidValue
from zenray.spec.training import DataSource, TrainingData
from zenray.spec.versions import FileEntry
from zenray.training.data.documents import identity, read_documents, text_entries
from zenray.training.data.shards import TokenShards
from zenray.training.disk import raise_if_full

FORMAT = 1  # goes into the fingerprint: changed when the files' layout or the order changes
_BATCH = 256
_RAW = "raw"
_MORE_ROOM = "Free some space, or set the work folder to a larger disk."
_KNOWN = TypeAdapter(dict[str, FileEntry])


@dataclass(frozen=True)
class DomainTokens:
    """One part (training or validation) of one domain. `starts`: where each document begins, and where all end."""

    domain: str
    tokens: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class TokenFolder:
    """What `prepare` made. `identities`: of each domain's texts; `files`: those that it read."""

    folder: Path
    domains: tuple[str, ...]
    identities: dict[str, str]
    files: tuple[FileEntry, ...]

    def load(self, domain: str, part: str) -> DomainTokens:
        """`part`: "train" or "validation". Maps the file; reads nothing yet."""
        stem = self.folder / f"{self.domains.index(domain)}-{part}"
        tokens: np.ndarray = np.load(f"{stem}.tokens.npy", mmap_mode="r")
        return DomainTokens(domain, tokens, np.load(f"{stem}.starts.npy"))

    @property
    def counts(self) -> dict[str, int]:
        """Training tokens of each domain."""
        return {domain: len(self.load(domain, "train")) for domain in self.domains}


def prepare(
    data: TrainingData,
    tokenizer_file: Path,
    end_token: int,
    seed: int,
    cache: Path,
    shards: TokenShards | None = None,
) -> TokenFolder:
    """The tokens of `data`, made in `cache` unless they are there. Blocks; several processes may call it at once.

    StorageUnavailable where the disk is full.

    Idempotent: the folder's name is a digest of the texts, the tokenizer, the split and the seed. `shards`: tokens that
    the cluster has made of these texts already; the result is the same with and without.
    """
    cache.mkdir(parents=True, exist_ok=True)
    files = _text_files(data, cache, shards)
    texts = {source.domain: identity(source, files[source.domain]) for source in data.sources}
    about = {
        "format": FORMAT,
        "texts": texts,
        "tokenizer": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest(),
        "end_token": end_token,
        "validation_share": data.validation_share,
        "seed": seed,
    }
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:24]
    folder = cache / name
    made = TokenFolder(folder, tuple(texts), texts, tuple(chain.from_iterable(files.values())))
    with FileLock(cache / f"{name}.lock"):
        if folder.is_dir():
            return made
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=f"{name}-partial-"))
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
            dtype = token_dtype(tokenizer, end_token)
            for index, source in enumerate(data.sources):
                if shards and shards.has(source):
                    documents: Iterable[np.ndarray] = shards.documents(source)
                else:
                    documents = encoded(read_documents(source), tokenizer, end_token)
                _lay_out(source, documents, dtype, seed, data.validation_share, partial / str(index))
            (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, folder)
        except OSError as error:
            so_far_mb = sum(file.stat().st_size for file in partial.iterdir()) / 1e6
            takes = f"the tokens of {', '.join(texts)} take more than {so_far_mb:,.0f} MB"
            raise_if_full(error, cache, takes, _MORE_ROOM)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return made


def _text_files(data: TrainingData, cache: Path, shards: TokenShards | None) -> dict[str, tuple[FileEntry, ...]]:
    """Of each domain. One process of a machine reads them; others, and later ones, find what it found."""
    record = cache / "texts.json"
    with FileLock(cache / "texts.lock"):
        known = _KNOWN.validate_json(record.read_bytes()) if record.is_file() else {}
        before = len(known)
        found = {
            source.domain: shards.files[source.domain] if shards and shards.has(source) else text_entries(source, known)
            for source in data.sources
        }
        if len(known) > before:
            unfinished, listed = record.with_suffix(".unfinished"), _KNOWN.dump_json(known)
            try:
                unfinished.write_bytes(listed)
                os.replace(unfinished, record)
            except OSError as error:
                takes = f"the list of the files of text takes {len(listed) / 1e6:,.1f} MB"
                raise_if_full(error, cache, takes, _MORE_ROOM)
                raise
    return found


def token_dtype(tokenizer: Tokenizer, end_token: int) -> type[np.unsignedinteger]:
    """The smallest that holds every token."""
    return np.uint16 if max(tokenizer.get_vocab_size(), end_token + 1) <= 1 << 16 else np.uint32


def encoded(texts: Iterable[str], tokenizer: Tokenizer, end_token: int) -> Iterator[np.ndarray]:
    """Each document's tokens with the end token after them."""
    dtype, texts = token_dtype(tokenizer, end_token), iter(texts)
    while batch := list(islice(texts, _BATCH)):
        for one in tokenizer.encode_batch(batch, add_special_tokens=False):
            yield np.array([*one.ids, end_token], dtype=dtype)


def _lay_out(
    source: DataSource, documents: Iterable[np.ndarray], dtype: type, seed: int, validation: float, stem: Path
) -> None:
    """Write the documents as they come, then once more in the order of training, both parts."""
    lengths = array("q")
    raw = Path(f"{stem}.{_RAW}")
    with raw.open("wb") as file:
        for document in documents:
            file.write(document.astype(dtype, copy=False).data)
            lengths.append(len(document))
    order = np.random.default_rng(_number(seed, source.domain)).permutation(len(lengths))
    held_out = round(len(lengths) * validation)
    if held_out == len(lengths):
        raise InvalidValue(
            f"Domain {source.domain!r} has {len(lengths)} documents, of which {held_out} are held out.",
            hint="Add documents, or lower validation_share.",
        )
    begins = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    written = np.memmap(raw, dtype=dtype, mode="r")
    for part, chosen in (("validation", order[:held_out]), ("train", order[held_out:])):
        sizes = begins[chosen + 1] - begins[chosen]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        np.save(f"{stem}-{part}.starts.npy", starts)
        with open(f"{stem}-{part}.tokens.npy", "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (int(starts[-1]),)})
            for document in chosen:
                file.write(written[begins[document] : begins[document + 1]].data)
    del written
    raw.unlink()


def _number(seed: int, *path: str | int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()[:8], "little")
