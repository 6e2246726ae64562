"""AdamW with moments in 8 bits: near float32's, a quarter of its memory, and the same after any resharding."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.parity.training_ranks import BASE, Case, batches_of, make_trainer
from zenray.model.config import ExpertGroup
from zenray.training.checkpointing import difference, load, save
from zenray.training.mesh import Mesh
from zenray.training.trainer import Trainer

pytestmark = pytest.mark.parity

SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.1}
CONFIG = replace(
    BASE,
    hidden_size=256,
    num_hidden_layers=2,
    sparse_layers=(1,),
    expert_groups=(ExpertGroup("general", 3, 256), ExpertGroup("code", 2, 256)),
    initializer_range=0.05,
)
EIGHT = Case(CONFIG, {**SETTINGS, "optimizer": "adamw-8bit"}, optimizer="adamw-8bit")
FLOAT = Case(CONFIG, SETTINGS, optimizer="adamw")


def state_bytes(trainer: Trainer) -> int:
    values = [value for state in trainer.optimizer.state.values() for value in state.values()]
    once: dict[int, Any] = {one.data_ptr(): one for one in values if isinstance(one, torch.Tensor)}
    return sum(one.nbytes for one in once.values())


def test_moments_in_eight_bits_train_nearly_as_those_in_float32() -> None:
    losses, sizes = {}, {}
    for name, case in {"8-bit": EIGHT, "float32": FLOAT}.items():
        trainer = make_trainer(case)
        losses[name] = [trainer.step(0, batches_of(0, 1, 0)).lm_loss for _ in range(12)]
        sizes[name] = state_bytes(trainer)
    assert losses["8-bit"][0] == losses["float32"][0]
    fallen = losses["float32"][0] - losses["float32"][-1]
    assert fallen > 0.5
    assert losses["8-bit"][-1] == pytest.approx(losses["float32"][-1], abs=0.05 * fallen)
    assert sizes["8-bit"] < 0.3 * sizes["float32"]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = make_trainer(EIGHT)
    for step in range(2):
        whole.step(step, batches_of(0, 1, step))
    save(whole, 2, tmp_path / "two")
    resumed = make_trainer(EIGHT)
    assert load(resumed, tmp_path / "two") == 2
    for trainer, name in ((whole, "whole"), (resumed, "resumed")):
        trainer.step(2, batches_of(0, 1, 2))
        save(trainer, 3, tmp_path / name)
    assert difference(tmp_path / "whole", tmp_path / "resumed") == []
    assert difference(tmp_path / "two", tmp_path / "whole") != []


def test_codes_and_scales_reshard_bit_for_bit(tmp_path: Path) -> None:
    trainer = make_trainer(EIGHT)
    trainer.step(0, batches_of(0, 1, 0))
    save(trainer, 1, tmp_path / "one")
    multiprocessing.spawn(_rank_main, args=(str(tmp_path),), nprocs=2)
    for layout in ("ep2", "fsdp2"):
        assert difference(tmp_path / "one", tmp_path / layout) == []


def _rank_main(rank: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    for name, mesh in {"ep2": Mesh.create(2), "fsdp2": Mesh.create(1, fully_sharded=True)}.items():
        trainer = make_trainer(EIGHT, mesh)
        save(trainer, load(trainer, Path(folder, "one")), Path(folder, name))
    dist.destroy_process_group()
