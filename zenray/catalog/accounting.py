"""What a network of given dimensions has and does: parameters, FLOPs a token, bytes of weights and of KV cache.

Pure arithmetic on `ModelDimensions`, without torch; `tests/parity` holds it against instantiated models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from zenray.spec.dimensions import ModelDimensions, MoeDimensions
from zenray.spec.errors import InvalidValue, suggest

_FFN_MODULES = ("gate_proj", "up_proj", "down_proj")
_EXPERTS = "mlp.experts.*."


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. `routed_active` is what a token meets on average when every expert is equally likely."""

    embedding: int
    head: int  # 0 when it is tied to the embedding
    attention: int  # the four projections
    biases: int
    dense_ffn: int
    router: int
    shared_experts: int  # with their gates
    routed_experts: int  # the FFNs behind the router
    routed_active: int
    blocks: int  # the experts behind it that are no FFN
    norms: int

    @property
    def total(self) -> int:
        return (
            self.embedding
            + self.head
            + self.attention
            + self.biases
            + self.dense_ffn
            + self.router
            + self.shared_experts
            + self.routed_experts
            + self.blocks
            + self.norms
        )

    @property
    def active(self) -> int:
        """Parameters that take part in one token: all but the FFNs that it is not sent to.

        Blocks count whole: they are computed for every token, and only their output is gated.
        """
        return self.total - self.routed_experts + self.routed_active


def count_parameters(dimensions: ModelDimensions) -> ParameterCount:
    """Every weight of the network. Routing buffers (bias, thresholds) are not weights and not counted."""
    dense, sparse = count_layer(dimensions, sparse=False), count_layer(dimensions, sparse=True)
    sparse_layers = len(dimensions.sparse_layers)
    dense_layers = dimensions.layers - sparse_layers

    def total_of(part: str) -> int:
        return dense_layers * int(getattr(dense, part)) + sparse_layers * int(getattr(sparse, part))

    embedding = dimensions.vocab_size * dimensions.hidden_size
    return ParameterCount(
        embedding=embedding,
        head=0 if dimensions.tied_embeddings else embedding,
        norms=total_of("norms") + dimensions.hidden_size,
        **{part: total_of(part) for part in _LAYER_PARTS},
    )


_LAYER_PARTS = (
    "attention",
    "biases",
    "dense_ffn",
    "router",
    "shared_experts",
    "routed_experts",
    "routed_active",
    "blocks",
)


def count_layer(dimensions: ModelDimensions, *, sparse: bool) -> ParameterCount:
    """One decoder layer. SwiGLU has three matrices; RMSNorms stand before attention and before the FFN.

    `sparse` with a dense model's dimensions, and the other way round, counts a layer that the model does not have.
    """
    hidden, moe = dimensions.hidden_size, dimensions.moe if sparse else None
    q, kv = dimensions.q_width, dimensions.kv_width
    return ParameterCount(
        embedding=0,
        head=0,
        attention=2 * hidden * q + 2 * hidden * kv,
        biases=(q + 2 * kv if dimensions.qkv_bias else 0) + (hidden if dimensions.o_bias else 0),
        dense_ffn=0 if moe else 3 * hidden * dimensions.ffn_width,
        router=hidden * moe.experts if moe else 0,
        shared_experts=3 * hidden * moe.shared_width + (hidden if moe.shared_gate else 0) if moe else 0,
        routed_experts=3 * hidden * sum(moe.widths) if moe else 0,
        routed_active=round(3 * hidden * sum(moe.widths) * moe.top_k / moe.experts) if moe else 0,
        blocks=2 * hidden * _block_queries(moe) + (dimensions.vocab_size + hidden) * _block_embeddings(moe),
        norms=2 * hidden + (2 * dimensions.head_dim if dimensions.qk_norm else 0),
    )


def _block_queries(moe: MoeDimensions | None) -> int:
    """Width of the queries of all blocks of a layer that attend; each block's output is as wide."""
    return moe.width_of_blocks("deep", "spatial") if moe else 0


def _block_embeddings(moe: MoeDimensions | None) -> int:
    return moe.width_of_blocks("vocabulary") if moe else 0


