"""Streamed safetensors files: equal to the library's, whole or absent."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from zenray.model.weights import TensorFolder, TensorPlan, TensorWriter
from zenray.spec.errors import CorruptData, InvalidValue, NotFound

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.randn(5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "c": torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).t(),  # not contiguous
}
PLANS = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]


@pytest.mark.parametrize("shard_bytes", [10**9, 40, 1])
def test_what_is_written_is_read_back(tmp_path, shard_bytes):
    with TensorWriter(tmp_path, PLANS, shard_bytes=shard_bytes) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    folder = TensorFolder(tmp_path)
    assert folder.names == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(folder.read(name), tensor)
        assert folder.plan(name) == TensorPlan(name, tuple(tensor.shape), tensor.dtype)
    assert torch.equal(folder.read("c", row=2), TENSORS["c"][2])
    assert not list(tmp_path.glob(".*"))
    if shard_bytes > 1000:
        loaded = load_file(tmp_path / "model.safetensors")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_out_of_order_or_wrong_shape_is_refused_and_nothing_is_left(tmp_path):
    for name, tensor in (("b", TENSORS["b"]), ("a", TENSORS["a"].t()), ("a", TENSORS["a"].double())):
        with pytest.raises(InvalidValue, match="was planned"), TensorWriter(tmp_path, PLANS) as writer:
            writer.write(name, tensor)
    with pytest.raises(InvalidValue, match="3 of 4 planned tensors"), TensorWriter(tmp_path, PLANS) as writer:
        writer.write("a", TENSORS["a"])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_of_though_another_thread_writes_and_nothing_is_left(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for ahead in (64 << 20, 8):  # found at the end, or while the next tensor is given
        monkeypatch.setattr(TensorWriter, "AHEAD_BYTES", ahead)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"), TensorWriter(tmp_path, PLANS) as writer:
                for name, tensor in TENSORS.items():
                    writer.write(name, tensor)
        assert not list(tmp_path.iterdir())


def test_a_writer_that_is_far_behind_holds_the_one_who_gives_and_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorWriter, "AHEAD_BYTES", 8)
    test_what_is_written_is_read_back(tmp_path, 10**9)


def test_what_is_missing_or_broken_says_so(tmp_path):
    with pytest.raises(NotFound, match="neither model"):
        TensorFolder(tmp_path)
    save_file({"weight": TENSORS["a"]}, tmp_path / "model.safetensors")
    folder = TensorFolder(tmp_path)
    with pytest.raises(NotFound, match="Did you mean 'weight'"):
        folder.read("weigth")
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptData, match="not a sound safetensors file"):
        folder.read("weight")
