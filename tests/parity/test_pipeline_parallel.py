"""A pipeline is the same computation: losses, gradients, norms, weights and selection biases of stages on gloo ranks,
alone and with experts, replicas, cut weights and cut sequences within them, equal those of one process, with uneven
batches, several passes, and a head that is the embedding too."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.pipeline_ranks import CASES, CHAINED, LAYOUTS, RESHARDED, run_case, spawn
from tests.parity.training_ranks import Found, Layout, Part, check_ratio, make_trainer, whole
from zenray.training.checkpointing import difference, load, read_weight, save

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]  # the first question to four ranks runs all their cases

KEYS = [(name, world, layout) for world, some in LAYOUTS.items() for layout in some for name in some[layout]]
RanksOf = Callable[[str, int, Layout], list[Found]]
every_layout = pytest.mark.parametrize(("name", "world", "layout"), KEYS, ids=str)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def ranks_of(checkpoints: Path) -> RanksOf:
    """What the ranks found in a case; all cases of a number of ranks are run at the first question."""

    @cache
    def run(world: int) -> dict[tuple[str, Layout], list[Found]]:
        if world == 4:
            run(2)
            trainer = make_trainer(RESHARDED)
            save(trainer, load(trainer, checkpoints / "2" / "ep2"), checkpoints / "alone")
            return spawn(4, checkpoints / "4", checkpoints / "alone")
        return spawn(2, checkpoints / "2")

    return lambda name, world, layout: run(world)[name, layout]


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return {name: run_case(case) for name, case in CASES.items()}


def tolerance(name: str) -> float:
    return 5e-3 if CASES[name].dtype == "bfloat16" else 1e-5


def parts_of(ranks: list[Found], what: str) -> dict[str, torch.Tensor]:
    """Whole tensors by name, of all stages; where two stages have one, it must be equal."""
    names = {name for one in ranks for name in getattr(one, what)}
    return {name: whole([one for one in ranks if name in getattr(one, what)], what, name) for name in names}


@every_layout
def test_every_gradient(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    reference = alone[name].gradients
    found = parts_of(ranks_of(name, world, layout), "gradients")
    assert found.keys() == reference.keys()
    for parameter, gradient in reference.items():
        check_ratio(parameter, found[parameter], gradient.values, tolerance(name))


@every_layout
def test_losses_and_norms(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    ranks = ranks_of(name, world, layout)
    for one in ranks:
        assert [float(loss) for loss in one.outputs] == pytest.approx(
            [float(loss) for loss in alone[name].outputs], rel=tolerance(name)
        )
        assert one.norms == pytest.approx(alone[name].norms, rel=tolerance(name))
        assert one.report == ranks[0].report, "the reports of a step are the same on every worker, bit for bit"
        for value in ("loss", "lm_loss", "kl", "balance", "tokens", "entropy_ratios", "max_violations"):
            assert getattr(one.report, value) == pytest.approx(
                getattr(alone[name].report, value), rel=tolerance(name)
            ), value
        assert len(one.report.loads) == len(CASES[name].config.sparse_layers)


@every_layout
def test_updated_weights_and_selection_biases(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    ranks = ranks_of(name, world, layout)
    # Adam divides by √v: where a gradient is nearly zero, its rounding moves the weight, by the learning rate at most.
    absolute = 4e-4 if CASES[name].optimizer == "adamw" else tolerance(name)
    found = parts_of(ranks, "weights")
    assert found.keys() == alone[name].weights.keys()
    for parameter, weight in alone[name].weights.items():
        torch.testing.assert_close(found[parameter], weight.values, rtol=0, atol=absolute)
    of_stage = world // layout.stages
    biases = [bias for one in ranks[::of_stage] for bias in one.loads]
    assert len(biases) == len(alone[name].loads)
    assert all(torch.equal(*pair) for pair in zip(biases, alone[name].loads, strict=True))


def test_a_stage_holds_its_layers_alone(ranks_of: RanksOf) -> None:
    """The first stage has the embedding, the last the norm and the head, which tied is the embedding again."""
    for name, head in (("head apart", "lm_head"), ("tied head, clipped, with a teacher", "model.embed_tokens")):
        stages = [named_parts(one.weights) for one in ranks_of(name, 4, Layout(stages=4))]
        assert [sorted(part for part in stage if "layers" in part) for stage in stages] == [
            ["model.layers.0"],
            ["model.layers.1"],
            ["model.layers.2", "model.layers.3"],
            ["model.layers.4"],
        ]
        assert [sorted(part for part in stage if "layers" not in part) for stage in stages] == [
            ["model.embed_tokens"],
            [],
            [],
            sorted([head, "model.norm"]),
        ]


def named_parts(weights: dict[str, Part]) -> set[str]:
    return {".".join(name.split(".")[: 3 if "layers" in name else -1]) for name in weights}


def test_a_checkpoint_does_not_know_its_stages(ranks_of: RanksOf, checkpoints: Path) -> None:
    """PP 2 → EP 2 → one process → PP 2 × EP 2 → PP 4 → PP 2 sharded → PP 2 × EP 2 sharded: weights and moments, bit for
    bit. All of them have every weight of the network, so that any can be published."""
    ranks_of("head apart", 4, Layout(stages=4))
    first = checkpoints / "2" / str(CHAINED[2][0])
    later = [checkpoints / str(world) / str(layout) for world, some in CHAINED.items() for layout in some]
    for other in [checkpoints / "alone", *later[1:]]:
        assert difference(first, other) == []
    trainer = make_trainer(RESHARDED)
    assert load(trainer, later[-1]) == 2
    for one in trainer.trainables:
        state = trainer.optimizer.state[one.master]
        assert int(state["step"]) == 2 and state["exp_avg"].any() and state["exp_avg_sq"].any()
        assert torch.equal(read_weight(first, one.name), one.master)


def test_a_pipeline_goes_on_as_if_it_had_not_stopped(ranks_of: RanksOf, checkpoints: Path) -> None:
    ranks_of("head apart", 2, Layout(stages=2))
    assert difference(checkpoints / "2" / "went-on", checkpoints / "2" / "resumed") == []
    assert difference(checkpoints / "2" / "went-on", checkpoints / "2" / str(Layout(stages=2))) != []


def test_the_cases_test_something(alone) -> None:
    """Gradients reach all that learns, a teacher and balance losses count, and clips bind."""
    for name in ("head apart", "tied head, clipped, with a teacher"):
        assert all(gradient.values.any() for gradient in alone[name].gradients.values())
        assert alone[name].report.balance > 0.01
    taught = alone["tied head, clipped, with a teacher"]
    assert taught.report.kl > 0.01 and len(taught.outputs) == 5
    squares = sum(float(gradient.values.double().square().sum()) for gradient in taught.gradients.values())
    assert math.sqrt(squares) == pytest.approx(0.5, rel=1e-4) and taught.norms["total"] > 0.5
