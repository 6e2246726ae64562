"""The catalog's arithmetic against instantiated models: transformers' and our own, on the meta device."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from zenray.catalog import Catalog, ModelEntry
from zenray.catalog.accounting import count_parameters, flops_per_token, kv_cache_bytes_per_token, lora_parameters
from zenray.model.config import MoDEConfig
from zenray.model.expert_lora import add_expert_lora
from zenray.model.hf import ZenModeConfig, ZenModeForCausalLM
from zenray.model.network import MoDE
from zenray.spec.dimensions import ModelDimensions

pytestmark = pytest.mark.parity

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "ffn_width": 11008,
}
QWEN3_06B = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "layers": 28,
    "heads": 16,
    "kv_heads": 8,
    "head_dim": 128,
    "ffn_width": 3072,
    "qk_norm": True,
    "tied_embeddings": True,
}
QWEN2_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "ffn_width": 18944,
    "qkv_bias": True,
}
QWEN3_30B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "layers": 48,
    "heads": 32,
    "kv_heads": 4,
    "head_dim": 128,
    "qk_norm": True,
    "moe": {"experts": 128, "top_k": 8, "expert_width": 768},
}
MIXTRAL_8X7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "head_dim": 128,
    "moe": {"experts": 8, "top_k": 2, "expert_width": 14336},
}
QWEN2_57B = {
    "vocab_size": 151936,
    "hidden_size": 3584,
    "layers": 28,
    "heads": 28,
    "kv_heads": 4,
    "head_dim": 128,
    "qkv_bias": True,
    "moe": {"experts": 64, "top_k": 8, "expert_width": 2560, "shared_width": 20480, "shared_gate": True},
}
REAL: dict[str, tuple[dict[str, Any], type[PreTrainedModel], int, float]] = {
    # dimensions, class, parameters, active parameters in billions as its makers give them
    "llama-2-7b": (LLAMA_2_7B, LlamaForCausalLM, 6_738_415_616, 6.74),
    "qwen3-0.6b": (QWEN3_06B, Qwen3ForCausalLM, 596_049_920, 0.6),
    "qwen2-7b": (QWEN2_7B, Qwen2ForCausalLM, 7_615_616_512, 7.6),
    "qwen3-30b-a3b": (QWEN3_30B, Qwen3MoeForCausalLM, 30_532_122_624, 3.3),
    "mixtral-8x7b": (MIXTRAL_8X7B, MixtralForCausalLM, 46_702_792_704, 12.9),
    "qwen2-57b-a14b": (QWEN2_57B, Qwen2MoeForCausalLM, 57_408_658_944, 14.2),
}


def transformers_config(d: ModelDimensions, kind: type[PreTrainedModel]) -> Any:
    """The dimensions in transformers' words."""
    values: dict[str, Any] = {
        "vocab_size": d.vocab_size,
        "hidden_size": d.hidden_size,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "intermediate_size": d.ffn_width or 1,
        "tie_word_embeddings": d.tied_embeddings,
        "head_dim": d.head_dim,
    }
    if d.moe is None:
        return {LlamaForCausalLM: LlamaConfig, Qwen2ForCausalLM: Qwen2Config, Qwen3ForCausalLM: Qwen3Config}[kind](
            **values
        )
    values |= {"num_experts_per_tok": d.moe.top_k, "num_local_experts": d.moe.experts}
    if kind is MixtralForCausalLM:
        return MixtralConfig(**values | {"intermediate_size": d.moe.expert_width})
    values |= {
        "num_experts": d.moe.experts,
        "moe_intermediate_size": d.moe.expert_width,
        "mlp_only_layers": list(d.dense_layers),
    }
    if kind is Qwen2MoeForCausalLM:
        return Qwen2MoeConfig(**values | {"shared_expert_intermediate_size": d.moe.shared_width})
    return Qwen3MoeConfig(**values)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())  # tied ones once


def routed(module: nn.Module) -> int:
    """Parameters of the fused experts."""
    return sum(p.numel() for name, p in module.named_parameters() if ".experts." in name)


