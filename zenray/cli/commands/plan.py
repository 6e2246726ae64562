"""Reckon a training job before it starts: memory per worker, tokens a day, and whether it fits at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from zenray.catalog.plan import USABLE_SHARE, TrainingPlan, plan_training
from zenray.catalog.training_memory import WorkerMemory
from zenray.cli.home import Home
from zenray.cli.output import console, show_facts, show_json, show_table
from zenray.spec.documents import load_document
from zenray.spec.errors import InvalidValue
from zenray.spec.jobs import PipelineJob, load_job
from zenray.spec.platform import Platform
from zenray.spec.training import DistillJob, PretrainJob, TrainingJob


def plan(
    file: Annotated[Path, typer.Argument(help="A job file, such as jobs/zen-14b.yaml.")],
    cluster: Annotated[
        Path | None, typer.Option("-f", "--file", help="The platform file, for its machines: clusters/a100-8.yaml.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Reckon what a training job needs of each GPU and how fast it would be; refuse what cannot fit, with the sum."""
    nodes = None if cluster is None else load_document(cluster, Platform).nodes
    if cluster is not None and nodes is None:
        raise InvalidValue(f"{cluster} does not say which machines the cluster has.", hint="Give it a key `nodes`.")
    catalog = Home.from_environment().catalog()
    plans = [plan_training(job, catalog, nodes) for job in training_jobs(file)]
    if as_json:
        show_json([_as_json(one) for one in plans])
        return
    for one in plans:
        _show(one)


def training_jobs(file: Path) -> Sequence[TrainingJob]:
    """The job of a file, or those of its phases that train. InvalidValue where there are none."""
    job = load_job(file)
    jobs = job.phases if isinstance(job, PipelineJob) else (job,)
    found = [one for one in jobs if isinstance(one, PretrainJob | DistillJob)]
    if not found:
        raise InvalidValue(
            f"{file} trains nothing: its kind is {job.kind}.", hint="A plan is for pretrain and distill."
        )
    return found


def _show(plan: TrainingPlan) -> None:
    layout, tokens = plan.layout, plan.steps * plan.tokens_per_step
    sizes = f"{plan.parameters / 1e9:.2f}B parameters, {plan.active_parameters / 1e9:.2f}B of them in a token"
    facts = {
        "job": plan.job,
        "model": f"{plan.model}: {sizes}",
        "workers": _in_words(plan),
        "a step": f"{plan.tokens_per_step:,} tokens; all {plan.steps:,} are {_count(tokens)}",
    }
    if plan.gpu is not None and plan.speed is not None:
        speed = plan.speed
        assumed = f"{speed.assumed_mfu:.0%} of the peak (catalog/gpus.yaml)"
        facts |= {
            "cluster": f"{plan.gpus} x {plan.gpu.name}, of which {layout.workers} are used",
            "speed": f"{_count(speed.tokens_per_day)} a day, {speed.step_s:.1f} s a step",
            "the whole job": f"{speed.days:.1f} days, {speed.gpu_hours:,.0f} GPU-hours",
            "assumed": f"{assumed}, and {speed.slower_by:.2f} times as long for recomputing and waiting",
        }
    show_facts(facts)
    _show_memory(plan)


def _show_memory(plan: TrainingPlan) -> None:
    """The fullest stage at each moment; of the others the fullest moment alone."""
    at = plan.fullest
    moments = (at.loss, at.backward_begins, at.backward_ends)
    rows: list[list[Any]] = [
        [one.name, *(_gb(getattr(moment, one.name)) for moment in moments)] for one in fields(WorkerMemory)
    ]
    rows.append([Text(cell, "bold") for cell in ("together", *(_gb(moment.total) for moment in moments))])
    heads = ["a worker holds, in GB", "#at the loss", "#backward begins", "#backward ends"]
    show_table(heads, rows, title="")
    if len(plan.stages) > 1:
        each = ", ".join(_gb(stage.fullest.total) for stage in plan.stages)
        console.print(f"pipeline stages, each at its fullest: {each} GB")
    if plan.gpu is not None:
        usable = _gb(plan.gpu.memory_bytes * USABLE_SHARE)
        console.print(f"It fits: of each {plan.gpu.name} {usable} GB ({USABLE_SHARE:.0%}) may be used.")
    else:
        console.print("[dim]Speed, and whether it fits, are said for jobs on GPUs with a cluster file (-f).[/dim]")


def _in_words(plan: TrainingPlan) -> str:
    layout, axes = plan.layout, plan.layout.axes
    words = [f"{layout.workers}"]
    if axes.pipeline > 1:
        words.append(f"in {axes.pipeline} pipeline stages of {layout.of_stage}")
    if axes.context > 1:
        words.append(f"groups of {axes.context} share a sequence")
    if axes.expert > 1:
        words.append(f"groups of {axes.expert} share the experts")
    words.append("weights fully sharded" if layout.fully_sharded else "every worker has all other weights")
    return ", ".join(words)


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f}"


def _count(tokens: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{name} tokens"
    return f"{tokens:,.0f} tokens"


def _as_json(plan: TrainingPlan) -> dict[str, Any]:
    about = asdict(plan) | {"gpu": None if plan.gpu is None else plan.gpu.model_dump()}
    about["stages"] = [asdict(stage) | {"fullest_bytes": stage.fullest.total} for stage in plan.stages]
    return about
