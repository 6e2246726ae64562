"""Training on ranks that form a pipeline, and what each of them found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.parity.training_ranks import (
    ADAMW,
    BASE,
    CLIPPED,
    DIVERSE,
    DOMAIN_BLOCKS,
    UNCLIPPED,
    Case,
    Found,
    Layout,
    batches_of,
    found_in,
    make_trainer,
    on_ranks,
)
from zenray.training.checkpointing import load, save
from zenray.training.mesh import Mesh
from zenray.training.trainer import Trainer

PASSES, STEPS = 3, 2  # more passes than two stages have, fewer than four
FIVE_LAYERS: dict[str, Any] = {"num_hidden_layers": 5, "sparse_layers": (1, 2, 3, 4)}
APART = replace(BASE, **FIVE_LAYERS)
TIED = replace(DIVERSE, **FIVE_LAYERS)
CASES = {
    "head apart": Case(APART, UNCLIPPED),
    "tied head, clipped, with a teacher": Case(TIED, CLIPPED, shares=((1.0, 1.0),)),
    "teachers of two domains": Case(APART, UNCLIPPED, shares=((1.0, 0.25), (0.0, 0.75))),
    "domain blocks": Case(replace(DOMAIN_BLOCKS, **FIVE_LAYERS), CLIPPED),
    "one group learns": Case(APART, ADAMW, train=("experts/code", "routers"), optimizer="adamw"),
    "adamw": Case(TIED, ADAMW, optimizer="adamw"),
    "selective recomputation": Case(TIED, CLIPPED, recompute="selective"),
    "half precision": Case(APART, UNCLIPPED, dtype="bfloat16"),
}


APART_ONLY, TIED_ONLY = ("head apart",), ("tied head, clipped, with a teacher",)
LAYOUTS: dict[int, dict[Layout, tuple[str, ...]]] = {  # and the cases that they run
    2: {Layout(stages=2): tuple(CASES)},
    4: {
        Layout(stages=2): TIED_ONLY,
        Layout(2, stages=2): APART_ONLY,
        Layout(1, True, stages=2): APART_ONLY,
        Layout(2, True, stages=2): (*TIED_ONLY, "domain blocks", "one group learns"),
        Layout(2, context=2, stages=2): TIED_ONLY,
        Layout(stages=4): (*APART_ONLY, *TIED_ONLY),
    },
}


def run_case(case: Case, mesh: Mesh | None = None) -> Found:
    """Two steps, and an evaluation before each: `outputs` are their losses."""
    trainer = make_trainer(case, mesh)
    outputs = []
    for step in range(STEPS):
        batches = batches_of(trainer.mesh.reader, trainer.mesh.readers, step, PASSES)
        outputs += [torch.tensor(trainer.evaluate(some)) for some in (batches, batches[:1])]
        report = trainer.step(step, batches)
    if trainer.teachers:
        outputs.append(torch.tensor(trainer.evaluate(batches, trainer.teachers[0][0])))
    return found_in(trainer, outputs, report)


def spawn(world: int, folder: Path, source: Path | None = None) -> dict[tuple[str, Layout], list[Found]]:
    """Every case on every layout of `world` ranks: {(case, layout): one result for each rank}.

    Leaves checkpoints in `folder`, by their layouts, each read from the one before and the first from `source`; without
    that it is trained, and trained on in two ways: "went-on" never stopped, "resumed" began at it.
    """
    return on_ranks(_find_all, world, folder, folder, source)


def _find_all(folder: Path, source: Path | None) -> dict[tuple[str, Layout], Found]:
    world, found = dist.get_world_size(), {}
    for layout, names in LAYOUTS[world].items():
        mesh = layout.mesh()
        for name in names:
            found[name, layout] = run_case(CASES[name], mesh)
    _reshard(world, folder, source)
    return found


RESHARDED = CASES["adamw"]
CHAINED = {
    2: (Layout(stages=2), Layout(2)),
    4: (Layout(2, stages=2), Layout(stages=4), Layout(1, True, stages=2), Layout(2, True, stages=2)),
}


def _reshard(world: int, folder: Path, source: Path | None) -> None:
    for layout in CHAINED[world]:
        mesh = layout.mesh()
        trainer = make_trainer(RESHARDED, mesh)

        def step(trainer: Trainer, index: int) -> None:
            trainer.step(index, batches_of(trainer.mesh.reader, trainer.mesh.readers, index, PASSES))

        if source is None:
            for index in range(STEPS):
                step(trainer, index)
            save(trainer, STEPS, folder / str(layout))
            step(trainer, STEPS)
            save(trainer, STEPS + 1, folder / "went-on")
            again = make_trainer(RESHARDED, mesh)
            step(again, load(again, folder / str(layout)))
            save(again, STEPS + 1, folder / "resumed")
        else:
            save(trainer, load(trainer, source), folder / str(layout))
        source = folder / str(layout)
