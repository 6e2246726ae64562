"""Pipeline parallelism: neighbouring stages hold neighbouring layers, and the passes of a step flow through them.

By torch.distributed.pipelining, whose schedule decides when a stage computes which pass forward and back, and moves
hidden states and their gradients. A step's passes are its microbatches. Every stage reads the batches for itself, so
that only hidden states travel; the last one has the head and the loss. Balance losses are computed where their routers
are, from the counts of the whole step's passes so far, as without stages: passes go forward in order on every stage.

B sequences of a pass, S tokens of each, D hidden.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from zenray.spec.errors import ZenrayError
from zenray.training.data.stream import Batch
from zenray.training.mesh import Mesh
from zenray.training.passes import ForwardPasses, Passes

_EVALUATED_AT_ONCE = 4  # passes for each stage: torch keeps room for all that one schedule moves


class Pipeline:
    """This worker's stage of the pipeline. All its passes are of one shape; `dtype`: of hidden states."""

    def __init__(self, mesh: Mesh, hidden_size: int, dtype: torch.dtype) -> None:
        self._mesh, self._hidden_size, self._dtype = mesh, hidden_size, dtype
        self._kept: tuple[tuple[int, torch.Size], _Stage, Schedule1F1B | ScheduleGPipe] | None = None
        self.waited_s = 0.0  # for neighbouring stages, so far; on a GPU only for the host

    def train(self, passes: Passes) -> None:
        """All passes, forward and back. Collective over the pipeline: every stage has equally many.

        One forward, one backward pass (1F1B, arXiv 1806.03377): a stage keeps as many passes' activations as there are
        stages from it to the end, at most. With fewer passes than stages that is all forward, then all backward.
        """
        count, shape = len(passes.batches), _shape(passes.batches)
        if self._kept is None or self._kept[0] != (count, shape):
            stage = self._stage(shape)
            made = Schedule1F1B if count >= self._mesh.stages else ScheduleGPipe
            self._kept = ((count, shape), stage, made(stage, count, loss_fn=_as_it_is, scale_grads=False))
        _, stage, schedule = self._kept
        self._run(stage, schedule, passes, range(count))

    def evaluate(self, passes: ForwardPasses) -> None:
        """All passes forward. Collective over the pipeline."""
        count, shape = len(passes.batches), _shape(passes.batches)
        at_once = _EVALUATED_AT_ONCE * self._mesh.stages
        for first in range(0, count, at_once):
            numbers = range(first, min(first + at_once, count))
            stage = self._stage(shape)
            self._run(stage, ScheduleGPipe(stage, len(numbers)), passes, numbers)

    def _stage(self, shape: torch.Size) -> _Stage:
        moved = torch.empty(*shape, self._hidden_size, dtype=self._dtype, device="meta", requires_grad=True)
        mesh = self._mesh
        return _Stage(
            _Pass(),
            mesh.stage,
            mesh.stages,
            mesh.device,
            input_args=(moved,) if mesh.stage > 0 else (),
            output_args=(moved if not mesh.is_last_stage else torch.empty((), device="meta"),),
            group=mesh.pipeline_group,
        )

    def _run(
        self, stage: _Stage, schedule: Schedule1F1B | ScheduleGPipe, passes: ForwardPasses, numbers: range
    ) -> None:
        """The passes of these numbers. What a pass itself raised comes out as it was."""
        stage.pass_of_stage.passes = passes
        each = torch.arange(numbers.start, numbers.stop)  # the schedule cuts it up: a microbatch is known by its number
        try:
            schedule.step(target=each, return_outputs=False, number=each)
        except RuntimeError as error:
            self._kept = None  # it remembers losses of passes that did not come to an end
            if isinstance(error.__cause__, ZenrayError):
                raise error.__cause__ from None
            raise
        finally:
            stage.pass_of_stage.passes = None
            self.waited_s += stage.waited_s
            stage.waited_s = 0.0


def _shape(batches: Sequence[Batch]) -> torch.Size:
    """(B, S) of every batch. ValueError unless it is the same."""
    shapes = {batch.ids_BS.shape for batch in batches}
    if len(shapes) != 1:
        raise ValueError(f"passes of a pipeline are of one shape, and these are of {sorted(shapes)}")
    return shapes.pop()


def _as_it_is(loss: Tensor, number: Tensor) -> Tensor:
    return loss


class _Pass(nn.Module):
    """A stage's forward pass of one microbatch. Without parameters, so that torch leaves gradients to us: its own way
    with FSDP keeps all of a stage's weights gathered through the step."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: ForwardPasses | None = None

    def forward(self, x_BSD: Tensor | None = None, *, number: Tensor) -> Tensor:
        assert self.passes is not None
        return self.passes.forward(int(number), x_BSD)


class _Stage(PipelineStage):
    """Tells the passes about each backward pass, and measures how long the schedule waits for messages: from when it
    takes the order to receive to when it has what a pass needs."""

    waited_s = 0.0
    _since_s: float | None = None

    @property
    def pass_of_stage(self) -> _Pass:
        return self.submod

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._begin_to_wait(super().get_fwd_recv_ops(fwd_chunk_id))

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._begin_to_wait(super().get_bwd_recv_ops(bwd_chunk_id))

    def forward_one_chunk(self, *inputs: Any, **named: Any) -> Any:
        self._end_to_wait()
        return super().forward_one_chunk(*inputs, **named)

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Tensor | None = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._end_to_wait()
        if not self.has_backward:
            return
        passes = cast(Passes, self.pass_of_stage.passes)
        passes.before_backward(last_backward)
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        passes.after_backward()

    def _begin_to_wait(self, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        self._since_s = time.perf_counter()
        return ops

    def _end_to_wait(self) -> None:
        if self._since_s is not None:
            self.waited_s += time.perf_counter() - self._since_s
            self._since_s = None
