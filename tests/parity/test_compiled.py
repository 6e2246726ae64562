"""A compiled network trains as an eager one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity.training_ranks import CASES, batches_of, job_of, make_trainer, network
from zenray.spec.errors import InvalidValue
from zenray.training.trainer import Trainer

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


def test_compiled_and_selective_are_refused_together() -> None:
    case = replace(CASES["adamw"], recompute="selective")
    with pytest.raises(InvalidValue, match="cannot recompute selectively"):
        Trainer(network(case.config, 1), _compiled(job_of(case)))


def _compiled(job):  # type: ignore[no-untyped-def]
    return job.model_copy(update={"workers": job.workers.model_copy(update={"compiled": True})})
