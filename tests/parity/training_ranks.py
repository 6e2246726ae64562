"""Training the same small networks on one process and on several gloo ranks, and what each of them found."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.network import MoDE
from zenray.model.router import TokenChoiceRouter
from zenray.spec.training import DistillJob, PretrainJob, TrainingJob
from zenray.training import gradients
from zenray.training.checkpointing import load, save
from zenray.training.context_parallel import part_of
from zenray.training.data.stream import Batch, pack
from zenray.training.layout import layouts_of, local_part
from zenray.training.mesh import Mesh
from zenray.training.sharding import let_go
from zenray.training.trainer import Shares, StepReport, Trainer

VOCABULARY, LENGTH, PASSES = 61, 12, 2
SEQUENCES = 7  # of one pass, over all workers: they do not divide evenly
UNEVEN = {1: (7,), 2: (5, 2), 4: (3, 2, 1, 1)}  # sequences of each rank

BASE = MoDEConfig(
    vocab_size=VOCABULARY,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sparse_layers=(1, 2),
    expert_groups=(ExpertGroup("general", 5, 16), ExpertGroup("code", 3, 16)),
    router=RouterConfig(experts_per_token=2, balance_coefficient=0.1, z_coefficient=1e-2, selection_bias=True),
    initializer_range=0.2,
)
DIVERSE = replace(
    BASE,
    expert_groups=(ExpertGroup("general", 3, 16), ExpertGroup("code", 2, 24), ExpertGroup("math", 1, 16)),
    router=RouterConfig(experts_per_token=2, balance_loss="cv2", balance_coefficient=0.1, renormalize=False),
    shared_expert_width=8,
    shared_expert_gate=True,
    tie_word_embeddings=True,
)
DOMAIN_BLOCKS = replace(
    BASE,
    expert_groups=(
        ExpertGroup("general", 3, 16),
        ExpertGroup("reason", 2, 16, "deep"),
        ExpertGroup("language", 1, 6, "vocabulary"),
    ),
)


@dataclass(frozen=True)
class Case:
    """`empty`: experts that no token ever reaches. `shares`: what each teacher counts, of two domains."""

    config: MoDEConfig
    settings: dict[str, Any] = field(default_factory=dict)
    train: tuple[str, ...] = ("dense", "routers", "experts")
    empty: tuple[int, ...] = ()
    shares: tuple[Shares, ...] = ()
    optimizer: str = "sgd"
    dtype: str = "float32"
    recompute: str = "full"


UNCLIPPED = {"clip_norm": 1e9, "weight_decay": 0.0}
CLIPPED = {"clip_norm": 0.5, "expert_clip_norm": 0.02, "weight_decay": 0.0}
ADAMW = {**CLIPPED, "weight_decay": 0.1, "learning_rate": 1e-2}
CASES = {
    "equal experts": Case(BASE, UNCLIPPED),
    "empty experts": Case(BASE, UNCLIPPED, empty=(0, 1, 6)),
    "diverse experts with a teacher": Case(DIVERSE, UNCLIPPED, shares=((1.0, 1.0),)),
    "teachers of two domains": Case(BASE, UNCLIPPED, shares=((1.0, 0.25), (0.0, 0.75))),
    "clipped": Case(BASE, CLIPPED),
    "clipped diverse": Case(DIVERSE, CLIPPED),
    "domain blocks": Case(DOMAIN_BLOCKS, CLIPPED),
    "one group learns": Case(BASE, ADAMW, train=("experts/code", "routers"), optimizer="adamw"),
    "adamw": Case(BASE, ADAMW, optimizer="adamw"),
    "selective recomputation": Case(DIVERSE, CLIPPED, recompute="selective"),
    "nothing recomputed": Case(BASE, UNCLIPPED, recompute="none"),
    "half precision": Case(BASE, UNCLIPPED, dtype="bfloat16"),
}


class Layout(NamedTuple):
    """How ranks share the work; those that are left are data-parallel."""

    expert: int = 1
    fully_sharded: bool = False
    context: int = 1
    stages: int = 1

    def mesh(self) -> Mesh:
        """Collective."""
        return Mesh.create(self.expert, fully_sharded=self.fully_sharded, context_size=self.context, stages=self.stages)

    def __str__(self) -> str:
        shared = (("pp", self.stages), ("cp", self.context), ("ep", self.expert))
        named = [f"{name}{ranks}" for name, ranks in shared if ranks > 1 or name == "ep"]
        return "-".join([*named, *["sharded"] * self.fully_sharded])


LAYOUTS = {
    1: (Layout(1, True),),
    2: (Layout(1), Layout(2), Layout(1, True), Layout(2, True)),
    4: (Layout(1), Layout(2), Layout(4), Layout(1, True), Layout(2, True), Layout(4, True)),
}


def cases_of(world: int, layout: Layout) -> list[str]:
    """All on the layouts that differ most; on the others those cases that do."""
    if world == 2 and layout.expert == 2:
        return list(CASES)
    if world == 4 and layout.expert == 2:
        return [name for name, case in CASES.items() if case.recompute == "full"]
    return ["empty experts", "teachers of two domains", "clipped diverse", "domain blocks", "one group learns"]


@dataclass
class Part:
    """What a rank holds of a tensor."""

    values: torch.Tensor
    region: tuple[slice, ...]
    shape: torch.Size


@dataclass
class Found:
    """One rank's result of one case."""

    outputs: list[torch.Tensor]
    gradients: dict[str, Part]
    weights: dict[str, Part]
    norms: dict[str, Any]
    report: StepReport
    loads: list[torch.Tensor]


