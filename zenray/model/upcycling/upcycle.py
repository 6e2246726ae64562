"""Dense checkpoint folder in, MoDE checkpoint folder out: layer by layer, in the memory of one layer.

Everything outside the chosen FFNs is copied byte for byte. What is drawn depends on (seed, layer, expert) alone.

D hidden, E experts, I width of an expert.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from zenray.model.config import MoDEConfig
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.upcycling.drop import drop, seeded
from zenray.model.upcycling.recipe import UpcyclingRecipe
from zenray.model.upcycling.source import DenseSource
from zenray.model.weights import TensorPlan, TensorWriter
from zenray.storage.base import Progress

RECORD_NAME = "upcycling.json"
_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


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
        gate = ffn_plans[0]
        width, hidden = gate.shape
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
            continue
        prefix = f"model.layers.{layer}.mlp."
        gate_up, down = make_experts(dense, layer, recipe)
        yield f"{prefix}gate.weight", new_router(config, recipe, layer).to(down.dtype)
        yield f"{prefix}experts.gate_up_proj", gate_up
        yield f"{prefix}experts.down_proj", down


def make_experts(dense: DenseSource, layer: int, recipe: UpcyclingRecipe) -> tuple[Tensor, Tensor]:
    """Fused weights of one layer's experts: (E, 2I, D) with gate rows first, and (E, D, I)."""
    ffn = dense.feed_forward(layer)
    width, hidden = ffn.gate_ID.shape
    count = len(recipe.drop_rates)
    gate_up = ffn.gate_ID.new_empty(count, 2 * width, hidden)
    down = ffn.down_DI.new_empty(count, hidden, width)
    for expert, rate in enumerate(recipe.drop_rates):
        made = drop(ffn, recipe.mode, rate, seeded(recipe.seed, "layer", layer, "expert", expert))
        gate_up[expert, :width], gate_up[expert, width:], down[expert] = made
    return gate_up, down


def new_router(config: MoDEConfig, recipe: UpcyclingRecipe, layer: int) -> Tensor:
    """A router's first weights (E, D), float32: normal, or uniform with its mean removed (Drop-Upcycling's code)."""
    generator = seeded(recipe.seed, "layer", layer, "router")
    shape = (config.num_experts, config.hidden_size)
    if recipe.router_init == "normal":
        return torch.randn(shape, generator=generator) * recipe.router_std
    drawn = torch.rand(shape, generator=generator)
    drawn -= drawn.mean()
    return drawn * (recipe.router_std / drawn.std())


def _write_config(dense: DenseSource, config: MoDEConfig, output: Path, *, dtype: torch.dtype) -> None:
    tokens = {name: getattr(dense.hf_config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    hf = ZenModeConfig.from_mode(config, dtype=dtype, **tokens)
    hf.architectures = ["ZenModeForCausalLM"]
    hf.save_pretrained(output)


def _copy_companions(source: Path, output: Path) -> None:
    for name in _COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, output / name)
