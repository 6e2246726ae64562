"""A MoDE checkpoint said in a class that transformers and vLLM already have: Qwen3-MoE or Mixtral, where that is exact.

Narrower experts are padded with zeros: silu(0)·0 = 0, so nothing changes. A dense layer can be said in Mixtral, which
has none, as experts that are all equal (`replicate_dense`): exact too, as their weights sum to 1, but each such layer
then takes the memory of E experts and the time of K.

E experts, D hidden, I width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from zenray.model.checkpoints.source import INDEX_NAME
from zenray.model.config import MoDEConfig
from zenray.model.experts import runs
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.weights import TensorFolder, TensorPlan, TensorWriter
from zenray.spec.errors import InvalidValue
from zenray.storage.base import Progress

Target = Literal["qwen3_moe", "mixtral"]
STOCK_FORMATS: dict[Target, str] = {"qwen3_moe": "qwen3-moe", "mixtral": "mixtral"}  # as formats of a version


def choose_target(config: MoDEConfig, *, replicate_dense: bool = False) -> Target:
    """The class that says `config` exactly. InvalidValue lists, for each class, what stands in the way."""
    obstacles = {
        "qwen3_moe": _obstacles_qwen3(config),
        "mixtral": _obstacles_mixtral(config, replicate_dense=replicate_dense),
    }
    for target in ("qwen3_moe", "mixtral"):
        if not obstacles[target]:
            return target
    reasons = "; ".join(f"{target}: {', '.join(found)}" for target, found in obstacles.items())
    raise InvalidValue(f"No stock class says this model exactly. {reasons}.", hint="Serve it as zen_mode.")


def export(
    source: Path,
    output: Path,
    *,
    replicate_dense: bool = False,
    shard_bytes: int = 5_000_000_000,
    progress: Progress | None = None,
) -> Target:
    """Write the zen_mode checkpoint in `source` as a stock checkpoint into the new folder `output`. Blocks.

    Streams one tensor at a time. Progress phase: "export". Raises InvalidValue when no class says it exactly.
    """
    kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind != ZenModeConfig.model_type:
        raise InvalidValue(f"{source} holds model_type {kind!r}, not {ZenModeConfig.model_type!r}.")
    hf = ZenModeConfig.from_pretrained(source)
    config = hf.to_mode()
    target = choose_target(config, replicate_dense=replicate_dense)
    exporter = _Exporter(TensorFolder(source), config, target)
    pieces = list(exporter.pieces())
    total = sum(piece.plan.size_bytes for piece in pieces)
    with TensorWriter(output, [piece.plan for piece in pieces], shard_bytes=shard_bytes) as writer:
        done = 0
        for piece in pieces:
            writer.write(piece.plan.name, piece.read())
            done += piece.plan.size_bytes
            if progress:
                progress("export", done, total)
        _stock_config(hf, config, target).save_pretrained(output)
        for path in source.iterdir():
            if path.is_file() and path.suffix != ".safetensors" and path.name not in (INDEX_NAME, "config.json"):
                shutil.copyfile(path, output / path.name)
    return target


def _obstacles(config: MoDEConfig) -> list[str]:
    """What neither class has."""
    found = []
    if not config.sparse_layers:
        found.append("there are no experts")
    if config.num_blocks:
        found.append(f"{config.num_blocks} experts that are not feed-forward")
    if config.shared_expert_width:
        found.append(f"a shared expert of width {config.shared_expert_width}")
    if config.local_layers:
        found.append(f"{len(config.local_layers)} layers of local attention")
    if config.attention_bias:
        found.append("attention biases")
    if config.expert_choice_layers:
        found.append(f"{len(config.expert_choice_layers)} layers where experts choose")
    if config.router.selection_bias:
        found.append("a selection bias in the router")
    if config.router.temperature != 1:
        found.append(f"a router temperature of {config.router.temperature}")
    return found


def _obstacles_qwen3(config: MoDEConfig) -> list[str]:
    return _obstacles(config) + ([] if config.qk_norm else ["no query/key norm"])


def _obstacles_mixtral(config: MoDEConfig, *, replicate_dense: bool) -> list[str]:
    found = _obstacles(config)
    if config.qk_norm:
        found.append("query/key norm")
    if not config.router.renormalize:
        found.append("gate weights that are not renormalised")
    dense = config.num_hidden_layers - len(config.sparse_layers)
    if dense and not replicate_dense:
        found.append(f"{dense} dense layers (replicate_dense says them as equal experts)")
    return found


@dataclass(frozen=True)
class _Piece:
    """One tensor of the output, and how to get it."""

    plan: TensorPlan
    read: Callable[[], Tensor]


class _Exporter:
    def __init__(self, tensors: TensorFolder, config: MoDEConfig, target: Target) -> None:
        self.tensors, self.config = tensors, config
        self.width = max(config.expert_widths)
        if target == "qwen3_moe":
            self.block, self.names = "mlp", ("gate_proj", "up_proj", "down_proj")
        else:
            self.block, self.names = "block_sparse_moe", ("w1", "w3", "w2")
            if len(config.sparse_layers) < config.num_hidden_layers:
                self.width = max(self.width, config.intermediate_size)
        self.replicates = target == "mixtral"

    def pieces(self) -> Iterator[_Piece]:
        """In the order of the network: outside the layers, then layer by layer."""
        inside = "model.layers."
        for name in self.tensors.names:
            if not name.startswith(inside):
                yield self._copy(name)
        for layer in range(self.config.num_hidden_layers):
            prefix = f"{inside}{layer}."
            for name in self.tensors.names:
                if name.startswith(prefix) and not name.startswith(f"{prefix}mlp."):
                    yield self._copy(name)
            if layer in self.config.sparse_layers:
                yield from self._sparse(layer)
            elif self.replicates:
                yield from self._replicated(layer)
            else:
                for part in ("gate_proj", "up_proj", "down_proj"):
                    yield self._copy(f"{prefix}mlp.{part}.weight")

    def _sparse(self, layer: int) -> Iterator[_Piece]:
        source = f"model.layers.{layer}.mlp."
        yield self._copy(f"{source}gate.weight", as_name=f"model.layers.{layer}.{self.block}.gate.weight")
        banks = runs(self.config.expert_widths)
        expert = 0
        for bank, (width, count) in enumerate(banks):
            stem = f"{source}experts." if len(banks) == 1 else f"{source}experts.banks.{bank}."
            for local in range(count):
                yield from self._expert(layer, expert, *self._readers(stem, local, width))
                expert += 1

    def _readers(self, stem: str, local: int, width: int) -> tuple[Callable[[], Tensor], ...]:
        def gate_up() -> Tensor:
            return self.tensors.read(f"{stem}gate_up_proj", row=local)

        def down() -> Tensor:
            return self.tensors.read(f"{stem}down_proj", row=local)

        return lambda: gate_up()[:width], lambda: gate_up()[width:], down

    def _replicated(self, layer: int) -> Iterator[_Piece]:
        """A dense FFN as experts that are all equal, under a router that cannot tell them apart."""
        source = f"model.layers.{layer}.mlp."
        gate_name = f"{source}gate_proj.weight"
        dtype = self.tensors.plan(gate_name).dtype
        shape = (self.config.num_experts, self.config.hidden_size)
        plan = TensorPlan(f"model.layers.{layer}.{self.block}.gate.weight", shape, dtype)
        yield _Piece(plan, lambda: torch.zeros(shape, dtype=dtype))
        readers = [
            lambda name=f"{source}{part}_proj.weight": self.tensors.read(name) for part in ("gate", "up", "down")
        ]
        for expert in range(self.config.num_experts):
            yield from self._expert(layer, expert, *readers)

    def _expert(self, layer: int, expert: int, *readers: Callable[[], Tensor]) -> Iterator[_Piece]:
        """Gate, up and down of one expert, padded with zeros to the common width."""
        hidden, width = self.config.hidden_size, self.width
        dtype = self.tensors.plan("model.embed_tokens.weight").dtype
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        for name, read, shape in zip(self.names, readers, shapes, strict=True):
            plan = TensorPlan(f"model.layers.{layer}.{self.block}.experts.{expert}.{name}.weight", shape, dtype)
            yield _Piece(plan, partial(_read_padded, read, shape))

    def _copy(self, name: str, as_name: str | None = None) -> _Piece:
        plan = self.tensors.plan(name)
        return _Piece(TensorPlan(as_name or name, plan.shape, plan.dtype), lambda: self.tensors.read(name))


def _read_padded(read: Callable[[], Tensor], shape: tuple[int, int]) -> Tensor:
    return _padded(read(), shape)


def _padded(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    if tuple(tensor.shape) == shape:
        return tensor
    padded = tensor.new_zeros(shape)
    padded[: tensor.shape[0], : tensor.shape[1]] = tensor
    return padded


def _stock_config(hf: ZenModeConfig, config: MoDEConfig, target: Target) -> PreTrainedConfig:
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range,
        "rope_parameters": dict(hf.rope_parameters or {}),
        "num_experts_per_tok": config.router.experts_per_token,
        "router_aux_loss_coef": config.router.balance_coefficient,
        "pad_token_id": hf.pad_token_id,
        "bos_token_id": hf.bos_token_id,
        "eos_token_id": hf.eos_token_id,
        "dtype": hf.dtype,
    }
    widest = max(config.expert_widths)
    stock: PreTrainedConfig
    if target == "qwen3_moe":
        dense = [layer for layer in range(config.num_hidden_layers) if layer not in config.sparse_layers]
        stock = Qwen3MoeConfig(
            **common,
            intermediate_size=config.intermediate_size,
            moe_intermediate_size=widest,
            num_experts=config.num_experts,
            norm_topk_prob=config.router.renormalize,
            mlp_only_layers=dense,
            use_sliding_window=False,
        )
        stock.architectures = ["Qwen3MoeForCausalLM"]
        return stock
    if len(config.sparse_layers) < config.num_hidden_layers:
        widest = max(widest, config.intermediate_size)
    stock = MixtralConfig(**common, intermediate_size=widest, num_local_experts=config.num_experts, sliding_window=None)
    stock.architectures = ["MixtralForCausalLM"]
    return stock