def job_of(case: Case) -> TrainingJob:
    about: dict[str, Any] = {
        "name": "parity",
        "base": {"model": "base"},
        "into": {"model": "made", "version": "v1"},
        "data": {"sources": [{"domain": name, "builtin": name} for name in ("prose", "code")]},
        "steps": 4,
        "train": case.train,
        "dtype": case.dtype,
        "activation_checkpointing": case.recompute,
        "optimisation": {"warmup_steps": 0, "learning_rate": 0.1, **case.settings},
    }
    if case.shares:
        teachers = [{"version": {"model": "teacher"}}] * len(case.shares)
        return DistillJob(**about, kind="distill", teachers=teachers, distillation=0.7, temperature=2.0)
    return PretrainJob(**about, kind="pretrain")


def network(config: MoDEConfig, seed: int, empty: tuple[int, ...] = ()) -> MoDE:
    torch.manual_seed(seed)
    model = MoDE(config)
    for part in model.modules():
        if isinstance(part, TokenChoiceRouter) and part.bias_E is not None:
            part.bias_E[list(empty)] = -100.0
    return model


def make_trainer(case: Case, mesh: Mesh | None = None) -> Trainer:
    first = {"sparse_layers": (0,), "expert_choice_layers": (), "local_layers": case.config.local_layers[:1]}
    one_layer = replace(case.config, num_hidden_layers=1, **first)
    teachers = [(network(one_layer, 5 + number), share) for number, share in enumerate(case.shares)]
    trainer = Trainer(network(case.config, 1, case.empty), job_of(case), mesh, teachers)
    if case.optimizer == "sgd":  # Adam divides a wrong scale away; plain descent shows it
        masters = [one.master for one in trainer.trainables]
        trainer.optimizer = torch.optim.SGD([{"params": masters, "scale": 1.0}], lr=0.1)
    return trainer


def whole_pass(number: int) -> list[Any]:
    """All sequences of a pass: documents of random lengths."""
    generator = torch.Generator().manual_seed(number)
    found = []
    for _ in range(SEQUENCES):
        tokens = torch.randint(0, VOCABULARY, (LENGTH + 1,), generator=generator)
        begins = torch.rand(LENGTH + 1, generator=generator) < 0.2
        found.append((tokens.numpy(), begins.cumsum(0).numpy()))
    return found


def batches_of(reader: int, readers: int, step: int, passes: int = PASSES) -> list[Batch]:
    part = part_of_pass(UNEVEN[readers], reader)
    return [pack(whole_pass(step * passes + number)[part], domains_of(part)) for number in range(passes)]


def domains_of(part: slice) -> list[int]:
    """Of a pass's sequences: of two domains, of which some ranks have one alone."""
    return [number % 5 // 3 for number in range(part.start, part.stop)]


def part_of_pass(sizes: tuple[int, ...], reader: int) -> slice:
    """A reader's sequences of a pass, of which the readers have so many each."""
    return slice(sum(sizes[:reader]), sum(sizes[: reader + 1]))


def run_case(case: Case, mesh: Mesh | None = None, rank: int = 0, world: int = 1, steps: int = 1) -> Found:
    trainer = make_trainer(case, mesh)
    return find(trainer, [batches_of(rank, world, step) for step in range(steps)])


def find(trainer: Trainer, steps: list[list[Batch]]) -> Found:
    """What this rank finds in training on its batches of each step. `outputs`: before that, of the first step's."""
    with torch.no_grad():
        outputs = [trainer.objective.hidden_states(part_of(batch, trainer.mesh)).clone() for batch in steps[0]]
    let_go(trainer.objective)
    for step, batches in enumerate(steps):
        report = trainer.step(step, batches)
    return found_in(trainer, outputs, report)


def found_in(trainer: Trainer, outputs: list[torch.Tensor], report: StepReport) -> Found:
    """`report`: of the last step."""
    biases = [part.bias_E.clone() for part in trainer.model.modules() if getattr(part, "bias_E", None) is not None]
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
        loads=biases,
    )