@pytest.mark.parametrize("name", REAL)
def test_real_models_are_counted_to_the_last_weight(name: str) -> None:
    values, kind, total, active_b = REAL[name]
    dimensions = ModelDimensions.model_validate(values)
    with torch.device("meta"):
        model = kind(transformers_config(dimensions, kind))
    count = count_parameters(dimensions)
    assert count.total == parameters(model) == total
    assert count.routed_experts == routed(model)
    if dimensions.moe:
        share = dimensions.moe.top_k / dimensions.moe.experts
        assert count.active == parameters(model) - routed(model) + round(routed(model) * share)
    assert count.active / 1e9 == pytest.approx(active_b, rel=0.02)


def test_dense_layers_among_sparse_ones() -> None:
    values = QWEN3_30B | {"layers": 6, "dense_layers": [0, 3], "ffn_width": 6144}
    dimensions = ModelDimensions.model_validate(values)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(transformers_config(dimensions, Qwen3MoeForCausalLM))
    assert count_parameters(dimensions).total == parameters(model)


@pytest.mark.parametrize("entry", [e for e in Catalog.load() if e.variant_of is None], ids=lambda entry: entry.name)
def test_every_model_of_the_catalog_is_built_with_the_parameters_counted(entry: ModelEntry) -> None:
    assert entry.dimensions is not None
    with torch.device("meta"):
        model = MoDE(MoDEConfig.from_dimensions(entry.dimensions))
    assert parameters(model) == count_parameters(entry.dimensions).total


@pytest.mark.parametrize("name", ["zen-base-mode", "zen-pro-mode", "zen-max-mode"])
def test_the_zips_models_are_counted_with_their_blocks(name: str) -> None:
    dimensions = Catalog.load().get(name).dimensions
    assert dimensions is not None and dimensions.moe is not None
    assert {block.kind for block in dimensions.moe.blocks} == {"deep", "vocabulary", "spatial"}
    with torch.device("meta"):
        model = MoDE(MoDEConfig.from_dimensions(dimensions))
    count = count_parameters(dimensions)
    assert count.blocks == sum(p.numel() for name, p in model.named_parameters() if ".mlp.blocks." in name)
    assert count.routed_experts == routed(model)


TINY = {"vocab_size": 64, "hidden_size": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8}
TINY_MOE = {"experts": 4, "top_k": 2, "expert_width": 16}
TINY_MODELS: list[tuple[dict[str, Any], type[PreTrainedModel]]] = [
    (TINY | {"ffn_width": 48}, LlamaForCausalLM),
    (TINY | {"ffn_width": 48, "qkv_bias": True, "tied_embeddings": True}, Qwen2ForCausalLM),
    (TINY | {"moe": TINY_MOE, "ffn_width": 48, "dense_layers": [1], "qk_norm": True}, Qwen3MoeForCausalLM),
    (TINY | {"moe": TINY_MOE}, MixtralForCausalLM),
    (TINY | {"moe": TINY_MOE | {"shared_width": 24, "shared_gate": True}, "qkv_bias": True}, Qwen2MoeForCausalLM),
]


def tiny(values: dict[str, Any], kind: type[PreTrainedModel]) -> tuple[ModelDimensions, PreTrainedModel]:
    dimensions = ModelDimensions.model_validate(values)
    config = transformers_config(dimensions, kind)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    return dimensions, kind(config).eval()


@pytest.mark.parametrize(("values", "kind"), TINY_MODELS, ids=[kind.__name__ for _, kind in TINY_MODELS])
def test_flops_are_those_that_torch_counts(values: dict[str, Any], kind: type[PreTrainedModel]) -> None:
    dimensions, model = tiny(values, kind)
    tokens = 8
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None])
    # Eager attention computes the whole square: every token meets all `tokens`.
    assert counter.get_total_flops() == tokens * flops_per_token(dimensions, context_tokens=tokens)


BLOCKS: list[dict[str, Any]] = [
    {"kind": "deep", "experts": 2, "width": 32},
    {"kind": "vocabulary", "width": 24},
    {"kind": "spatial", "width": 16},
]


