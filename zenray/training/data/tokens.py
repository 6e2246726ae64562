"""Tokens on disk: each domain's documents, tokenised once, ended by the end token, kept from then on as one array.

A document's fate (training or validation, and its place in the order) depends on the seed and its position alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from filelock import FileLock
from tokenizers import Tokenizer

from zenray.spec.errors import InvalidValue
from zenray.spec.training import DataSource, TrainingData
from zenray.training.data.documents import identity, read_documents

FORMAT = 1  # goes into the fingerprint: changed when the files' layout or the order changes
_BATCH = 256


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
    """What `prepare` made. `identities`: of each domain's texts."""

    folder: Path
    domains: tuple[str, ...]
    identities: dict[str, str]

    def load(self, domain: str, part: str) -> DomainTokens:
        """`part`: "train" or "validation". Maps the file; reads nothing yet."""
        stem = self.folder / f"{self.domains.index(domain)}-{part}"
        tokens: np.ndarray = np.load(f"{stem}.tokens.npy", mmap_mode="r")
        return DomainTokens(domain, tokens, np.load(f"{stem}.starts.npy"))

    @property
    def counts(self) -> dict[str, int]:
        """Training tokens of each domain."""
        return {domain: len(self.load(domain, "train")) for domain in self.domains}


def prepare(data: TrainingData, tokenizer_file: Path, end_token: int, seed: int, cache: Path) -> TokenFolder:
    """The tokens of `data`, made in `cache` unless they are there. Blocks; several processes may call it at once.

    Idempotent: the folder's name is a digest of the texts, the tokenizer, the split and the seed.
    """
    texts = {source.domain: identity(source) for source in data.sources}
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
    made = TokenFolder(folder, tuple(texts), texts)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{name}.lock"):
        if folder.is_dir():
            return made
        partial = Path(tempfile.mkdtemp(dir=cache, prefix=f"{name}-partial-"))
        try:
            tokenizer = Tokenizer.from_file(str(tokenizer_file))
            for index, source in enumerate(data.sources):
                _tokenise(source, tokenizer, end_token, seed, data.validation_share, partial / str(index))
            (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return made


def _tokenise(source: DataSource, tokenizer: Tokenizer, end: int, seed: int, validation: float, stem: Path) -> None:
    largest = tokenizer.get_vocab_size()
    dtype = np.uint16 if max(largest, end + 1) <= 1 << 16 else np.uint32
    documents: list[np.ndarray] = []
    texts = read_documents(source)
    while batch := list(islice(texts, _BATCH)):
        encoded = tokenizer.encode_batch(batch, add_special_tokens=False)
        documents += [np.array([*one.ids, end], dtype=dtype) for one in encoded]
    order = np.random.default_rng(_number(seed, source.domain)).permutation(len(documents))
    held_out = round(len(documents) * validation)
    for part, chosen in (("validation", order[:held_out]), ("train", order[held_out:])):
        pieces = [documents[index] for index in chosen]
        tokens = np.concatenate(pieces) if pieces else np.empty(0, dtype)
        starts = np.cumsum([0, *(len(piece) for piece in pieces)])
        np.save(f"{stem}-{part}.tokens.npy", tokens)
        np.save(f"{stem}-{part}.starts.npy", starts)
    if held_out == len(documents):
        raise InvalidValue(
            f"Domain {source.domain!r} has {len(documents)} documents, of which {held_out} are held out.",
            hint="Add documents, or lower validation_share.",
        )


def _number(seed: int, *path: str | int) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, (seed, *path))).encode()).digest()[:8], "little")