def flops_per_token(dimensions: ModelDimensions, context_tokens: int = 0) -> int:
    """Forward FLOPs of one token that attends to `context_tokens` tokens (itself included); training costs 3 ×.

    A multiply and an add are two. Counted are matrix products: 2 × the weights that the token meets (the head, not a
    look-up in an embedding), and scores and values of attention, 4 × the width of the queries × tokens in each layer,
    a spatial block's masked ones too. Norms, activations, softmax and RoPE are left out, as is usual.
    """
    count, sparse = count_parameters(dimensions), dimensions.sparse_layers
    head = dimensions.vocab_size * dimensions.hidden_size
    look_ups = count.embedding + dimensions.vocab_size * _block_embeddings(dimensions.moe) * len(sparse)
    weights = count.active - look_ups - count.head - count.norms - count.biases + head
    attended = _attended_tokens(dimensions, context_tokens)
    queries = dimensions.q_width * sum(attended)
    queries += _block_queries(dimensions.moe) * sum(attended[layer] for layer in sparse)
    return 2 * weights + 4 * queries


def kv_cache_bytes_per_token(dimensions: ModelDimensions, bytes_per_value: float = 2) -> int:
    """Keys and values of one token in all layers, local ones included. 2 bytes: bf16 or fp16."""
    return math.ceil(2 * dimensions.layers * dimensions.kv_width * bytes_per_value)


def kv_cache_bytes(dimensions: ModelDimensions, context_tokens: int, bytes_per_value: float = 2) -> int:
    """Keys and values of a sequence of `context_tokens`; a local layer keeps no more than its window."""
    kept = sum(_attended_tokens(dimensions, context_tokens))
    return math.ceil(2 * kept * dimensions.kv_width * bytes_per_value)


def _attended_tokens(dimensions: ModelDimensions, context_tokens: int) -> list[int]:
    """For each layer, how many tokens are within its reach."""
    local, window = set(dimensions.local_layers), dimensions.local_window_tokens or context_tokens
    return [min(context_tokens, window) if layer in local else context_tokens for layer in range(dimensions.layers)]


def weights_bytes(dimensions: ModelDimensions, bytes_per_parameter: float) -> int:
    """The whole network in one format."""
    return math.ceil(count_parameters(dimensions).total * bytes_per_parameter)


def lora_parameters(dimensions: ModelDimensions, rank: int, target_modules: Iterable[str]) -> int:
    """Trainable weights of a LoRA adapter: rank × (inputs + outputs) for each target matrix.

    `gate_proj`, `up_proj`, `down_proj` mean every FFN (dense, shared and each expert), with `mlp.experts.*.` before
    them only the routed experts; `mlp.gate` is the router. InvalidValue for a module that the network does not have.
    """
    return rank * sum(_lora_ends(dimensions, module) for module in target_modules)


def _lora_ends(dimensions: ModelDimensions, module: str) -> int:
    """Inputs plus outputs of all matrices that `module` means."""
    hidden, q, kv = dimensions.hidden_size, dimensions.q_width, dimensions.kv_width
    attention = {"q_proj": hidden + q, "k_proj": hidden + kv, "v_proj": hidden + kv, "o_proj": q + hidden}
    moe, sparse = dimensions.moe, len(dimensions.sparse_layers)
    experts = list(moe.widths) * sparse if moe else []
    others = [dimensions.ffn_width] * (dimensions.layers - sparse)
    if moe and moe.shared_width:
        others += [moe.shared_width] * sparse
    if module in attention:
        return dimensions.layers * attention[module]
    if module in _FFN_MODULES:
        return sum(hidden + width for width in (*experts, *others))
    if moe and module.removeprefix(_EXPERTS) in _FFN_MODULES:
        return sum(hidden + width for width in experts)
    if moe and module == "mlp.gate":
        return sparse * (hidden + moe.experts)
    known = (*attention, *_FFN_MODULES)
    if moe:
        known += ("mlp.gate", *(_EXPERTS + name for name in _FFN_MODULES))
    raise InvalidValue(
        f"The network has no module {module!r} that LoRA could adapt.",
        hint=suggest(module, known),
        param="target_modules",
    )
