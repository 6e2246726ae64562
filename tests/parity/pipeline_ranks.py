"""Training on ranks that form a pipeline, and what each of them found."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.parity.training_ranks import (
    ADAMW,
    BASE,
    CLIPPED,
    DIVERSE,
    UNCLIPPED,
    UNEVEN,
    Case,
    Found,
    _parts,
    make_trainer,
    whole_pass,
)
from zenray.training import gradients
from zenray.training.checkpointing import load, save
from zenray.training.data.stream import Batch, pack
from zenray.training.layout import local_part
from zenray.training.mesh import Mesh
from zenray.training.trainer import Trainer

PASSES, STEPS = 3, 2  # more passes than two stages have, fewer than four
FIVE_LAYERS: dict[str, Any] = {"num_hidden_layers": 5, "sparse_layers": (1, 2, 3, 4)}
APART = replace(BASE, **FIVE_LAYERS)
TIED = replace(DIVERSE, **FIVE_LAYERS)
CASES = {
    "head apart": Case(APART, UNCLIPPED),
    "tied head, clipped, with a teacher": Case(TIED, CLIPPED, has_teacher=True),
    "one group learns": Case(APART, ADAMW, train=("experts/code", "routers"), optimizer="adamw"),
    "adamw": Case(TIED, ADAMW, optimizer="adamw"),
    "selective recomputation": Case(TIED, CLIPPED, recompute="selective"),
    "half precision": Case(APART, UNCLIPPED, dtype="bfloat16"),
}


class Layout(NamedTuple):
    stages: int
    expert: int = 1
    fully_sharded: bool = False
    context: int = 1

    def __str__(self) -> str:
        of_stage = f"ep{self.expert}{f'-cp{self.context}' * (self.context > 1)}{'-sharded' * self.fully_sharded}"
        return f"pp{self.stages}-{of_stage}"


APART_ONLY, TIED_ONLY = ("head apart",), ("tied head, clipped, with a teacher",)
LAYOUTS: dict[int, dict[Layout, tuple[str, ...]]] = {  # and the cases that they run
    2: {Layout(2): tuple(CASES)},
    4: {
        Layout(2): TIED_ONLY,
        Layout(2, 2): APART_ONLY,
        Layout(2, 1, True): APART_ONLY,
        Layout(2, 2, True): (*TIED_ONLY, "one group learns"),
        Layout(2, 2, False, 2): TIED_ONLY,
        Layout(4): (*APART_ONLY, *TIED_ONLY),
    },
}


def batches_of(reader: int, readers: int, step: int) -> list[Batch]:
    sizes = UNEVEN[readers]
    part = slice(sum(sizes[:reader]), sum(sizes[: reader + 1]))
    return [pack(whole_pass(step * PASSES + number)[part]) for number in range(PASSES)]


def run_case(case: Case, mesh: Mesh | None = None) -> Found:
    """Two steps, and an evaluation before each: `outputs` are their losses."""
    trainer = make_trainer(case, mesh)
    outputs, report = [], None
    for step in range(STEPS):
        batches = batches_of(trainer.mesh.reader, trainer.mesh.readers, step)
        outputs += [torch.tensor(trainer.evaluate(some)) for some in (batches, batches[:1])]
        report = trainer.step(step, batches)
    if trainer.teachers:
        outputs.append(torch.tensor(trainer.evaluate(batches, trainer.teachers[0][0])))
    return Found(
        outputs=outputs,
        gradients=_parts(trainer, {one.name: one.gradient for one in trainer.trainables}),
        weights=_parts(
            trainer,
            {name: local_part(one) for name, one in trainer.model.named_parameters()}
            | {one.name: one.master for one in trainer.trainables},
        ),
        norms={"total": report.gradient_norm, **report.gradient_norms},
        report=report,
        loads=[part.bias_E.clone() for part in trainer.model.modules() if getattr(part, "bias_E", None) is not None],
    )


def spawn(world: int, folder: Path, source: Path | None = None) -> dict[tuple[str, Layout], list[Found]]:
    """Every case on every layout of `world` ranks: {(case, layout): one result for each rank}.

    Leaves checkpoints in `folder`, by their layouts, each read from the one before and the first from `source`; without
    that it is trained, and trained on in two ways: "went-on" never stopped, "resumed" began at it.
    """
    folder.mkdir()
    multiprocessing.spawn(_rank_main, args=(world, str(folder), source), nprocs=world)
    by_rank = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]
    return {key: [found[key] for found in by_rank] for key in by_rank[0]}


def _rank_main(rank: int, world: int, folder: str, source: Path | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    gradients.LARGE_BYTES = 2000  # some gradients are reduced alone, some in buckets
    found = {}
    for layout in LAYOUTS[world]:
        mesh = make_mesh(layout)
        for name in LAYOUTS[world][layout]:
            found[name, layout] = run_case(CASES[name], mesh)
    _reshard(world, Path(folder), source)
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def make_mesh(layout: Layout) -> Mesh:
    return Mesh.create(
        layout.expert, fully_sharded=layout.fully_sharded, context_size=layout.context, stages=layout.stages
    )


RESHARDED = CASES["adamw"]
CHAINED = {2: (Layout(2), Layout(1, 2)), 4: (Layout(2, 2), Layout(4), Layout(2, 1, True), Layout(2, 2, True))}


def _reshard(world: int, folder: Path, source: Path | None) -> None:
    for layout in CHAINED[world]:
        mesh = make_mesh(layout)
        trainer = make_trainer(RESHARDED, mesh)

        def step(trainer: Trainer, index: int) -> None:
            trainer.step(index, batches_of(trainer.mesh.reader, trainer.mesh.readers, index))

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
