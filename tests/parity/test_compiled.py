"""A compiled network trains as an eager one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.parity.training_ranks import CASES, Layout, batches_of, job_of, make_trainer, network, on_ranks
from zenray.spec.errors import InvalidValue
from zenray.training.trainer import StepReport, Trainer

pytestmark = pytest.mark.parity


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_layers_give_the_same_losses(recompute: str) -> None:
    case = replace(CASES["adamw"], recompute=recompute)
    eager = make_trainer(case)
    compiled = Trainer(network(case.config, 1), _compiled(job_of(case)))
    for step in range(3):
        expected = eager.step(step, batches_of(0, 1, step))
        found = compiled.step(step, batches_of(0, 1, step))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.gradient_norms == pytest.approx(expected.gradient_norms, rel=1e-4)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_compiled_layers_exchange_rows_as_eager_ones_do(tmp_path: Path) -> None:
    """Experts on two ranks: the exchange, in the middle of a layer, stays outside of what is compiled."""
    eager = make_trainer(CASES["adamw"])
    expected = [eager.step(step, batches_of(0, 1, step)) for step in range(2)]
    for ranks in on_ranks(_compiled_on_this_rank, 2, tmp_path / "ranks").values():
        for reports in ranks:
            for found, one in zip(reports, expected, strict=True):
                assert found.lm_loss == pytest.approx(one.lm_loss, rel=1e-5)


def _compiled_on_this_rank() -> dict[Layout, list[StepReport]]:
    rank, layout, case = dist.get_rank(), Layout(2), CASES["adamw"]
    trainer = Trainer(network(case.config, 1), _compiled(job_of(case)), layout.mesh())
    return {layout: [trainer.step(step, batches_of(rank, 2, step)) for step in range(2)]}


def test_compiled_and_selective_are_refused_together() -> None:
    case = replace(CASES["adamw"], recompute="selective")
    with pytest.raises(InvalidValue, match="cannot recompute selectively"):
        Trainer(network(case.config, 1), _compiled(job_of(case)))


def _compiled(job):  # type: ignore[no-untyped-def]
    return job.model_copy(update={"workers": job.workers.model_copy(update={"compiled": True})})
