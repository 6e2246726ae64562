"""Which ways there are to share a network among workers: one rule for job files, meshes and elastic restarts.

`pipeline` stages of equally many workers; within a stage, `context` workers share each sequence, and `expert` workers
each set of experts. All workers of a stage are data-parallel to one another but for those that share a sequence. An
expert group may span workers of one sequence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from zenray.spec.errors import InvalidValue


@dataclass(frozen=True)
class Axes:
    """Workers that share a layer stack, a sequence, a set of experts; 1: nobody shares."""

    pipeline: int = 1
    context: int = 1
    expert: int = 1

    @property
    def step(self) -> int:
        """Legal worker counts are the multiples of this."""
        return self.pipeline * math.lcm(self.context, self.expert)

    def of_stage(self, workers: int) -> int:
        return workers // self.pipeline

    def data(self, workers: int) -> int:
        """Workers that read different sequences."""
        return self.of_stage(workers) // self.context

    def replicas(self, workers: int) -> int:
        """Workers that hold the same experts."""
        return self.of_stage(workers) // self.expert


def check_axes(workers: int, axes: Axes) -> None:
    """InvalidValue where `workers` cannot be shared out so: which axis is at fault, and what is legal instead."""
    in_stage = workers // axes.pipeline
    for name, size, of in (
        ("pipeline_parallel", axes.pipeline, workers),
        ("context_parallel", axes.context, in_stage),
        ("expert_parallel", axes.expert, in_stage),
    ):
        if size < 1 or of % size:
            where = f"{workers} workers" if of == workers else f"The {of} workers of each of {axes.pipeline} stages"
            raise InvalidValue(
                f"{where} cannot form {name.removesuffix('_parallel')} groups of {size}.",
                hint=f"With {of} of them {name} can be {_listed(divisors(of))}; with these axes there can be "
                f"{_listed(near_counts(workers, axes))} workers.",
                param=name,
            )


def check_sequence(tokens: int, context: int) -> None:
    """InvalidValue where workers of a context group cannot get equal parts of a sequence: one chunk from its front and
    one from its back each."""
    chunks = 2 * context
    if context > 1 and tokens % chunks:
        below = tokens // chunks * chunks
        near = [count for count in (below, below + chunks) if count > 0]
        sharing = [workers for workers in divisors(tokens) if workers == 1 or tokens % (2 * workers) == 0]
        raise InvalidValue(
            f"A sequence of {tokens:,} tokens cannot be cut into {chunks} equal chunks for {context} workers.",
            hint=f"Use {' or '.join(f'{count:,}' for count in near)} tokens, or a context_parallel of "
            f"{_listed(sharing)}.",
            param="context_parallel",
        )


def divisors(count: int) -> list[int]:
    """Of a positive number, in order."""
    return [number for number in range(1, count + 1) if count % number == 0]


def near_counts(workers: int, axes: Axes) -> list[int]:
    """The legal worker counts just below and above (or at) `workers`."""
    below = workers // axes.step * axes.step
    return sorted({count for count in (below, workers if workers == below else below + axes.step) if count > 0})


def most_workers(available: int, axes: Axes) -> int:
    """How many of the workers that are left can go on; 0 where too few are."""
    return available // axes.step * axes.step


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
