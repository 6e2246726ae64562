"""Tensors in safetensors files, read and written one at a time, so that a checkpoint need never be in memory whole."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from zenray.model.checkpoints.source import INDEX_NAME, SINGLE_NAME
from zenray.spec.errors import CorruptData, InvalidValue, NotFound, suggest

DTYPE_CODES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
STORED_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class TensorPlan:
    """One tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFolder:
    """The tensors of a checkpoint folder, whole or sharded, read one by one. Keeps no file open or mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / INDEX_NAME
        if index.is_file():
            self._file_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif (folder / SINGLE_NAME).is_file():
            with safe_open(folder / SINGLE_NAME, framework="pt") as file:
                self._file_of = dict.fromkeys(file.keys(), SINGLE_NAME)
        else:
            found = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
            raise NotFound(
                f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}.",
                hint=f"It has: {', '.join(found[:20])}." if found else "It has no files.",
            )

    @property
    def names(self) -> list[str]:
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, name: str, row: int | slice | None = None) -> Tensor:
        """One tensor, or one row or some of its first axis, as a copy in memory. NotFound, CorruptData."""
        with self._open(name) as file:
            tensor = file.get_tensor(name) if row is None else file.get_slice(name)[row]
            return tensor.clone()

    def plan(self, name: str) -> TensorPlan:
        """Shape and dtype of a tensor, without reading it. NotFound, CorruptData."""
        with self._open(name) as file:
            part = file.get_slice(name)
            return TensorPlan(name, tuple(part.get_shape()), STORED_DTYPES[part.get_dtype()])

    def _open(self, name: str):  # type: ignore[no-untyped-def]
        if name not in self._file_of:
            raise NotFound(f"{self.folder} has no tensor {name!r}.", hint=suggest(name, self._file_of, most=5))
        path = self.folder / self._file_of[name]
        try:
            return safe_open(path, framework="pt")
        except Exception as error:
            raise CorruptData(f"{path} is not a sound safetensors file: {error}") from error


class TensorWriter:
    """Writes planned tensors, in the planned order, into one file or into shards of at most `shard_bytes`.

    Files get their names at the end, when the disk has them whole: after an error none of them is there.
    Deterministic, byte for byte. One tensor larger than `shard_bytes` gets a shard to itself.

    A thread writes and waits for the disk while the caller makes what comes next. It is at most `AHEAD_BYTES` behind,
    or one tensor where that is larger; tensors must not be changed once they are given.
    """

    AHEAD_BYTES = 64 << 20

    def __init__(self, folder: Path, plans: Iterable[TensorPlan], *, shard_bytes: int = 5_000_000_000) -> None:
        self._folder = folder
        self._shards = _plan_shards(list(plans), shard_bytes)
        self._names = _shard_names(len(self._shards))
        self._queue = [(plan, shard) for shard, plans_of in enumerate(self._shards) for plan in plans_of]
        self._next = 0
        self._file: BinaryIO | None = None
        self._open_shard = -1
        self._unsynced_bytes = 0
        self._thread = ThreadPoolExecutor(1, "tensor-writer")
        self._behind: deque[tuple[Future[None], int]] = deque()

    @property
    def total_bytes(self) -> int:
        return sum(plan.size_bytes for plan, _ in self._queue)

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor. InvalidValue unless it is the planned one, in the planned shape and dtype."""
        plan, shard = self._queue[self._next] if self._next < len(self._queue) else (None, -1)
        found = TensorPlan(name, tuple(tensor.shape), tensor.dtype)
        if found != plan:
            raise InvalidValue(f"Tensor {found} was written where {plan} was planned.")
        self._next += 1
        while self._behind and sum(size for _, size in self._behind) + plan.size_bytes > self.AHEAD_BYTES:
            self._behind.popleft()[0].result()
        self._behind.append((self._thread.submit(self._write, shard, tensor), plan.size_bytes))

    def _write(self, shard: int, tensor: Tensor) -> None:
        if shard != self._open_shard:
            self._begin(shard)
        assert self._file is not None
        self._file.write(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        self._unsynced_bytes += tensor.nbytes
        if self._unsynced_bytes >= self.AHEAD_BYTES // 4:
            self._sync()

    def __enter__(self) -> TensorWriter:
        self._folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        whole = False
        try:
            if kind is None:
                self._finish()
                whole = True
        finally:
            self._thread.shutdown(cancel_futures=True)
            if self._file is not None:
                self._file.close()
            if not whole:
                for shard in range(len(self._shards)):
                    self._partial(shard).unlink(missing_ok=True)

    def _finish(self) -> None:
        for written, _ in self._behind:
            written.result()
        missing = len(self._queue) - self._next
        if missing:
            raise InvalidValue(f"{missing} of {len(self._queue)} planned tensors were never written.")
        self._thread.submit(self._sync).result()
        for shard, name in enumerate(self._names):
            self._partial(shard).replace(self._folder / name)
        if len(self._shards) > 1:
            self._write_index()

    def _begin(self, shard: int) -> None:
        self._sync()
        if self._file is not None:
            self._file.close()
        self._file = self._partial(shard).open("wb")
        self._open_shard = shard
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for plan in self._shards[shard]:
            end = offset + plan.size_bytes
            code = DTYPE_CODES[plan.dtype]
            header[plan.name] = {"dtype": code, "shape": list(plan.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the data starts at a multiple of 8
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _sync(self) -> None:
        """Wait until the disk has what was written."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._unsynced_bytes = 0

    def _partial(self, shard: int) -> Path:
        return self._folder / f".{self._names[shard]}.partial"

    def _write_index(self) -> None:
        weight_map = {plan.name: self._names[shard] for plan, shard in self._queue}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self._folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _plan_shards(plans: list[TensorPlan], shard_bytes: int) -> list[list[TensorPlan]]:
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        if shards[-1] and size + plan.size_bytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += plan.size_bytes
    return shards


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_NAME]
    return [f"model-{shard:05}-of-{count:05}.safetensors" for shard in range(1, count + 1)]
