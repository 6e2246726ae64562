"""Checkpoints read where they lie, in ranges: a worker's own part of a state, or one tensor of it, and nothing else."""

from __future__ import annotations

import io
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

from pyarrow.fs import FileSystem, FileType, LocalFileSystem
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import FileSystemBase
from torch.distributed.checkpoint.metadata import Metadata

Place = str | os.PathLike[str]


class StoredCheckpoint:
    """A torch distributed checkpoint below `folder` of a file system, and what else lies there. Nothing is read yet."""

    def __init__(self, filesystem: FileSystem, folder: str) -> None:
        self._filesystem, self._folder = filesystem, folder

    @classmethod
    def at(cls, place: StoredCheckpoint | Path) -> StoredCheckpoint:
        return place if isinstance(place, StoredCheckpoint) else cls(LocalFileSystem(), str(place.absolute()))

    def __str__(self) -> str:
        return self._folder

    def read_bytes(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(f"{self._folder}/{name}") as file:
            return cast(bytes, file.read())

    @cached_property
    def metadata(self) -> Metadata:
        """Read once: it is long, and needed for every tensor."""
        return _Reader(self._filesystem, self._folder).read_metadata()

    def reader(self) -> FileSystemReader:
        """For `torch.distributed.checkpoint.load`, on this worker."""
        return _Reader(self._filesystem, self._folder, self)


class _Reader(FileSystemReader):
    """Reads each piece of a state by one request for its range: torch's own reading of it would be dozens."""

    def __init__(self, filesystem: FileSystem, folder: str, checkpoint: StoredCheckpoint | None = None) -> None:
        super().__init__(folder)
        self.fs, self.path = _Files(filesystem), folder
        self._checkpoint = checkpoint

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return super().read_metadata(*args, **kwargs) if self._checkpoint is None else self._checkpoint.metadata

    def _slice_file(self, file: Any, sinfo: Any) -> IO[bytes]:
        return io.BytesIO(file.read_at(sinfo.length, sinfo.offset))


class _Files(FileSystemBase):
    """A pyarrow file system as torch asks for one, as far as reading needs it."""

    def __init__(self, filesystem: FileSystem) -> None:
        self._filesystem = filesystem

    @contextmanager
    def create_stream(self, path: Place, mode: str) -> Generator[Any, None, None]:
        assert mode == "rb"
        with self._filesystem.open_input_file(str(path)) as file:
            yield file

    def concat_path(self, path: Place, suffix: str) -> str:
        return f"{path}/{suffix}"

    def exists(self, path: Place) -> bool:
        return bool(self._filesystem.get_file_info(str(path)).type != FileType.NotFound)

    def init_path(self, path: Place) -> Place:
        return path

    def rename(self, path: Place, new_path: Place) -> None:
        raise NotImplementedError

    def mkdir(self, path: Place) -> None:
        raise NotImplementedError

    def rm_file(self, path: Place) -> None:
        raise NotImplementedError

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Place) -> bool:
        return True
