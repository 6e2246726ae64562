"""Carries out an upcycling job: a published dense version in, published MoDE versions out."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

from zenray.model.config import MoDEConfig, RouterConfig
from zenray.model.hf.export import STOCK_FORMATS, choose_target, export
from zenray.model.upcycling.recipe import GroupRecipe, UpcyclingRecipe, select_layers
from zenray.model.upcycling.source import DenseSource
from zenray.model.upcycling.upcycle import upcycle
from zenray.spec.errors import InvalidValue
from zenray.spec.upcycling import UpcycleJob
from zenray.spec.versions import Manifest, Parents, VersionRef
from zenray.storage.base import ObjectStore, Progress
from zenray.storage.cache import fetch
from zenray.storage.versions import newest, publish, read_manifest


def run(
    job: UpcycleJob, store: ObjectStore, work_dir: Path, *, run: str | None = None, progress: Progress | None = None
) -> list[Manifest]:
    """Publish `job.into` in format `safetensors` (zen_mode), and in a stock class's format where the job asks for it.

    Blocks. `run`: the job's id, for the manifest. `work_dir` caches the base version, and holds the result until it is
    published. Idempotent: run again, the same bytes are made, and what is published already is left alone. Raises
    NotFound for an unknown base; InvalidValue for what cannot be made, before anything is written; Conflict when
    `job.into` exists with other bytes.
    """
    base = _base(job, store)
    work_dir.mkdir(parents=True, exist_ok=True)
    source = fetch(store, base, work_dir / "versions", progress=progress)
    dense = DenseSource(source).config
    recipe = make_recipe(job, dense)
    config = recipe.config(dense)
    wants_stock = _wants_stock(job, config)

    parents = Parents(base_version=str(base), training_job=job.name)
    metadata = {
        "kind": "upcycle",
        **({"run": run} if run else {}),
        "recipe": json.dumps(asdict(recipe)),
        "experts": str(config.num_experts),
        "experts_per_token": str(config.router.experts_per_token),
        **read_manifest(store, base).inherited,
    }
    with tempfile.TemporaryDirectory(dir=work_dir, prefix=f"{job.name}-") as scratch:
        made = Path(scratch, "safetensors")
        upcycle(source, recipe, made, progress=progress)
        ref = VersionRef(model=job.into.model, version=job.into.version)
        published = []
        if wants_stock:  # first, so that a version whose own format is there has all of its formats
            stock = Path(scratch, "stock")
            target = export(made, stock, replicate_dense=job.stock_format == "replicate", progress=progress)
            stock_ref = ref.model_copy(update={"format": STOCK_FORMATS[target]})
            about = {**metadata, "exported_from": str(ref)}
            published.append(publish(store, stock_ref, stock, parents=parents, metadata=about, progress=progress))
        return [publish(store, ref, made, parents=parents, metadata=metadata, progress=progress), *published]


def make_recipe(job: UpcycleJob, dense: MoDEConfig) -> UpcyclingRecipe:
    """What the job asks for, given the dense network. InvalidValue for layers that it does not have."""
    layers = select_layers(job.layers, dense.num_hidden_layers)
    chosen = job.expert_choice_layers
    if isinstance(chosen, str):  # words count among the sparse layers
        chosen = tuple(layers[place] for place in select_layers(chosen, len(layers)))
    router = job.router.model_dump()
    if router["expert_choice_renormalize"] is None:
        router["expert_choice_renormalize"] = job.router.renormalize
    return UpcyclingRecipe(
        groups=tuple(GroupRecipe(group.name, group.drop_rates(job.mode), group.width) for group in job.groups),
        layers=layers,
        mode=job.mode,
        granularity=job.granularity,
        router=RouterConfig(experts_per_token=job.experts_per_token, **router),
        expert_choice_layers=chosen,
        shared_expert_width=job.shared_expert_width,
        shared_expert_gate=job.shared_expert_gate,
        router_init=job.router_init or ("centroid" if job.mode == "kmeans" else "normal"),
        router_std=job.router_std,
        seed=job.seed,
    )


def _base(job: UpcycleJob, store: ObjectStore) -> VersionRef:
    if job.base.version is None:
        return newest(store, job.base.model, job.base.format).ref
    return VersionRef(model=job.base.model, version=job.base.version, format=job.base.format)


def _wants_stock(job: UpcycleJob, config: MoDEConfig) -> bool:
    """Whether to export. `replicate` insists; `exact` takes it where a stock class says the model as it is."""
    if job.stock_format == "none":
        return False
    try:
        choose_target(config, replicate_dense=job.stock_format == "replicate")
    except InvalidValue:
        if job.stock_format == "replicate":
            raise
        return False
    return True