def _parts(trainer: Trainer, tensors: dict[str, torch.Tensor]) -> dict[str, Part]:
    layouts = layouts_of(trainer.model, trainer.mesh)
    return {
        name: Part(tensor.detach().clone(), layouts[name].region(), layouts[name].shape)
        for name, tensor in tensors.items()
    }


def whole(ranks: list[Found], what: str, name: str) -> torch.Tensor:
    """A tensor put together from the ranks' parts; where these overlap they must be equal, and leave nothing out."""
    parts = [getattr(one, what)[name] for one in ranks]
    found = torch.full(parts[0].shape, math.nan)
    for part in parts:
        before = found[part.region]
        if part.values.numel() == before.numel() == 0:
            continue
        assert before.shape == part.values.shape, f"{name}: a part of {tuple(part.values.shape)} in {part.region}"
        assert (before.isnan() | (before == part.values)).all(), f"{name} differs between ranks"
        found[part.region] = part.values
    assert not found.isnan().any(), f"nobody holds a part of {name}"
    return found


def check_ratio(name: str, one: torch.Tensor, reference: torch.Tensor, tolerance: float) -> None:
    """⟨g, r⟩ / ⟨r, r⟩ = 1, which a wrong scale moves; and the difference is small, which a wrong direction moves."""
    one, reference = one.double(), reference.double()
    square = float((reference * reference).sum())
    if square == 0:
        assert not one.any(), f"{name} should be zero"
        return
    assert float((one * reference).sum()) / square == pytest.approx(1, abs=tolerance), name
    assert float((one - reference).norm()) / math.sqrt(square) < 10 * tolerance, name


def spawn(world: int, folder: Path, chain: tuple[Path, ...]) -> dict[tuple[str, Layout], list[Found]]:
    """Every case on every layout of `world` ranks: {(case, layout): one result for each rank}."""
    return on_ranks(_find_all, world, folder, chain)


def on_ranks(body: Callable[..., dict[Any, Any]], world: int, folder: Path, *arguments: Any) -> dict[Any, list[Any]]:
    """What `body(*arguments)` gives on each of `world` gloo ranks, by its keys. `folder`: a new one, for the ranks."""
    folder.mkdir()
    multiprocessing.spawn(_rank_main, args=(world, folder, body, arguments), nprocs=world)
    by_rank = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]
    return {key: [found[key] for found in by_rank] for key in by_rank[0]}


def _rank_main(rank: int, world: int, folder: Path, body: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    gradients.LARGE_BYTES = 2000  # some gradients are reduced alone, some in buckets
    torch.save(body(*arguments), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def _find_all(chain: tuple[Path, ...]) -> dict[tuple[str, Layout], Found]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for layout in LAYOUTS[world]:
        mesh = layout.mesh()
        for name in cases_of(world, layout):
            found[name, layout] = run_case(CASES[name], mesh, rank, world)
    _reshard(world, chain)
    return found


def _reshard(world: int, chain: tuple[Path, ...]) -> None:
    """Two ranks train and save; every later checkpoint is what another layout read from the one before."""
    layouts = CHAINED.get(world, ())
    source = chain[0] if chain else Path()
    for number, (layout, target) in enumerate(zip(layouts, chain if world == 2 else chain[1:], strict=True)):
        trainer = make_trainer(RESHARDED, layout.mesh())
        if world == 2 and number == 0:
            steps = 2
            for step in range(steps):
                trainer.step(step, batches_of(dist.get_rank(), 2, step))
        else:
            steps = load(trainer, source)
        save(trainer, steps, target)
        source = target


CHAINED: dict[int, tuple[Layout, ...]] = {
    2: (Layout(1, True), Layout(2)),
    4: (Layout(4), Layout(2, True), Layout(2), Layout(1, True)),
}
RESHARDED = replace(CASES["clipped diverse"], optimizer="adamw")
