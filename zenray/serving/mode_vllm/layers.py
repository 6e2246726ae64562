"""The parts of a MoDE layer, made of vLLM's own, sharded over tensor-parallel and expert-parallel ranks.

Parameter names are those of zenray.model, but for projections that vLLM fuses.

T tokens, D hidden, E experts, W expert slots per token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope

from zenray.model.config import MoDEConfig
from zenray.serving.mode_vllm.routing import choose, most_takers


class SelfAttention(nn.Module):
    """Grouped-query attention over vLLM's paged cache, with a local window in the layers that have one."""

    def __init__(self, vllm_config: VllmConfig, config: MoDEConfig, layer: int, prefix: str) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.head_dim = config.head_dim
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        # This rank's share; with more ranks than key/value heads each rank has a copy of one.
        heads, kv_heads = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        self.sizes = [heads * config.head_dim, kv_heads * config.head_dim, kv_heads * config.head_dim]
        hf_config = vllm_config.model_config.hf_config
        self.rotary_emb = get_rope(
            config.head_dim, max_position=config.max_position_embeddings, rope_parameters=hf_config.rope_parameters
        )
        self.attn = Attention(
            heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window if layer in config.local_layers else None,
            prefix=f"{prefix}.attn",
        )
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, x_TD: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x_TD)[0].split(self.sizes, dim=-1)
        if self.qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x)), times sigmoid(x·w) where there is an `expert_gate` (Qwen2-MoE's shared expert)."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: MoDEConfig,
        width: int,
        prefix: str,
        *,
        reduce_results: bool = True,
        expert_gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [width] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width,
            config.hidden_size,
            bias=False,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()
        self.expert_gate = expert_gate

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD = self.down_proj(self.act_fn(self.gate_up_proj(x_TD)[0]))[0]
        return y_TD if self.expert_gate is None else F.sigmoid(self.expert_gate(x_TD)[0]) * y_TD


class Gate(GateLinear):
    """The router: logits in float32 whatever the model's dtype, and the choice where vLLM has none like it.

    Expert threshold: a token has as many takers as want it, so the layer has a slot for each that can
    (`most_takers`, from the thresholds of the checkpoint). Before the first training step there are no thresholds, and
    tokens choose, as in zenray.model.router.
    """

    def __init__(self, config: MoDEConfig, *, experts_choose: bool, prefix: str) -> None:
        super().__init__(
            config.hidden_size,
            config.num_experts,
            params_dtype=torch.float32,
            out_dtype=torch.float32,
            prefix=prefix,
        )
        self.slots = config.router.experts_per_token
        self.has_thresholds = False
        self.bias_E = self.cutoff_E = self.steps = None
        if experts_choose:
            self.cutoff_E = _state(torch.zeros(config.num_experts, dtype=torch.float32))
            self.steps = _state(torch.zeros((), dtype=torch.int64))
        elif config.router.selection_bias:
            self.bias_E = _state(torch.zeros(config.num_experts, dtype=torch.float32))

    @property
    def needs_own_choice(self) -> bool:
        """False for plain token choice, which vLLM's own router does, on a GPU in one fused kernel."""
        return self.bias_E is not None or self.cutoff_E is not None

    def after_loading(self) -> None:
        """Fix the number of slots from the loaded thresholds."""
        if self.steps is not None and int(self.steps):
            self.has_thresholds = True
            self.slots = most_takers(self.cutoff_E)

    def route(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """vLLM's custom routing function: (weights_TW, experts_TW)."""
        return choose(
            gating_output.to(torch.float32).softmax(dim=-1),
            self.slots,
            renormalize=renormalize,
            bias_E=self.bias_E,
            cutoff_E=self.cutoff_E if self.has_thresholds else None,
        )


class MixtureOfExperts(nn.Module):
    """Routed experts in vLLM's fused layer, all as wide as the widest, beside an optional shared one.

    Dropless: capacity, and with it the shared expert as a fallback, is a matter of training.
    """

    def __init__(self, vllm_config: VllmConfig, config: MoDEConfig, layer: int, prefix: str) -> None:
        super().__init__()
        ranks = get_tensor_model_parallel_world_size()
        if ranks > config.num_experts:
            raise ValueError(f"Tensor parallel size {ranks} is above the {config.num_experts} experts of a layer.")
        experts_choose = layer in config.expert_choice_layers
        router = config.router
        self.gate = Gate(config, experts_choose=experts_choose, prefix=f"{prefix}.gate")
        self.shared_expert_gate: nn.Module | None = None
        self.shared_expert: nn.Module | None = None
        if config.shared_expert_gate:
            self.shared_expert_gate = ReplicatedLinear(
                config.hidden_size, 1, bias=False, prefix=f"{prefix}.shared_expert_gate"
            )
        if config.shared_expert_width:
            self.shared_expert = SwiGLU(
                vllm_config,
                config,
                config.shared_expert_width,
                f"{prefix}.shared_expert",
                reduce_results=False,  # the expert layer adds it to the routed output, and reduces the sum
                expert_gate=self.shared_expert_gate,
            )
        self.experts = FusedMoEFactory(
            num_experts=config.num_experts,
            top_k=config.num_experts if experts_choose else router.experts_per_token,
            hidden_size=config.hidden_size,
            intermediate_size=max(config.expert_widths),
            renormalize=router.expert_choice_renormalize if experts_choose else router.renormalize,
            custom_routing_function=self.gate.route if self.gate.needs_own_choice else None,
            router_logits_dtype=torch.float32,
            quant_config=vllm_config.quant_config,
            gate=self.gate,
            shared_experts=self.shared_expert,
            prefix=f"{prefix}.experts",
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.experts(hidden_states=x_TD, router_logits=x_TD)  # it applies the gate itself


def _state(value: Tensor) -> nn.Parameter:
    """What a router has learnt without gradients; a parameter, because that is what vLLM's loaders fill."""
    return nn.Parameter(value, requires_grad=False)
