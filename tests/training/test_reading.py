"""What is read of a checkpoint that lies elsewhere: the ranges that are asked for, each in one request."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.fs
import torch

from tests.training.tiny import FolderRecorder, job
from zenray.training.checkpointing import load, read_weight, weight_shapes
from zenray.training.loop import TrainingSet, train
from zenray.training.reading import StoredCheckpoint
from zenray.training.trainer import Trainer


class Counted:
    """A local file system that counts the bytes and the requests of each file that is read."""

    def __init__(self) -> None:
        self.real = pyarrow.fs.LocalFileSystem()
        self.bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()

    def open_input_file(self, path: str) -> Any:
        return CountedFile(self.real.open_input_file(path), Path(path).name, self)

    open_input_stream = open_input_file


class CountedFile:
    def __init__(self, file: Any, name: str, counts: Counted) -> None:
        self._file, self._name, self._counts = file, name, counts

    def __enter__(self) -> CountedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def _counted(self, data: bytes) -> bytes:
        self._counts.bytes[self._name] += len(data)
        self._counts.requests[self._name] += 1
        return data

    def read(self, *size: int) -> bytes:
        return self._counted(self._file.read(*size))

    def readline(self) -> bytes:
        return self._counted(self._file.readline())

    def read_at(self, length: int, offset: int) -> bytes:
        return self._counted(self._file.read_at(length, offset))


def test_a_tensor_is_one_request_and_a_state_is_its_own_bytes(base, tokens, text, tmp_path: Path) -> None:
    wanted = job(text)
    trainer = Trainer(base.network(), wanted)
    train(trainer, TrainingSet.open(wanted, tokens), FolderRecorder(tmp_path))
    folder = tmp_path / "step-00000006"
    files = Counted()
    checkpoint = StoredCheckpoint(files, str(folder))
    name = "model.norm.weight"
    assert weight_shapes(checkpoint)[name] == (16,) and not any("distcp" in read for read in files.bytes)
    assert torch.equal(read_weight(checkpoint, name), dict(trainer.model.named_parameters())[name])
    (data,) = (path for path in folder.iterdir() if path.suffix == ".distcp")
    assert files.requests[data.name] == 1 and files.bytes[data.name] < data.stat().st_size / 20
    metadata_reads = files.requests[".metadata"]

    again = Trainer(base.network(), wanted)
    assert load(again, checkpoint) == 6
    for one, other in zip(again.trainables, trainer.trainables, strict=True):
        assert torch.equal(one.master, other.master)
        for moment, value in trainer.optimizer.state[other.master].items():
            assert torch.equal(again.optimizer.state[one.master][moment], value)
    assert files.bytes[data.name] < 1.1 * data.stat().st_size
    assert files.requests[".metadata"] == metadata_reads, "read once"
