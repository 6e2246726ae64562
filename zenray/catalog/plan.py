"""What a training job would need and how fast it would be, before anything starts: memory per worker, tokens a day.

Refuses what cannot fit, with the sum. Speed is a peak times an assumed share of it (`gpus.yaml`): an estimate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace

from zenray.catalog.accounting import count_parameters, flops_per_token
from zenray.catalog.catalog import Catalog
from zenray.catalog.gpus import Gpu, find_gpu
from zenray.catalog.memory import stage_layers
from zenray.catalog.training_memory import (
    Part,
    Settings,
    StepMemory,
    Teacher,
    TrainingLayout,
    WorkerMemory,
    step_memory,
)
from zenray.spec.dimensions import ModelDimensions
from zenray.spec.errors import InvalidValue
from zenray.spec.platform import Nodes
from zenray.spec.training import DataSource, DistillJob, TrainingJob

USABLE_SHARE = 0.92  # of a GPU's memory: the rest is lost between blocks of PyTorch's allocator
DAY_S = 86_400
_MOST_WORKERS = 4096  # that a hint looks for


@dataclass(frozen=True)
class Speed:
    """How fast a job would be on its GPUs. FLOPs are the model's and its teachers': what recomputing adds is not."""

    flops_per_token: int
    assumed_mfu: float  # of a step without recomputing and without waiting between pipeline stages
    slower_by: float  # what those two cost: the factor on a step's time
    step_s: float
    tokens_per_day: float
    days: float  # for all steps of the job
    gpu_hours: float


@dataclass(frozen=True)
class TrainingPlan:
    """A job on a cluster. `stages`: what a worker of each pipeline stage holds; all of a stage hold the same."""

    job: str
    model: str
    parameters: int
    active_parameters: int
    layout: TrainingLayout
    stages: tuple[StepMemory, ...]
    tokens_per_step: int
    steps: int
    gpu: Gpu | None = None  # None: it trains on CPUs, or the cluster's machines are not known
    gpus: int = 0  # of the cluster
    speed: Speed | None = None

    @property
    def fullest(self) -> StepMemory:
        """The stage that decides whether the job fits."""
        return max(self.stages, key=lambda stage: stage.fullest.total)


def plan_training(job: TrainingJob, catalog: Catalog, nodes: Nodes | None = None) -> TrainingPlan:
    """The plan of `job` on machines of one kind, or without them its memory alone.

    InvalidValue, with the sum and what would fit, where a worker's share is more than its GPU has; also for too few
    GPUs, a sequence longer than the model's context, or a teacher of another vocabulary. ModelNotFound.
    """
    dimensions = _dimensions(catalog, job.base.model)
    context_tokens = catalog.get(job.base.model).context_tokens
    if job.data.sequence_tokens > context_tokens:
        raise InvalidValue(
            f"Sequences of {job.data.sequence_tokens:,} tokens are longer than {job.base.model}'s context of "
            f"{context_tokens:,}.",
            param="data.sequence_tokens",
        )
    teachers = tuple(_teachers(job, catalog, dimensions))
    count = count_parameters(dimensions)
    layout = layout_of(job)
    plan = TrainingPlan(
        job=job.name,
        model=job.base.model,
        parameters=count.total,
        active_parameters=count.active,
        layout=layout,
        stages=_stages(dimensions, layout, settings_of(job, layout), teachers),
        tokens_per_step=job.sequences_per_step * job.data.sequence_tokens,
        steps=job.steps,
    )
    if nodes is None or not job.workers.gpu:
        return plan
    gpu = find_gpu(nodes.gpu)
    _check_gpus(layout, nodes)
    _check_memory(plan, gpu, job, dimensions, teachers)
    speed = _speed(job, layout, gpu, dimensions, teachers)
    return replace(plan, gpu=gpu, gpus=nodes.count * nodes.gpus, speed=speed)


def layout_of(job: TrainingJob) -> TrainingLayout:
    workers = job.workers
    return TrainingLayout(workers.count, workers.axes, workers.fully_sharded)


def settings_of(job: TrainingJob, layout: TrainingLayout) -> Settings:
    learning: set[Part] = {"experts" for part in job.train if part.startswith("experts")}
    learning |= {part for part in ("dense", "routers") if part in job.train}
    return Settings(
        learning=frozenset(learning),
        half=job.dtype == "bfloat16",
        recomputed=job.activation_checkpointing,
        sequences=job.sequences_per_pass,
        sequence_tokens=job.data.sequence_tokens // layout.axes.context,
        passes=_passes(job, layout),
        gpu=job.workers.gpu,
        moments_in_8_bits=job.optimisation.optimizer == "adamw-8bit",
        context=layout.axes.context,
    )


def sum_in_words(memory: WorkerMemory) -> str:
    """`weights 3.2 + gradients 3.2 + … = 21.4 GB`: all parts that are not nothing."""
    parts = [(one.name, getattr(memory, one.name)) for one in fields(memory)]
    terms = " + ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size)
    return f"{terms} = {memory.total / 1e9:.1f} GB"


def _dimensions(catalog: Catalog, model: str) -> ModelDimensions:
    dimensions = catalog.get(model).dimensions
    if dimensions is None:
        raise InvalidValue(f"The catalog does not know the dimensions of {model!r}: there is nothing to reckon with.")
    return dimensions


def _teachers(job: TrainingJob, catalog: Catalog, student: ModelDimensions) -> Iterator[Teacher]:
    for teacher in job.teachers if isinstance(job, DistillJob) else ():
        if teacher.version is None:  # it runs elsewhere
            continue
        found = _dimensions(catalog, teacher.version.model)
        if found.vocab_size != student.vocab_size:
            raise InvalidValue(
                f"The teacher {teacher.version.model} has {found.vocab_size:,} tokens in its vocabulary, the student "
                f"{student.vocab_size:,}.",
                hint="Distillation compares the two distributions token by token: use a teacher of one tokenizer.",
                param="teachers",
            )
        is_whole = teacher.top_logits is not None
        runs_on_all = job.workers.fully_sharded and not is_whole  # all workers run a network that is cut
        yield Teacher(found, is_whole, 1.0 if runs_on_all else _share_of(teacher.domains, job.data.sources))


def _share_of(domains: Collection[str] | None, sources: Sequence[DataSource]) -> float:
    """Of all sequences, those of these domains."""
    total = sum(source.weight for source in sources)
    return sum(source.weight for source in sources if domains is None or source.domain in domains) / total


def _passes(job: TrainingJob, layout: TrainingLayout) -> int:
    """Of one worker in one step."""
    return job.sequences_per_step // (layout.axes.data(layout.workers) * job.sequences_per_pass)


def _stages(
    dimensions: ModelDimensions, layout: TrainingLayout, settings: Settings, teachers: Sequence[Teacher]
) -> tuple[StepMemory, ...]:
    """Of a worker of each pipeline stage. By 1F1B an early stage keeps more passes at once than a late one; with fewer
    passes than stages each keeps all of them. Teachers run beside the last."""
    found, first = [], 0
    for stage, count in enumerate(stage_layers(dimensions.layers, layout.stages)):
        layers = range(first, first + count)
        first += count
        at_once = min(settings.passes, layout.stages - stage if settings.passes >= layout.stages else layout.stages)
        beside = teachers if first == dimensions.layers else ()
        found.append(step_memory(dimensions, layers, layout, settings, passes_in_flight=at_once, teachers=beside))
    return tuple(found)


def _check_gpus(layout: TrainingLayout, nodes: Nodes) -> None:
    there = nodes.count * nodes.gpus
    if layout.workers > there:
        raise InvalidValue(
            f"{layout.workers} workers need as many GPUs, and the cluster has {nodes.count} x {nodes.gpus} = {there}.",
            param="workers.count",
        )


def _check_memory(
    plan: TrainingPlan, gpu: Gpu, job: TrainingJob, dimensions: ModelDimensions, teachers: Sequence[Teacher]
) -> None:
    usable_bytes = round(gpu.memory_bytes * USABLE_SHARE)
    if plan.fullest.fullest.total <= usable_bytes:
        return
    raise InvalidValue(
        f"{plan.model} does not fit on {plan.layout.workers} x {gpu.name}: a worker would hold "
        f"{sum_in_words(plan.fullest.fullest)}, and {USABLE_SHARE:.0%} of its GPU are {usable_bytes / 1e9:.1f} GB.",
        hint=_what_fits(plan.layout, settings_of(job, plan.layout), dimensions, teachers, usable_bytes),
        param="workers",
    )


def _what_fits(
    layout: TrainingLayout,
    settings: Settings,
    dimensions: ModelDimensions,
    teachers: Sequence[Teacher],
    usable_bytes: int,
) -> str:
    """The first that fits of: sharding, recomputing, smaller passes, and then more workers with all of these."""

    def fits(layout: TrainingLayout, settings: Settings) -> bool:
        return all(stage.fullest.total <= usable_bytes for stage in _stages(dimensions, layout, settings, teachers))

    before = layout, settings
    for layout, settings in _ways_to_fit(*before):
        if fits(layout, settings):
            break
    else:
        while not fits(layout, settings):
            if layout.workers > _MOST_WORKERS:
                return "More workers alone do not help: use shorter sequences, or a larger expert_parallel."
            layout = replace(layout, workers=2 * layout.workers, fully_sharded=True)
    return f"It fits with {', '.join(_changes(before, (layout, settings)))}."


def _ways_to_fit(layout: TrainingLayout, settings: Settings) -> Iterator[tuple[TrainingLayout, Settings]]:
    """What to change on the same GPUs, one after the other, each on top of those before: the cheapest first."""
    layout = replace(layout, fully_sharded=layout.of_stage > 1)
    yield layout, settings
    settings = replace(settings, recomputed="full")
    yield layout, settings
    settings = replace(settings, passes=1)  # the sums of several are whole, also where weights are cut
    yield layout, settings
    yield layout, replace(settings, sequences=1)


def _changes(before: tuple[TrainingLayout, Settings], after: tuple[TrainingLayout, Settings]) -> Iterator[str]:
    """The fields of a job file in which two of them differ."""
    (layout, settings), (new_layout, new) = before, after
    if new_layout.workers != layout.workers:
        yield f"workers.count: {new_layout.workers}"
    if new_layout.fully_sharded != layout.fully_sharded:
        yield "workers.fully_sharded: true"
    if new.recomputed != settings.recomputed:
        yield f"activation_checkpointing: {new.recomputed}"
    if new.sequences != settings.sequences:
        yield f"sequences_per_pass: {new.sequences}"
    if new.passes != settings.passes:
        yield f"sequences_per_step: {new_layout.axes.data(new_layout.workers) * new.sequences}"


def _speed(
    job: TrainingJob,
    layout: TrainingLayout,
    gpu: Gpu,
    dimensions: ModelDimensions,
    teachers: Sequence[Teacher],
) -> Speed:
    """Time is FLOPs over the assumed share of the peak, and what is done twice or waited for on top."""
    context_tokens = job.data.sequence_tokens // 2  # a token sees half of its sequence on average
    forward = flops_per_token(dimensions, context_tokens)
    of_teachers = round(
        sum(flops_per_token(teacher.dimensions, context_tokens) * teacher.share_of_tokens for teacher in teachers)
    )
    flops = 3 * forward + of_teachers
    recomputed = forward if job.activation_checkpointing == "full" else 0
    passes = _passes(job, layout)
    waiting = (passes + layout.stages - 1) / passes
    slower_by = (flops + recomputed) / flops * waiting
    tokens = job.sequences_per_step * job.data.sequence_tokens
    per_s = layout.workers * gpu.peak_flops_per_s(job.dtype) * gpu.assumed_mfu / (flops * slower_by)
    seconds = job.steps * tokens / per_s
    return Speed(
        flops_per_token=flops,
        assumed_mfu=gpu.assumed_mfu,
        slower_by=slower_by,
        step_s=tokens / per_s,
        tokens_per_day=per_s * DAY_S,
        days=seconds / DAY_S,
        gpu_hours=layout.workers * seconds / 3600,
    )
