"""Training on ranks that share sequences, and what each of them found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.parity import training_ranks
from tests.parity.training_ranks import (
    BASE,
    CLIPPED,
    DIVERSE,
    DOMAIN_BLOCKS,
    UNCLIPPED,
    Case,
    Found,
    Layout,
    domains_of,
    find,
    job_of,
    network,
    on_ranks,
    part_of_pass,
)
from zenray.spec.training import DistillJob
from zenray.training.context_parallel import own_places
from zenray.training.data.stream import Batch, pack
from zenray.training.mesh import Mesh
from zenray.training.teachers import NetworkAnswers, TopTeacher
from zenray.training.trainer import Trainer

LENGTH, PASSES, WINDOW = 16, 2, 5
UNEVEN = {1: (5,), 2: (3, 2)}  # sequences of each reader in one pass
LOCAL = {"sliding_window": WINDOW, "local_layers": (0, 2)}
CASES = {
    "windows": Case(replace(BASE, **LOCAL), UNCLIPPED),
    "clipped diverse with a teacher": Case(replace(DIVERSE, **LOCAL), CLIPPED, shares=((1.0, 1.0),)),
    "teachers of two domains": Case(BASE, UNCLIPPED, shares=((1.0, 0.0), (0.0, 1.0))),
    "domain blocks": Case(DOMAIN_BLOCKS, CLIPPED),
    "a teacher whose answers are kept": Case(BASE, UNCLIPPED),
    "selective recomputation": Case(DIVERSE, CLIPPED, recompute="selective"),
    "half precision": Case(BASE, UNCLIPPED, dtype="bfloat16"),
}


LAYOUTS = {
    2: (Layout(context=2), Layout(2, context=2), Layout(1, True, context=2)),
    4: (Layout(context=2), Layout(2, context=2), Layout(context=4), Layout(2, True, context=4)),
}


def cases_of(layout: Layout) -> list[str]:
    """All where sequences and experts are shared, on the other layouts those that differ most."""
    return list(CASES) if layout == Layout(2, context=2) else ["windows", "clipped diverse with a teacher"]


def sequences_of(number: int) -> list[Any]:
    """All of one pass: documents of random lengths, some of which cross the cuts between ranks."""
    generator = torch.Generator().manual_seed(100 + number)
    found = []
    for _ in range(sum(UNEVEN[1])):
        tokens = torch.randint(0, training_ranks.VOCABULARY, (LENGTH + 1,), generator=generator)
        begins = torch.rand(LENGTH + 1, generator=generator) < 0.15
        found.append((tokens.numpy(), begins.cumsum(0).numpy()))
    return found


def batches_of(reader: int, count: int) -> list[Batch]:
    part = part_of_pass(UNEVEN[count], reader)
    return [pack(sequences_of(number)[part], domains_of(part)) for number in range(PASSES)]


def make_trainer(name: str, folder: Path, mesh: Mesh | None = None) -> Trainer:
    case = CASES[name]
    if "kept" not in name:
        return training_ranks.make_trainer(case, mesh)
    asked = job_of(case).model_dump() | {
        "kind": "distill",
        "teachers": [{"version": {"model": "teacher"}, "top_logits": 7}],
        "distillation": 0.7,
    }
    answers = NetworkAnswers(lambda: network(replace(BASE, num_hidden_layers=1, sparse_layers=(0,)), 5), 7, 1.0)
    trainer = Trainer(
        network(BASE, 1), DistillJob(**asked), mesh, kept_teachers=[(TopTeacher(answers, folder, "it", 7), (1.0, 1.0))]
    )
    masters = [one.master for one in trainer.trainables]
    trainer.optimizer = torch.optim.SGD([{"params": masters, "scale": 1.0}], lr=0.1)
    return trainer


def run_case(name: str, folder: Path, mesh: Mesh | None = None) -> tuple[Found, float]:
    """What was found in training, and then the loss of an evaluation."""
    mesh = mesh or Mesh()
    trainer = make_trainer(name, folder, mesh)
    batches = batches_of(mesh.reader, mesh.readers)
    return find(trainer, [batches]), trainer.evaluate(batches)


def assemble(ranks: list[Found], layout: Layout, number: int) -> torch.Tensor:
    """A pass's outputs, sequence by sequence, of ranks that each computed some places."""
    found = []
    for first in range(0, len(ranks), layout.context):
        group = ranks[first : first + layout.context]
        parts = [one.outputs[number].unflatten(0, (-1, LENGTH // layout.context)) for one in group]
        sequences = torch.empty(parts[0].shape[0], LENGTH, parts[0].shape[-1], dtype=parts[0].dtype)
        for rank, part in enumerate(parts):
            sequences[:, own_places(LENGTH, layout.context, rank)] = part
        found.append(sequences.flatten(0, 1))
    return torch.cat(found)


def spawn(world: int, folder: Path) -> dict[tuple[str, Layout], list[tuple[Found, float]]]:
    """Every case on every layout of `world` ranks: {(case, layout): one result for each rank}."""
    return on_ranks(_find_all, world, folder, folder)


def _find_all(folder: Path) -> dict[tuple[str, Layout], tuple[Found, float]]:
    found = {}
    for layout in LAYOUTS[dist.get_world_size()]:
        mesh = layout.mesh()
        for name in cases_of(layout):
            answers = folder / f"answers-{dist.get_rank()}-{layout}"  # each rank's own: nobody reads what another asked
            found[name, layout] = run_case(name, answers, mesh)
    return found
