"""Workers that share sequences compute what one process does: outputs, every gradient, norms, balance losses, updated
weights and evaluations, with packed documents, local windows, teachers, and gradients of two passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch

from tests.parity.context_ranks import (
    CASES,
    LAYOUTS,
    PASSES,
    Found,
    Layout,
    assemble,
    batches_of,
    cases_of,
    run_case,
    spawn,
)
from tests.parity.training_ranks import check_ratio, find, make_trainer, whole

pytestmark = [pytest.mark.parity, pytest.mark.timeout(900)]

KEYS = [(name, world, layout) for world, some in LAYOUTS.items() for layout in some for name in cases_of(layout)]
RanksOf = Callable[[str, int, Layout], list[tuple[Found, float]]]
every_layout = pytest.mark.parametrize(("name", "world", "layout"), KEYS, ids=str)


def tolerance(name: str) -> float:
    return 5e-3 if CASES[name].dtype == "bfloat16" else 1e-5


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory: pytest.TempPathFactory) -> RanksOf:
    """What the ranks found in a case; all cases of a number of ranks are run at the first question."""
    folder = tmp_path_factory.mktemp("ranks")
    run = cache(lambda world: spawn(world, folder / str(world)))
    return lambda name, world, layout: run(world)[name, layout]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Found, float]]:
    return {name: run_case(name, tmp_path_factory.mktemp("answers")) for name in CASES}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What the case in half precision finds in full precision."""
    return find(make_trainer(replace(CASES["half precision"], dtype="float32")), [batches_of(0, 1)])


@every_layout
def test_outputs_and_evaluation(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    ranks = ranks_of(name, world, layout)
    for number in range(PASSES):
        reference = alone[name][0].outputs[number]
        outputs = assemble([one for one, _ in ranks], layout, number)
        assert float((outputs - reference).norm() / reference.norm()) < 10 * tolerance(name)
    assert [loss for _, loss in ranks] == pytest.approx([alone[name][1]] * world, rel=tolerance(name))


@every_layout
def test_every_gradient(ranks_of: RanksOf, alone, exact: Found, name: str, world: int, layout: Layout) -> None:
    ranks = [one for one, _ in ranks_of(name, world, layout)]
    reference = alone[name][0].gradients
    assert all(one.gradients.keys() == reference.keys() for one in ranks)
    if CASES[name].dtype == "bfloat16":  # one process rounds too: several may be as far from the truth, not further
        for parameter, gradient in reference.items():
            truth, shared = exact.gradients[parameter].values, whole(ranks, "gradients", parameter)
            assert distance(shared, truth) < 2 * distance(gradient.values, truth) + 5e-3, parameter
        return
    for parameter, gradient in reference.items():
        check_ratio(parameter, whole(ranks, "gradients", parameter), gradient.values, tolerance(name))


def distance(one: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative to the reference's length."""
    return float((one.double() - reference.double()).norm() / reference.double().norm())


@every_layout
def test_norms_losses_and_updated_weights(ranks_of: RanksOf, alone, name: str, world: int, layout: Layout) -> None:
    ranks = [one for one, _ in ranks_of(name, world, layout)]
    reference = alone[name][0]
    for one in ranks:
        assert one.norms == pytest.approx(reference.norms, rel=tolerance(name))
        for value in ("loss", "lm_loss", "kl", "balance", "tokens", "entropy_ratios", "max_violations"):
            assert getattr(one.report, value) == pytest.approx(getattr(reference.report, value), rel=tolerance(name)), (
                value
            )
        assert all(torch.equal(*pair) for pair in zip(one.loads, reference.loads, strict=True))
    for parameter, weight in reference.weights.items():
        torch.testing.assert_close(whole(ranks, "weights", parameter), weight.values, rtol=0, atol=tolerance(name))


def test_the_cases_test_something(alone) -> None:
    assert alone["clipped diverse with a teacher"][0].report.kl > 0.01
    assert alone["a teacher whose answers are kept"][0].report.kl > 0.01
    assert all(found.report.balance > 0.01 for found, _ in alone.values())
