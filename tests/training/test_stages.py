"""What a worker keeps of a network: its stage's layers and its rank's experts, the same as in the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.training.tiny import CONFIG, write_version
from zenray.catalog.catalog import Catalog
from zenray.model.config import ExpertGroup, MoDEConfig
from zenray.model.network import MoDE
from zenray.spec.errors import InvalidValue
from zenray.spec.jobs import load_job
from zenray.spec.parallelism import Axes, check_axes
from zenray.spec.training import PretrainJob
from zenray.training.mesh import Mesh
from zenray.training.networks import Checkpoint
from zenray.training.stages import check_stages, keep_stage, layers_of
from zenray.training.trainable import bank_sizes, named_tensors
from zenray.training.worker import keep_share

ROOT = Path(__file__).parents[2]
FIVE = replace(CONFIG, num_hidden_layers=5, sparse_layers=(1, 3, 4))
DENSE_PARTS = ("dense", "routers", "experts")


@dataclass(frozen=True)
class Stage(Mesh):
    """A worker of some stage, without the others."""

    number: int = 0

    @property
    def stage(self) -> int:
        return self.number


@dataclass(frozen=True)
class Rank(Mesh):
    """A worker of some expert group, without the others."""

    number: int = 0

    @property
    def expert_rank(self) -> int:
        return self.number


def stages_of(count: int) -> Iterator[Stage]:
    return (Stage(stages=count, number=number) for number in range(count))


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_every_layer_is_in_one_stage(stages: int) -> None:
    found = [layers_of(stage, 5, stages) for stage in range(stages)]
    assert [layer for mine in found for layer in mine] == list(range(5))
    assert all(mine for mine in found)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_are_parts_of_the_whole_network(tmp_path: Path, tied: bool, stages: int) -> None:
    checkpoint = Checkpoint.open(write_version(tmp_path / "v0", replace(FIVE, tie_word_embeddings=tied)))
    for whole, make in (
        (checkpoint.network(), checkpoint.network),
        (checkpoint.fresh_network(7), partial(checkpoint.fresh_network, 7)),
    ):
        expected, seen = named_tensors(whole), set()
        for mesh in stages_of(stages):
            part = named_tensors(make(keep=partial(keep_stage, mesh=mesh)))
            assert all(torch.equal(tensor, expected[name]) for name, tensor in part.items())
            ends = {name for name in part if "layers" not in name}
            assert ("model.embed_tokens.weight" in ends) == (mesh.stage == 0 or (tied and mesh.is_last_stage))
            assert ("lm_head.weight" in ends) == (mesh.is_last_stage and not tied)
            assert not {name for name in seen & part.keys() if "layers" in name}, "a layer is on one stage alone"
            seen |= part.keys()
        assert seen == expected.keys()


def test_the_largest_recipes_stages_are_taken() -> None:
    """jobs/zen-480b.yaml: data x pipeline x expert parallel, on the catalog's dimensions."""
    job = load_job(ROOT / "jobs" / "zen-480b.yaml")
    assert isinstance(job, PretrainJob)
    dimensions = Catalog.load().get(job.base.model).dimensions
    assert dimensions is not None
    config = replace(CONFIG, num_hidden_layers=dimensions.layers, sparse_layers=tuple(sorted(dimensions.sparse_layers)))
    check_stages(config, job.train, job.workers.pipeline_parallel)
    check_axes(job.workers.count, job.workers.axes)
    assert job.workers.axes == Axes(pipeline=8, expert=32)
    assert job.workers.axes.replicas(job.workers.count) == 2 and job.workers.fully_sharded


@pytest.mark.parametrize("widths", [(24,) * 5, (24, 24, 24, 16, 16)])
def test_ranks_of_an_expert_group_read_their_experts_alone(tmp_path: Path, widths: tuple[int, ...]) -> None:
    """Also a rank without any: five experts over four ranks are two, two, one and none."""
    groups = tuple(ExpertGroup(f"g{width}", widths.count(width), width) for width in sorted(set(widths), reverse=True))
    checkpoint = Checkpoint.open(write_version(tmp_path / "v0", replace(CONFIG, expert_groups=groups)))
    for whole, make in (
        (checkpoint.network(), checkpoint.network),
        (checkpoint.fresh_network(7), partial(checkpoint.fresh_network, 7)),
    ):
        expected = named_tensors(whole)
        ranks = [make(keep=partial(keep_share, mesh=Rank(expert_size=4, number=number))) for number in range(4)]
        shares = [named_tensors(model) for model in ranks]
        for name, tensor in expected.items():
            parts = [share[name] for share in shares]
            if "experts" in name:
                assert torch.equal(torch.cat(parts), tensor)
            else:
                assert all(torch.equal(part, tensor) for part in parts)
        assert all(bank_sizes(model) == bank_sizes(whole) for model in ranks)


def test_a_stage_is_kept_once() -> None:
    model = MoDE(FIVE)
    mesh = Stage(stages=2, number=1)
    keep_stage(model, mesh)
    before = set(named_tensors(model))
    keep_stage(model, mesh)
    assert set(named_tensors(model)) == before and len(model.model.layers) == 2


@pytest.mark.parametrize(
    ("config", "train", "stages", "said"),
    [
        (FIVE, DENSE_PARTS, 6, "5 layers cannot be shared by 6 pipeline stages"),
        (FIVE, ("experts",), 5, "Stage 1 of 5 would have layers 0 to 0 alone"),
        (replace(FIVE, sparse_layers=(0, 1)), ("routers",), 2, "Stage 2 of 2 would have layers 3 to 4"),
    ],
)
def test_stages_without_layers_or_anything_to_learn_are_refused(
    config: MoDEConfig, train: tuple[str, ...], stages: int, said: str
) -> None:
    with pytest.raises(InvalidValue, match=said) as refused:
        check_stages(config, train, stages)
    assert refused.value.param == "pipeline_parallel" and refused.value.hint


@pytest.mark.parametrize(("train", "stages"), [(DENSE_PARTS, 5), (("experts/code",), 2), (("experts",), 1)])
def test_other_stages_are_taken(train: tuple[str, ...], stages: int) -> None:
    check_stages(FIVE, train, stages)
