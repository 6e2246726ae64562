"""What a network of given dimensions has and does: parameters, FLOPs a token, bytes of weights and of KV cache.

Pure arithmetic on `ModelDimensions`, without torch; `tests/parity` holds it against instantiated models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from zenray.spec.dimensions import ModelDimensions, MoeDimensions
from zenray.spec.errors import InvalidValue, suggest


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


def lora_parameters(
    dimensions: ModelDimensions, rank: int, target_modules: Iterable[str] = (), target_parameters: Iterable[str] = ()
) -> int:
    """Trainable weights of a LoRA adapter: rank × (inputs + outputs) of each matrix. The targets are PEFT's.

    `target_modules` are ends of modules' names: `gate_proj` means the dense FFNs and the shared experts. Routed experts
    are no modules but parameters of each layer, two that hold them all, and so are the routers: `target_parameters`
    `mlp.experts.gate_up_proj` (where gate and up share their inputs' factor), `mlp.experts.down_proj` and
    `mlp.gate.weight`. InvalidValue for a target that the network does not have.
    """
    ends = 0
    for field, targets, known in (
        ("target_modules", target_modules, _module_ends(dimensions)),
        ("target_parameters", target_parameters, _parameter_ends(dimensions)),
    ):
        for target in targets:
            if target not in known:
                raise InvalidValue(
                    f"The network has no {field.removeprefix('target_')[:-1]} {target!r} that LoRA could adapt.",
                    hint=suggest(target, known),
                    param=field,
                )
            ends += known[target]
    return rank * ends


def _module_ends(dimensions: ModelDimensions) -> dict[str, int]:
    """By the end of its name, inputs plus outputs of all matrices that are modules."""
    hidden, moe, sparse = dimensions.hidden_size, dimensions.moe, len(dimensions.sparse_layers)
    attending = [(b.experts, b.width) for b in (moe.blocks if moe else ()) if b.kind != "vocabulary"]
    queries = dimensions.layers * (hidden + dimensions.q_width)
    queries += sparse * sum(experts * (hidden + width) for experts, width in attending)
    keys = dimensions.layers * (hidden + dimensions.kv_width)
    ends = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}
    dense = (dimensions.layers - sparse) * (hidden + dimensions.ffn_width)
    shared = sparse * (hidden + moe.shared_width) if moe and moe.shared_width else 0
    return ends | (dict.fromkeys(("gate_proj", "up_proj", "down_proj"), dense + shared) if dense + shared else {})


def _parameter_ends(dimensions: ModelDimensions) -> dict[str, int]:
    """The same of the matrices that are not: routers, and the experts' fused ones, each expert for itself."""
    hidden, moe, sparse = dimensions.hidden_size, dimensions.moe, len(dimensions.sparse_layers)
    if moe is None:
        return {}
    return {
        "mlp.gate.weight": sparse * (hidden + moe.experts),
        "mlp.experts.gate_up_proj": sparse * sum(hidden + 2 * width for width in moe.widths),
        "mlp.experts.down_proj": sparse * sum(hidden + width for width in moe.widths),
    }
