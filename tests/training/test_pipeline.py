"""A stage's passes, as the schedule orders them: what is told of each, and what comes out when one fails."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from zenray.spec.errors import UpstreamFailed
from zenray.training.data.stream import Batch
from zenray.training.mesh import Mesh
from zenray.training.pipeline import Pipeline


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    """Of one stage, which is the first and the last."""
    dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    yield Pipeline(Mesh.create(), 8, torch.float32)
    dist.destroy_process_group()


def batch(length: int = 4) -> Batch:
    return Batch(*(torch.zeros(2, length, dtype=torch.int64) for _ in range(5)))


class Told:
    """Passes that note what happens to them."""

    def __init__(self, batches: list[Batch], fails_at: int | None = None) -> None:
        self.batches, self.fails_at = batches, fails_at
        self.events: list[str] = []
        self.weight = torch.ones((), requires_grad=True)

    def forward(self, number: int, x_BSD: Tensor | None = None) -> Tensor:
        if number == self.fails_at:
            raise UpstreamFailed("The teacher is away.")
        self.events.append(f"forward {number}")
        return self.weight * (number + 1)

    def before_backward(self, is_last: bool) -> None:
        self.events.append("last backward" if is_last else "backward")

    def after_backward(self) -> None:
        self.events.append(f"gradient {float(self.weight.grad):g}")  # type: ignore[arg-type]


def test_every_pass_goes_forward_and_back_and_nothing_is_averaged(pipeline: Pipeline) -> None:
    for _ in range(2):  # the second step uses what the first one set up
        passes = Told([batch()] * 3)
        pipeline.train(passes)
        there_and_back = zip(range(3), (1, 3, 6), strict=True)
        assert passes.events == [
            event
            for number, total in there_and_back
            for event in (f"forward {number}", "last " * (number == 2) + "backward", f"gradient {total}")
        ]


def test_an_evaluation_takes_its_passes_in_order_however_many(pipeline: Pipeline) -> None:
    passes = Told([batch()] * 11)
    with torch.no_grad():
        pipeline.evaluate(passes)
    assert passes.events == [f"forward {number}" for number in range(11)]
    assert pipeline.waited_s >= 0


def test_what_a_pass_raised_comes_out_as_it_was_and_the_next_step_works(pipeline: Pipeline) -> None:
    with pytest.raises(UpstreamFailed, match="The teacher is away"):
        pipeline.train(Told([batch()] * 2, fails_at=1))
    passes = Told([batch()] * 2)
    pipeline.train(passes)
    assert passes.events[-1] == "gradient 3"


def test_passes_of_several_shapes_are_refused(pipeline: Pipeline) -> None:
    with pytest.raises(ValueError, match="one shape"):
        pipeline.train(Told([batch(4), batch(8)]))
