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
from zenray.training.data.stream import Batch, pack
from zenray.training.layout import local_part
from zenray.training.mesh import Mesh

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

    def __str__(self) -> str:
        return f"pp{self.stages}-ep{self.expert}{'-sharded' * self.fully_sharded}"


LAYOUTS = {
    2: (Layout(2),),
    4: (Layout(2), Layout(2, 2), Layout(2, 1, True), Layout(2, 2, True), Layout(4)),
}


def cases_of(world: int, layout: Layout) -> list[str]:
    """All on the layouts that differ most; on the others those cases that do."""
    if world == 2:
        return list(CASES)
    if layout == Layout(2, 2, True):
        return [name for name, case in CASES.items() if case.dtype == "float32"]
    return ["head apart", "tied head, clipped, with a teacher"]


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
    """Every case on every layout of `world` ranks: {(case, layout): one result for each rank}. Leaves checkpoints in
    `folder` too; see `_reshard`."""
    folder.mkdir()
    multiprocessing.spawn(_rank_main, args=(world, str(folder), source and str(source)), nprocs=world)
    by_rank = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]
    return {key: [found[key] for found in by_rank] for key in by_rank[0]}


def _rank_main(rank: int, world: int, folder: str, source: str | None) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    gradients.LARGE_BYTES = 2000  # some gradients are reduced alone, some in buckets
    found = {}
    for layout in LAYOUTS[world]:
        mesh = make_mesh(layout)
        for name in cases_of(world, layout):
            found[name, layout] = run_case(CASES[name], mesh)
    torch.save(found, f"{folder}/rank-{rank}.pt")
    dist.destroy_process_group()


def make_mesh(layout: Layout) -> Mesh:
    return Mesh.create(layout.expert, stages=layout.stages, fully_sharded=layout.fully_sharded)
