"""Dense checkpoint folder in, MoDE checkpoint folder out: layer by layer, in the memory of one layer.

Everything outside the chosen FFNs is copied byte for byte. What is drawn depends on (seed, layer, expert) alone.

D hidden, E experts, I width of an expert.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

from zenray.model.checkpoints.source import BESIDE_WEIGHTS
from zenray.model.config import MoDEConfig
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.upcycling.drop import DropMode, FeedForwardWeights, drop, seeded
from zenray.model.upcycling.partition import (
    balanced_kmeans,
    centroid_router,
    cut,
    neuron_features,
    random_partition,
)
from zenray.model.upcycling.recipe import PARTITIONS, UpcyclingRecipe
from zenray.model.upcycling.source import DenseSource
from zenray.model.weights import TensorPlan, TensorWriter
from zenray.storage.base import Progress

RECORD_NAME = "upcycling.json"


def upcycle(
    source: Path,
    recipe: UpcyclingRecipe,
    output: Path,
    *,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> MoDEConfig:
    """Write the MoDE that `recipe` makes of the checkpoint in `source` into the new folder `output`. Blocks.

    `AutoModelForCausalLM` loads the result once `zenray.model.hf.register()` was called. Progress phase: "upcycle".
    Raises NotFound, InvalidValue, CorruptData; then `output` has no weights.
    """
    dense = DenseSource(source)
    config = recipe.config(dense.config)
    plans = list(_plans(dense, config))
    total = sum(plan.size_bytes for plan in plans)
    with TensorWriter(output, plans, shard_bytes=shard_bytes) as writer:
        done = 0
        for name, tensor in _tensors(dense, config, recipe):
            writer.write(name, tensor)
            done += tensor.nbytes
            del tensor  # not held while the next is made
            if progress:
                progress("upcycle", done, total)
        _write_config(dense, config, output, dtype=plans[0].dtype)
        _copy_companions(source, output)
        record = {"source_model_type": dense.hf_config.model_type, "recipe": asdict(recipe)}
        (output / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return config


def _plans(dense: DenseSource, config: MoDEConfig) -> Iterator[TensorPlan]:
    """What will be written, in the order of `_tensors`."""
    for name in dense.outer_names():
        yield dense.tensors.plan(name)
    experts = config.num_experts
    for layer in range(config.num_hidden_layers):
        for name in dense.layer_names(layer):
            yield dense.tensors.plan(name)
        ffn_plans = dense.feed_forward_plans(layer)
        if layer not in config.sparse_layers:
            yield from ffn_plans
            continue
        gate, width, hidden = ffn_plans[0], config.expert_widths[0], config.hidden_size
        prefix = f"model.layers.{layer}.mlp."
        yield TensorPlan(f"{prefix}gate.weight", (experts, hidden), gate.dtype)
        yield TensorPlan(f"{prefix}experts.gate_up_proj", (experts, 2 * width, hidden), gate.dtype)
        yield TensorPlan(f"{prefix}experts.down_proj", (experts, hidden, width), gate.dtype)


def _tensors(dense: DenseSource, config: MoDEConfig, recipe: UpcyclingRecipe) -> Iterator[tuple[str, Tensor]]:
    for name in dense.outer_names():
        yield name, dense.read(name)
    for layer in range(config.num_hidden_layers):
        for name in dense.layer_names(layer):
            yield name, dense.read(name)
        if layer not in config.sparse_layers:
            for plan in dense.feed_forward_plans(layer):
                yield plan.name, dense.read(plan.name)
        else:
            yield from _sparse_tensors(dense, layer, recipe)


def _sparse_tensors(dense: DenseSource, layer: int, recipe: UpcyclingRecipe) -> Iterator[tuple[str, Tensor]]:
    """In a function of its own, so that a layer's experts are let go before the next one's are made."""
    prefix = f"model.layers.{layer}.mlp."
    made = make_layer(dense.feed_forward(layer), layer, recipe)
    yield f"{prefix}gate.weight", made.router.to(made.down.dtype)
    yield f"{prefix}experts.gate_up_proj", made.gate_up
    yield f"{prefix}experts.down_proj", made.down


class Layer(NamedTuple):
    """What takes the place of one dense FFN."""

    gate_up: Tensor  # (E, 2I, D), gate rows first
    down: Tensor  # (E, D, I)
    router: Tensor  # (E, D), float32


def make_layer(ffn: FeedForwardWeights, layer: int, recipe: UpcyclingRecipe) -> Layer:
    """The experts and the router that `recipe` makes of one FFN. Depends on (seed, layer) and the weights alone."""
    count = len(recipe.drop_rates)
    if recipe.mode in PARTITIONS:
        generator = seeded(recipe.seed, "layer", layer, "partition")
        if recipe.mode == "kmeans":
            expert_I = balanced_kmeans(neuron_features(ffn), count, generator)
        else:
            expert_I = random_partition(ffn.width, count, generator)
        made: Iterable[FeedForwardWeights] = cut(ffn, expert_I, count)
        if recipe.router_init == "centroid":
            return _fused(made, count, centroid_router(ffn, expert_I, count, recipe.router_std))
    else:
        made = _copies(ffn, layer, recipe)
    router = new_router(count, ffn.gate_ID.shape[1], layer, recipe).repeat_interleave(recipe.granularity, dim=0)
    return _fused(made, count * recipe.granularity, router)


def _copies(ffn: FeedForwardWeights, layer: int, recipe: UpcyclingRecipe) -> Iterator[FeedForwardWeights]:
    """Copy after copy of the FFN, each in `granularity` shards of consecutive neurons, with its share drawn anew."""
    parts = recipe.granularity
    shards = list(zip(ffn.gate_ID.chunk(parts), ffn.up_ID.chunk(parts), ffn.down_DI.chunk(parts, dim=1), strict=True))
    for copy, rate in enumerate(recipe.drop_rates):
        for shard, (gate_ID, up_ID, down_DI) in enumerate(shards):
            generator = seeded(recipe.seed, "layer", layer, "expert", copy, "shard", shard)
            whole = FeedForwardWeights(gate_ID, up_ID, down_DI * parts if parts > 1 else down_DI)
            yield drop(whole, cast(DropMode, recipe.mode), rate, generator)  # k-means and random cut, and do not copy


def _fused(experts: Iterable[FeedForwardWeights], count: int, router: Tensor) -> Layer:
    gate_up, down = torch.empty(0), torch.empty(0)
    for index, (gate_ID, up_ID, down_DI) in enumerate(experts):
        width, hidden = gate_ID.shape
        if index == 0:
            gate_up, down = gate_ID.new_empty(count, 2 * width, hidden), down_DI.new_empty(count, hidden, width)
        gate_up[index, :width], gate_up[index, width:], down[index] = gate_ID, up_ID, down_DI
    return Layer(gate_up, down, router)


def new_router(count: int, hidden: int, layer: int, recipe: UpcyclingRecipe) -> Tensor:
    """First weights (E, D), float32: normal, uniform with its mean removed (Drop-Upcycling's code), or zero."""
    generator = seeded(recipe.seed, "layer", layer, "router")
    if recipe.router_init == "zero":
        return torch.zeros(count, hidden)
    if recipe.router_init == "normal":
        return torch.randn((count, hidden), generator=generator) * recipe.router_std
    drawn = torch.rand((count, hidden), generator=generator)
    drawn -= drawn.mean()
    return drawn * (recipe.router_std / drawn.std())


def _write_config(dense: DenseSource, config: MoDEConfig, output: Path, *, dtype: torch.dtype) -> None:
    tokens = {name: getattr(dense.hf_config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    hf = ZenModeConfig.from_mode(config, dtype=dtype, **tokens)
    hf.architectures = ["ZenModeForCausalLM"]
    hf.save_pretrained(output)


def _copy_companions(source: Path, output: Path) -> None:
    for name in BESIDE_WEIGHTS:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
