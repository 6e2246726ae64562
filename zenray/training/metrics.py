"""What a step costs on this worker: memory, time in communication, and its share of the hardware's arithmetic."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
import torch.distributed as dist

from zenray.catalog.accounting import flops_per_token
from zenray.catalog.gpus import gpu_of_device
from zenray.model.config import MoDEConfig
from zenray.training.tracking import tracked
from zenray.training.trainer import Trainer

Event = dict[str, Any]
Tell = Callable[[Event], None]

_BACKWARD = 3  # a step costs three forward passes: one, and two products for each in the backward pass
_COLLECTIVES = (
    "all_reduce",
    "all_to_all_single",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "broadcast",
)


@contextmanager
def watched(trainer: Trainer, run: str, stream: Tell) -> Iterator[Tell]:
    """What the loop tells, with measurements added, for the stream and, from the first worker, the job's trackers."""
    job, is_first = trainer.job, trainer.mesh.rank == 0
    with tracked(job, run) if is_first else nullcontext(lambda event: None) as track:

        def tell(event: Event) -> None:
            stream(event)
            track(event)

        measures = StepMeasures(
            tell,
            trainer.model.config,
            [teacher.model.config for teacher, _ in trainer.teachers],
            context_tokens=job.data.sequence_tokens // 2,  # on average, within a sequence
            world=trainer.mesh.world,
            of_pipeline=lambda: 0.0 if trainer.pipeline is None else trainer.pipeline.waited_s,
        )
        with measures.watching_collectives():
            yield measures


class StepMeasures:
    """A `tell` that adds what was measured since the last step to each step's event, and passes everything on.

    Only what is told has them, not the history in the checkpoints, which is the same however a run was interrupted.
    """

    def __init__(
        self,
        tell: Tell,
        config: MoDEConfig,
        teachers: Sequence[MoDEConfig] = (),
        *,
        context_tokens: int,
        world: int = 1,
        of_pipeline: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """`of_pipeline`: seconds that this worker has waited for other stages so far."""
        self._tell = tell
        peak = peak_flops()
        self._share_of_token: float | None = None  # of a second of all workers' arithmetic
        if peak is not None:
            flops = _BACKWARD * flops_per_token(config.dimensions(), context_tokens)
            flops += sum(flops_per_token(teacher.dimensions(), context_tokens) for teacher in teachers)
            self._share_of_token = flops / (peak * world)
        self._waited_s, self._is_waiting = 0.0, False
        self._started: WeakSet[dist.Work] = WeakSet()
        self._of_pipeline = of_pipeline
        self._before_s = self._of_pipeline()
        self._since_s = time.perf_counter()

    def __call__(self, event: Event) -> None:
        if event["event"] != "step":
            self._tell(event)
            return
        now_s, for_stages_s = time.perf_counter(), self._of_pipeline()
        self._waited_s += for_stages_s - self._before_s
        measured = {
            "memory_bytes": memory_bytes(),
            "communication_share": self._share(now_s),
            "mfu": None if self._share_of_token is None else self._share_of_token * event["tokens_per_s"],
        }
        self._waited_s, self._since_s, self._before_s = 0.0, now_s, for_stages_s
        self._tell({**event, **measured})

    def _share(self, now_s: float) -> float | None:
        """None on a GPU, where the host does not wait for a collective: a profile would have to say it."""
        if torch.cuda.is_available():
            return None
        return self._waited_s / max(now_s - self._since_s, 1e-9) if dist.is_initialized() else 0.0

    @contextmanager
    def watching_collectives(self) -> Iterator[None]:
        """Within, the time that this worker's calls of collectives take is added up. They wait for the slowest worker.

        torch tells how long a collective took for NCCL only, so its functions, and the wait for what they only started,
        are wrapped for as long as this lasts.
        """
        places: list[tuple[Any, str]] = [(dist, name) for name in _COLLECTIVES] + [(dist.Work, "wait")]
        real = [(place, name, getattr(place, name)) for place, name in places]
        for place, name, function in real:
            setattr(place, name, self._timed(function))
        try:
            yield
        finally:
            for place, name, function in real:
                setattr(place, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            work = arguments[0] if arguments and isinstance(arguments[0], dist.Work) else None
            if self._is_waiting or (work is not None and work not in self._started):
                return function(*arguments, **named)  # a collective's own wait; a message between stages
            began_s, self._is_waiting = time.perf_counter(), True
            try:
                result = function(*arguments, **named)
            finally:
                self._waited_s += time.perf_counter() - began_s
                self._is_waiting = False
            if isinstance(result, dist.Work):
                self._started.add(result)
            return result

        return call


def memory_bytes() -> int:
    """The most that this process has held: of its GPU's memory, or resident on a CPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops() -> float | None:
    """Of this worker's device, in bfloat16; None for one that is not in the catalog: nothing is said of utilisation."""
    if not torch.cuda.is_available():
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return None if gpu is None else gpu.bf16_flops_per_s
