"""What the catalog says a training worker holds, against what it holds: exactly, but for activations within a tenth."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.parity.training_ranks import BASE, DIVERSE
from zenray.catalog.plan import layout_of, settings_of
from zenray.catalog.training_memory import (
    Settings,
    Teacher,
    layer_activations,
    stage_weights,
    step_memory,
)
from zenray.model import experts
from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig, uniform_experts
from zenray.model.grouped import swiglu_by_kernel
from zenray.model.network import MoDE
from zenray.spec.training import DistillJob, PretrainJob, TrainingJob
from zenray.training.context_parallel import part_of, share_sequences
from zenray.training.data.stream import Batch, pack
from zenray.training.layout import local_part
from zenray.training.loss import hidden_states
from zenray.training.mesh import Mesh
from zenray.training.stages import layers_of
from zenray.training.trainer import Trainer

pytestmark = pytest.mark.parity

WORLD, LENGTH, SEQUENCES, LAYERS = 8, 128, 4, 4
MIXTURE = MoDEConfig(
    vocab_size=2048,
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    qk_norm=True,
    sparse_layers=(1, 2, 3),
    expert_groups=uniform_experts(8, 192),
    router=RouterConfig(experts_per_token=2),
    shared_expert_width=64,
    shared_expert_gate=True,
    tie_word_embeddings=True,
)

BLOCKS = replace(
    MIXTURE,
    expert_groups=(
        *uniform_experts(8, 192),
        ExpertGroup("reason", 2, 128, "deep"),
        ExpertGroup("language", 1, 64, "vocabulary"),
        ExpertGroup("vision", 1, 64, "spatial"),
    ),
)
DENSE = replace(
    MIXTURE, sparse_layers=(), expert_groups=(), shared_expert_width=0, shared_expert_gate=False, attention_bias=True
)


def job(**changes: Any) -> TrainingJob:
    about: dict[str, Any] = {
        "kind": "distill" if "teachers" in changes else "pretrain",
        "name": "memory",
        "base": {"model": "base"},
        "into": {"model": "made", "version": "v1"},
        "data": {"sources": [{"domain": "prose", "builtin": "prose"}], "sequence_tokens": LENGTH},
        "steps": 4,
        "sequences_per_step": SEQUENCES,
        "sequences_per_pass": SEQUENCES,
        "optimisation": {"warmup_steps": 0},
        **changes,
    }
    return (DistillJob if "teachers" in changes else PretrainJob).model_validate(about)


def batch(vocabulary: int) -> Batch:
    numbers = np.random.default_rng(0)
    rows = [numbers.integers(0, vocabulary, LENGTH + 1) for _ in range(SEQUENCES)]
    return pack([(row, np.sort(numbers.integers(0, 2, LENGTH + 1))) for row in rows])


def every_layer(config: MoDEConfig) -> range:
    return range(config.num_hidden_layers)


class Watch(TorchDispatchMode):
    """Bytes of all storages that operations have made and nobody has let go of, and the most there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0

    def see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._sizes:
            return
        self._sizes[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def of_trainer(trainer: Trainer) -> list[torch.Tensor]:
    """Weights, masters and moments."""
    found = [local_part(parameter) for parameter in trainer.model.parameters()]
    for one in trainer.trainables:
        found += [one.master, *(value for name, value in trainer.optimizer.state[one.master].items() if name != "step")]
    return found


def nbytes(tensors: list[torch.Tensor]) -> int:
    """Each storage once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@pytest.mark.parametrize(
    "config", [BASE, DIVERSE, MIXTURE, BLOCKS, DENSE], ids=["equal", "diverse", "shared", "blocks", "dense"]
)
def test_the_weights_are_the_networks(config: MoDEConfig) -> None:
    counted = sorted(weight.shape for weight in stage_weights(config.dimensions(), every_layer(config)))
    assert counted == sorted(tuple(parameter.shape) for parameter in MoDE(config).parameters())


@pytest.mark.parametrize("train", [("dense", "routers", "experts"), ("experts",), ("routers", "dense")], ids="-".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [MIXTURE, BLOCKS], ids=["shared", "blocks"])
def test_weights_gradients_and_moments_of_one_worker_are_exact(
    config: MoDEConfig, dtype: str, train: tuple[str, ...]
) -> None:
    asked = job(dtype=dtype, train=train)
    trainer = Trainer(MoDE(config), asked)
    trainer.step(0, [batch(config.vocab_size)])
    layout = layout_of(asked)
    said = step_memory(config.dimensions(), every_layer(config), layout, settings_of(asked, layout)).backward_ends
    assert said.weights + said.moments == nbytes(of_trainer(trainer))
    assert said.gradients == sum(one.gradient.nbytes for one in trainer.trainables)


def test_moments_in_8_bits_are_exact() -> None:
    config = replace(MIXTURE, hidden_size=256, vocab_size=512)
    asked = job(optimisation={"optimizer": "adamw-8bit"})
    trainer = Trainer(MoDE(config), asked)
    layout = layout_of(asked)
    said = step_memory(config.dimensions(), every_layer(config), layout, settings_of(asked, layout)).loss
    states = [trainer.optimizer.state[one.master] for one in trainer.trainables]
    parts = [value for state in states for name, value in state.items() if name.startswith(("state", "absmax"))]
    assert any(part.dtype == torch.uint8 for part in parts)
    assert said.moments == nbytes(parts)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """A process group of eight in which nobody else is there: enough to cut weights, not to train."""
    dist.init_process_group("fake", rank=0, world_size=WORLD, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("config", [BASE, DIVERSE, MIXTURE], ids=["equal", "diverse", "shared"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("expert_parallel", [1, 2, 8])
@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
def test_what_the_fullest_of_eight_workers_holds_is_exact(
    group: None, config: MoDEConfig, dtype: str, expert_parallel: int, fully_sharded: bool
) -> None:
    workers = {"count": WORLD, "expert_parallel": expert_parallel, "fully_sharded": fully_sharded}
    asked = job(dtype=dtype, workers=workers, sequences_per_step=WORLD * SEQUENCES)
    trainer = Trainer(MoDE(config), asked, Mesh.create(expert_parallel, fully_sharded=fully_sharded))
    layout = layout_of(asked)
    said = step_memory(config.dimensions(), every_layer(config), layout, settings_of(asked, layout)).loss
    assert said.weights + said.moments == nbytes(of_trainer(trainer))  # the first worker's part is never the smaller


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("expert_parallel", [1, 2])
@pytest.mark.parametrize("fully_sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("config", [MIXTURE, replace(MIXTURE, tie_word_embeddings=True)], ids=["apart", "tied"])
def test_what_the_fullest_worker_of_every_stage_holds_is_exact(
    group: None,
    config: MoDEConfig,
    fully_sharded: bool,
    expert_parallel: int,
    stages: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = {
        "count": WORLD,
        "expert_parallel": expert_parallel,
        "fully_sharded": fully_sharded,
        "pipeline_parallel": stages,
    }
    asked = job(workers=workers, sequences_per_step=WORLD * SEQUENCES)
    layout = layout_of(asked)
    for stage in range(stages):
        monkeypatch.setattr(Mesh, "stage", stage)
        mesh = Mesh.create(expert_parallel, fully_sharded=fully_sharded, stages=stages)
        trainer = Trainer(MoDE(config), asked, mesh)
        layers = layers_of(stage, config.num_hidden_layers, stages)
        said = step_memory(config.dimensions(), layers, layout, settings_of(asked, layout)).loss
        assert said.weights + said.moments == nbytes(of_trainer(trainer))


@pytest.mark.parametrize("kernel", [False, True], ids=["loop", "kernel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [DENSE, MIXTURE, BLOCKS], ids=["dense", "mixture", "blocks"])
def test_activations_are_what_autograd_keeps(
    config: MoDEConfig, dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel:  # what a GPU runs
        monkeypatch.setattr(experts, "grouped_swiglu", _by_kernel)
    model = MoDE(config).to(dtype).train()
    settings = Settings(frozenset(), dtype == torch.bfloat16, "none", SEQUENCES, LENGTH, passes=1, gpu=kernel)
    said = sum(layer_activations(config.dimensions(), layer, settings) for layer in every_layer(config))
    assert said == pytest.approx(kept_bytes(model, batch(config.vocab_size)), rel=0.1)


@pytest.mark.parametrize("context", [2, 8])
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_activations_of_workers_that_share_sequences(group: None, config: MoDEConfig, context: int) -> None:
    model, mesh = MoDE(config).train(), Mesh.create(context_size=context)
    share_sequences(model, mesh)
    part = part_of(batch(config.vocab_size), mesh)
    settings = Settings(frozenset(), False, "none", SEQUENCES, LENGTH // context, passes=1, gpu=False, context=context)
    said = sum(layer_activations(config.dimensions(), layer, settings) for layer in every_layer(config))
    assert said == pytest.approx(kept_bytes(model, part), rel=0.1)


def kept_bytes(model: MoDE, asked: Batch) -> int:
    """What autograd keeps of a forward pass in which nothing is recomputed, without the weights."""
    model.model.gradient_checkpointing = False
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(model, asked)
    return sum(size for place, size in kept.items() if place not in weights)


def _by_kernel(x_RD: Any, gate_up: Any, down: Any, rows_E: Any, weight_R: Any = None) -> torch.Tensor:
    return swiglu_by_kernel(x_RD, gate_up, down, rows_E, weight_R.to(x_RD.dtype))


CASES = [
    ("float32", "none", 1, 0),
    ("float32", "full", 2, 0),
    ("float32", "selective", 1, 0),
    ("bfloat16", "none", 2, 0),
    ("bfloat16", "full", 1, 1),
]


@pytest.mark.parametrize(("dtype", "recomputed", "passes", "teachers"), CASES)
def test_the_fullest_moment_of_a_step(dtype: str, recomputed: str, passes: int, teachers: int) -> None:
    changes = {"teachers": [{"version": {"model": "teacher"}}]} if teachers else {}
    asked = job(dtype=dtype, activation_checkpointing=recomputed, sequences_per_step=passes * SEQUENCES, **changes)
    batches = [batch(MIXTURE.vocab_size) for _ in range(passes)]
    trainer = Trainer(MoDE(MIXTURE), asked, teachers=[(MoDE(MIXTURE), (1.0,))] * teachers)
    trainer.step(0, batches)
    trainer.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    watch = Watch()
    for tensor in [*of_trainer(trainer), *(p for teacher, _ in trainer.teachers for p in teacher.parameters())]:
        watch.see(tensor)
    with watch:
        trainer.step(1, batches)
    layout = layout_of(asked)
    others = [Teacher(MIXTURE.dimensions())] * teachers
    said = step_memory(
        MIXTURE.dimensions(), every_layer(MIXTURE), layout, settings_of(asked, layout), teachers=others
    ).fullest
    assert 0.9 < said.total / watch.most < 1.25, f"said {said}, and there were {watch.most}"
