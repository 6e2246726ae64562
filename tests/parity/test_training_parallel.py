"""Parallel training is the same computation: outputs, gradients, norms and weights of 1, 2 and 4 gloo ranks, expert
parallel and fully sharded, equal those of one process, with tokens that do not divide evenly and gradients of two
passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.parity.training_ranks import (
    CASES,
    LAYOUTS,
    RESHARDED,
    Found,
    Layout,
    cases_of,
    check_ratio,
    make_trainer,
    run_case,
    spawn,
    whole,
)
from zenray.training.checkpointing import difference, load, read_weight, save

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]  # the first question to four ranks runs all their cases

RATIO = 1e-5
HALF_RATIO = 5e-3  # bfloat16 has 8 bits, and adds up other parts of the batch on other layouts
KEYS = [(name, world, layout) for world, some in LAYOUTS.items() for layout in some for name in cases_of(world, layout)]


def label(value: object) -> str:
    return f"ep{value[0]}{'-sharded' * value[1]}" if isinstance(value, tuple) else str(value)


RanksOf = Callable[[str, int, Layout], list[Found]]
every_layout = pytest.mark.parametrize(("name", "world", "layout"), KEYS, ids=label)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("chain")
    return [folder / name for name in ("fsdp2", "ep2", "ep1", "ep4", "fsdp4-ep2", "ep2-again", "fsdp4")]


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory, chain: list[Path]) -> RanksOf:
    """What the ranks found in a case; all cases of a number of ranks are run at the first question."""
    folder = tmp_path_factory.mktemp("ranks")
    made = {1: (), 2: chain[:2], 4: chain[2:]}

    @cache
    def run(world: int) -> dict[tuple[str, Layout], list[Found]]:
        if world == 4:
            run(2)
            trainer = make_trainer(RESHARDED)
            save(trainer, load(trainer, chain[1]), chain[2])
        return spawn(world, folder / str(world), tuple(made[world]))

    return lambda name, world, layout: run(world)[name, layout]


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    return {name: run_case(case) for name, case in CASES.items()}


def tolerance(name: str) -> float:
    return HALF_RATIO if CASES[name].dtype == "bfloat16" else RATIO


@every_layout
def test_outputs(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    ranks = ranks_of(name, world, layout)
    for number, reference in enumerate(alone[name].outputs):
        outputs = torch.cat([one.outputs[number] for one in ranks])
        assert float((outputs - reference).norm() / reference.norm()) < 10 * tolerance(name)
        if CASES[name].dtype == "float32":
            torch.testing.assert_close(outputs, reference, rtol=1e-4, atol=1e-5)


@every_layout
def test_every_gradient(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    reference = alone[name].gradients
    ranks = ranks_of(name, world, layout)
    assert all(one.gradients.keys() == reference.keys() for one in ranks)
    for parameter, gradient in reference.items():
        check_ratio(parameter, whole(ranks, "gradients", parameter), gradient.values, tolerance(name))


@every_layout
def test_norms_and_losses(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    for one in ranks_of(name, world, layout):
        assert one.norms == pytest.approx(alone[name].norms, rel=tolerance(name))
        for value in ("loss", "lm_loss", "kl", "balance", "tokens", "entropy_ratios", "max_violations"):
            assert getattr(one.report, value) == pytest.approx(
                getattr(alone[name].report, value), rel=tolerance(name)
            ), value


@every_layout
def test_updated_weights_and_selection_biases(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    ranks = ranks_of(name, world, layout)
    # Adam divides by √v: where a gradient is nearly zero, its rounding moves the weight, by the learning rate at most.
    absolute = 2e-4 if CASES[name].optimizer == "adamw" else tolerance(name)
    for parameter, weight in alone[name].weights.items():
        torch.testing.assert_close(whole(ranks, "weights", parameter), weight.values, rtol=0, atol=absolute)
    for one in ranks:
        assert all(torch.equal(*pair) for pair in zip(one.loads, alone[name].loads, strict=True))


def test_what_is_recomputed_changes_nothing() -> None:
    found = [run_case(replace(CASES["clipped diverse"], recompute=what)) for what in ("none", "selective", "full")]
    for other in found[1:]:
        for name, gradient in found[0].gradients.items():
            assert torch.equal(gradient.values, other.gradients[name].values), name


def test_the_cases_test_something(alone) -> None:
    """Gradients reach all that learns and nothing else, clips bind, and empty experts are empty."""
    assert all(gradient.values.any() for gradient in alone["equal experts"].gradients.values())
    assert alone["diverse experts with a teacher"].report.kl > 0.01
    assert alone["teachers of two domains"].report.kl > 0.01
    for name in ("clipped", "clipped diverse", "one group learns"):
        squares = sum(float(gradient.values.double().square().sum()) for gradient in alone[name].gradients.values())
        assert math.sqrt(squares) == pytest.approx(min(0.5, alone[name].norms["total"]), rel=1e-4)
    clipped, free = alone["clipped"].norms, alone["equal experts"].norms
    assert clipped["expert"] < 0.5 * free["expert"] and clipped["dense"] == pytest.approx(free["dense"])
    for parameter, gradient in alone["empty experts"].gradients.items():
        if ".experts." in parameter:
            assert [bool(one.any()) for one in gradient.values] == [number not in (0, 1, 6) for number in range(8)]
    group = alone["one group learns"]
    before = dict(make_trainer(CASES["one group learns"]).model.named_parameters())
    for parameter, weight in group.weights.items():
        same = [bool(torch.equal(*pair)) for pair in zip(weight.values, before[parameter], strict=True)]
        if ".experts." in parameter:
            assert same == [True] * 5 + [False] * 3
        elif not parameter.endswith("mlp.gate.weight"):
            assert all(same), parameter


def test_a_checkpoint_does_not_know_its_layout(ranks_of: RanksOf, chain: list[Path]) -> None:
    """FSDP 2 → EP 2 → one process → EP 4 → FSDP 4 × EP 2 → EP 2 → FSDP 4: weights and both moments, bit for bit."""
    ranks_of("clipped diverse", 4, Layout(2, True))
    for later in chain[1:]:
        assert difference(chain[0], later) == []
    trainer = make_trainer(RESHARDED)
    assert load(trainer, chain[-1]) == 2
    for one in trainer.trainables:
        state = trainer.optimizer.state[one.master]
        assert int(state["step"]) == 2 and state["exp_avg"].any() and state["exp_avg_sq"].any()
        assert torch.equal(read_weight(chain[4], one.name), one.master)


def test_a_difference_is_found(ranks_of: RanksOf, chain: list[Path], tmp_path: Path) -> None:
    ranks_of("clipped diverse", 2, Layout(2, True))
    trainer = make_trainer(RESHARDED)
    load(trainer, chain[0])
    state = trainer.optimizer.state[trainer.trainables[3].master]
    state["exp_avg"].view(-1)[0] += 1
    save(trainer, 2, tmp_path / "changed")
    assert difference(chain[0], tmp_path / "changed") == [f"moments.exp_avg.{trainer.trainables[3].name}"]