def test_blocks_cost_the_flops_that_torch_counts_and_no_cache() -> None:
    # Every expert sees every token, so that with and without blocks the FFN experts do the same.
    values = TINY | {"layers": 3, "ffn_width": 48, "dense_layers": [1]}
    with_blocks = ModelDimensions.model_validate(
        values | {"moe": TINY_MOE | {"experts": 8, "top_k": 8, "blocks": BLOCKS}}
    )
    without = ModelDimensions.model_validate(values | {"moe": TINY_MOE | {"top_k": 4}})
    model, tokens, cache = (
        ZenModeForCausalLM(ZenModeConfig.from_mode(MoDEConfig.from_dimensions(with_blocks))),
        8,
        DynamicCache(),
    )
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None], past_key_values=cache)  # this attention computes the whole square
    counted = sum(
        sum(flops.values())
        for module, flops in counter.get_flop_counts().items()
        if re.search(r"\.mlp\.blocks\.\d+$", module)
    )
    routers = 2 * 2 * 32 * (8 - 4)  # two sparse layers, four rows more
    more = flops_per_token(with_blocks, tokens) - flops_per_token(without, tokens) - routers
    assert counted == tokens * more > 0
    kept_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kept_bytes == tokens * kv_cache_bytes_per_token(with_blocks, bytes_per_value=4)


@pytest.mark.parametrize(("values", "kind"), TINY_MODELS, ids=[kind.__name__ for _, kind in TINY_MODELS])
def test_kv_cache_is_what_transformers_keeps(values: dict[str, Any], kind: type[PreTrainedModel]) -> None:
    dimensions, model = tiny(values, kind)
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.arange(8)[None], past_key_values=cache)
    kept_bytes = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    assert kept_bytes == 8 * kv_cache_bytes_per_token(dimensions, bytes_per_value=4)


ALL_PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], ALL_PROJECTIONS])
def test_lora_parameters_are_those_that_peft_trains(target_modules: list[str]) -> None:
    dimensions, model = tiny(TINY | {"ffn_width": 48}, LlamaForCausalLM)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=target_modules))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert trainable == lora_parameters(dimensions, 4, target_modules)


FUSED = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize(
    ("target_modules", "target_parameters"),
    [(ALL_PROJECTIONS, []), *(([], [target]) for target in FUSED), (["q_proj"], FUSED)],
)
def test_lora_on_a_mixture_trains_what_peft_trains(target_modules: list[str], target_parameters: list[str]) -> None:
    moe = TINY_MOE | {"experts": 8, "blocks": BLOCKS, "shared_width": 24}
    dimensions = ModelDimensions.model_validate(TINY | {"ffn_width": 48, "dense_layers": [1], "moe": moe})
    model = ZenModeForCausalLM(ZenModeConfig.from_mode(MoDEConfig.from_dimensions(dimensions)))
    lora = LoraConfig(r=4, target_modules=target_modules, target_parameters=target_parameters)
    trainable = sum(p.numel() for p in get_peft_model(model, lora).parameters() if p.requires_grad)
    assert trainable == lora_parameters(dimensions, 4, target_modules, target_parameters)


@pytest.mark.parametrize("entry", [e for e in Catalog.load() if e.claims.lora], ids=lambda entry: entry.name)
def test_claimed_lora_targets_are_parts_of_the_network(entry: ModelEntry) -> None:
    lora = entry.claims.lora
    assert entry.dimensions is not None and lora is not None
    with torch.device("meta"):
        model = MoDE(MoDEConfig.from_dimensions(entry.dimensions))
    ends = [f".{module}.weight" for module in lora.target_modules] + [f".{name}" for name in lora.target_parameters]
    found = {end: [p for name, p in model.named_parameters() if name.endswith(end)] for end in ends}
    assert all(found.values()), found
    trainable = sum(
        lora.rank * sum(p.shape[-2:]) * p.shape[:-2].numel() for parameters in found.values() for p in parameters
    )
    assert trainable == lora_parameters(entry.dimensions, lora.rank, lora.target_modules, lora.target_parameters)
    if FUSED[1] in lora.target_parameters:
        add_expert_lora(model, lora.rank, lora.alpha)
        ours = sum(p.numel() for name, p in model.named_parameters() if re.search(r"(gate_up|down)_[AB]$", name))
        assert ours == lora_parameters(entry.dimensions, lora.rank, [], FUSED[1:])
