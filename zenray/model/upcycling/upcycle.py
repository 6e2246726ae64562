"""Dense checkpoint folder in, MoDE checkpoint folder out: layer by layer, in the memory of one layer.

Everything outside the chosen FFNs is copied byte for byte. What is drawn depends on (seed, layer, expert) alone: not on
the machine either, so each expert is made by one thread (a sum's last bit depends on how many share it), two at once.

D hidden, E experts, I width of an expert.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from zenray.model.checkpoints.source import BESIDE_WEIGHTS
from zenray.model.config import MoDEConfig
from zenray.model.experts import runs
from zenray.model.feed_forward import MixtureOfExperts
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.upcycling.drop import DropMode, FeedForwardWeights, drop, seeded, some_neurons, widen
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
    with TensorWriter(output, plans, shard_bytes=shard_bytes) as writer, single_threads() as pool:
        done = 0
        for name, tensor in _tensors(dense, config, recipe, pool):
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
    for layer in range(config.num_hidden_layers):
        for name in dense.layer_names(layer):
            yield dense.tensors.plan(name)
        ffn_plans = dense.feed_forward_plans(layer)
        if layer in config.sparse_layers:
            yield from _sparse_plans(config, layer, ffn_plans[0].dtype)
        else:
            yield from ffn_plans


def _sparse_plans(config: MoDEConfig, layer: int, dtype: torch.dtype) -> Iterator[TensorPlan]:
    """All that a layer of experts has: its names and shapes are the network's own."""
    with torch.device("meta"):
        made = MixtureOfExperts(config, experts_choose=layer in config.expert_choice_layers)
    buffers = dict(made.named_buffers())
    for name, tensor in made.state_dict().items():
        kept = tensor.dtype if name in buffers else dtype
        yield TensorPlan(f"model.layers.{layer}.mlp.{name}", tuple(tensor.shape), kept)


def single_threads() -> ThreadPoolExecutor:
    """Two threads, in each of which torch computes on that one alone."""
    return ThreadPoolExecutor(2, "upcycling", initializer=torch.set_num_threads, initargs=(1,))


def _tensors(
    dense: DenseSource, config: MoDEConfig, recipe: UpcyclingRecipe, pool: Executor
) -> Iterator[tuple[str, Tensor]]:
    for name in dense.outer_names():
        yield name, dense.read(name)
    for layer in range(config.num_hidden_layers):
        for name in dense.layer_names(layer):
            yield name, dense.read(name)
        if layer not in config.sparse_layers:
            for plan in dense.feed_forward_plans(layer):
                yield plan.name, dense.read(plan.name)
        else:
            yield from _sparse_tensors(dense, layer, config, recipe, pool)


def _sparse_tensors(
    dense: DenseSource, layer: int, config: MoDEConfig, recipe: UpcyclingRecipe, pool: Executor
) -> Iterator[tuple[str, Tensor]]:
    """In a function of its own, so that a layer's experts are let go before the next one's are made."""
    made = make_layer(dense.feed_forward(layer), layer, recipe, config, pool)
    for plan in _sparse_plans(config, layer, made["gate.weight"].dtype):
        name = plan.name.removeprefix(f"model.layers.{layer}.mlp.")
        # What is not made has learnt nothing yet: thresholds, biases, the shared expert's gate.
        yield plan.name, made.pop(name) if name in made else torch.zeros(plan.shape, dtype=plan.dtype)
    assert not made, f"the network has no {', '.join(made)}"


def make_layer(
    ffn: FeedForwardWeights, layer: int, recipe: UpcyclingRecipe, config: MoDEConfig, pool: Executor
) -> dict[str, Tensor]:
    """What takes the place of one dense FFN: weights by their names in zenray.model.feed_forward.MixtureOfExperts.

    Depends on (seed, layer) and the weights alone. `config` is the recipe's, `pool` one of `single_threads`.
    """
    router, make_expert = pool.submit(_router_and_experts, ffn, layer, recipe, config).result()
    banks, places = _empty_banks(config, ffn.gate_ID.dtype)
    list(pool.map(make_expert, range(len(places)), places))
    made = {"gate.weight": router.to(ffn.gate_ID.dtype), **banks}
    if recipe.shared_expert_width:
        generator = seeded(recipe.seed, "layer", layer, "shared")
        shared = some_neurons(ffn, recipe.shared_expert_width, generator)
        for part, matrix in zip(("gate", "up", "down"), shared, strict=True):
            made[f"shared_expert.{part}_proj.weight"] = matrix
    return made


def _router_and_experts(
    ffn: FeedForwardWeights, layer: int, recipe: UpcyclingRecipe, config: MoDEConfig
) -> tuple[Tensor, Callable[[int, FeedForwardWeights], None]]:
    """The router (E, D) in float32, and what makes the expert of a number in its place."""
    count = len(recipe.drop_rates)
    if recipe.mode not in PARTITIONS:
        router = new_router(count, config.hidden_size, layer, recipe).repeat_interleave(recipe.granularity, dim=0)
        return router, partial(_copy, ffn, layer, recipe)
    generator = seeded(recipe.seed, "layer", layer, "partition")
    if recipe.mode == "kmeans":
        expert_I = balanced_kmeans(neuron_features(ffn), count, generator)
    else:
        expert_I = random_partition(ffn.width, count, generator)
    if recipe.router_init == "centroid":
        router = centroid_router(ffn, expert_I, count, recipe.router_std)
    else:
        router = new_router(count, config.hidden_size, layer, recipe)
    return router, partial(cut, ffn, expert_I, count)


def _copy(ffn: FeedForwardWeights, layer: int, recipe: UpcyclingRecipe, expert: int, place: FeedForwardWeights) -> None:
    """A copy of the FFN, or one of its `granularity` shards of consecutive neurons, with its share drawn anew."""
    parts = recipe.granularity
    copy, shard = divmod(expert, parts)
    gate_ID, up_ID = ffn.gate_ID.chunk(parts)[shard], ffn.up_ID.chunk(parts)[shard]
    down_DI = ffn.down_DI.chunk(parts, dim=1)[shard]
    generator = seeded(recipe.seed, "layer", layer, "expert", copy, "shard", shard)
    whole = FeedForwardWeights(gate_ID, up_ID, down_DI * parts if parts > 1 else down_DI)
    rate, mode = recipe.drop_rates[copy], cast(DropMode, recipe.mode)  # partitions do not copy
    drop(whole, mode, rate, generator, place.first(whole.width))
    widen(place, whole.width, generator)


def _empty_banks(config: MoDEConfig, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[FeedForwardWeights]]:
    """The weights of the banks, named as zenray.model.experts names them, and each expert's place in them:
    gate_up (E, 2I, D), gate rows first; down (E, D, I)."""
    runs_of, hidden, made = runs(config.expert_widths), config.hidden_size, {}
    places: list[FeedForwardWeights] = []
    for bank, (width, count) in enumerate(runs_of):
        stem = "experts." if len(runs_of) == 1 else f"experts.banks.{bank}."
        made[f"{stem}gate_up_proj"] = gate_up = torch.empty(count, 2 * width, hidden, dtype=dtype)
        made[f"{stem}down_proj"] = down = torch.empty(count, hidden, width, dtype=dtype)
        places += map(FeedForwardWeights, gate_up[:, :width], gate_up[:, width:], down)
    return made, places


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
