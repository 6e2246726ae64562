"""The shape of a decoder network as plain numbers: counted in `catalog` without torch, built in `model`.

Enough to say a dense Llama or Qwen, a Qwen3-MoE, a Qwen2-MoE and a Mixtral exactly. Only what changes the number or
the shape of weights stands here: context length, RoPE and routing rules belong to whoever uses them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from zenray.spec.documents import Document


class BlockDimensions(Document):
    """Experts that are no FFN (ZIP-0414): `deep` and `spatial` ones attend once more, over the layer's own keys and
    values; a `vocabulary` one is a second embedding of the token, brought to the hidden size."""

    kind: Literal["deep", "vocabulary", "spatial"]
    experts: int = Field(1, ge=1, description="How many of the kind, all of one width.")
    width: int = Field(ge=1, description="Of the queries (deep, spatial), of the embedding (vocabulary).")


class MoeDimensions(Document):
    """The sparse part of a layer: a router over `experts`, `top_k` of which a token is sent to.

    They are SwiGLU networks, but for those in `blocks`, which come last in the router's order.
    """

    experts: int = Field(ge=1, description="Of all kinds.")
    top_k: int = Field(ge=1)
    expert_width: int | None = Field(None, ge=1, description="Intermediate width of every SwiGLU expert.")
    expert_widths: tuple[int, ...] | None = Field(None, description="Instead of `expert_width`: one width an expert.")
    blocks: tuple[BlockDimensions, ...] = Field((), description="Those of the experts that are no FFN.")
    shared_width: int = Field(0, ge=0, description="Width of the expert that every token passes; 0: there is none.")
    shared_gate: bool = Field(
        False, description="A sigmoid gate on the shared expert (Qwen2-MoE): hidden_size weights."
    )

    @model_validator(mode="after")
    def _possible(self) -> MoeDimensions:
        if self.top_k > self.experts:
            raise ValueError(f"top_k {self.top_k} is above experts {self.experts}")
        if (self.expert_width is None) == (self.expert_widths is None):
            raise ValueError("give either expert_width or expert_widths, and not both")
        blocks = sum(block.experts for block in self.blocks)
        if blocks >= self.experts:
            raise ValueError(f"{blocks} of {self.experts} experts are blocks: at least one must be an FFN")
        if self.expert_widths is not None:
            if len(self.expert_widths) != self.experts - blocks:
                of = f"{self.experts} experts, {blocks} of them blocks" if blocks else f"{self.experts} experts"
                raise ValueError(f"{len(self.expert_widths)} expert_widths for {of}")
            if min(self.expert_widths) < 1:
                raise ValueError(f"expert_widths must be at least 1, got {min(self.expert_widths)}")
        if self.shared_gate and not self.shared_width:
            raise ValueError("shared_gate needs a shared expert: shared_width is 0")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The intermediate width of each SwiGLU expert, in order."""
        if self.expert_widths is not None:
            return self.expert_widths
        assert self.expert_width is not None  # the validator above
        return (self.expert_width,) * (self.experts - sum(block.experts for block in self.blocks))

    def width_of_blocks(self, *kinds: str) -> int:
        """The widths of all blocks of some kinds, added up."""
        return sum(block.experts * block.width for block in self.blocks if block.kind in kinds)


class ModelDimensions(Document):
    """A pre-norm decoder: RMSNorm, grouped-query attention, and in each layer a dense or a sparse SwiGLU FFN."""

    vocab_size: int = Field(ge=1, description="Rows of the embedding, padding included.")
    hidden_size: int = Field(ge=1)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1, description="Query heads.")
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, description="Width of one head; heads × head_dim need not be hidden_size.")
    ffn_width: int = Field(0, ge=0, description="Intermediate width of the dense layers' FFN; 0: no layer is dense.")
    moe: MoeDimensions | None = Field(None, description="None: every layer is dense.")
    dense_layers: tuple[int, ...] = Field((), description="With `moe`: the layers (from 0) that keep a dense FFN.")
    tied_embeddings: bool = Field(False, description="The output head is the embedding.")
    qk_norm: bool = Field(False, description="RMSNorm over each query and key head (Qwen3): 2 × head_dim a layer.")
    qkv_bias: bool = Field(False, description="Bias on the query, key and value projections (Qwen2).")
    o_bias: bool = Field(False, description="Bias on the attention's output projection.")
    local_window_tokens: int | None = Field(None, ge=1, description="Attention window of the `local_layers`.")
    local_layers: tuple[int, ...] = Field((), description="Layers (from 0) that attend within the window only.")

    @model_validator(mode="after")
    def _possible(self) -> ModelDimensions:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: RoPE turns pairs")
        for name, chosen in (("dense_layers", self.dense_layers), ("local_layers", self.local_layers)):
            if list(chosen) != sorted(set(chosen)):
                raise ValueError(f"{name} must rise and name each layer once")
            if chosen and not 0 <= chosen[0] <= chosen[-1] < self.layers:
                raise ValueError(f"{name} {chosen[0]}…{chosen[-1]} is outside 0…{self.layers - 1}")
        if self.moe is None and self.dense_layers:
            raise ValueError("dense_layers is only for a model with moe: without it every layer is dense")
        for block in self.moe.blocks if self.moe else ():
            if block.kind != "vocabulary" and block.width % self.kv_width:
                raise ValueError(
                    f"the {block.kind} blocks' width {block.width} is not a multiple of kv_heads × head_dim, "
                    f"{self.kv_width}: their queries share the layer's keys"
                )
        if bool(self.local_layers) != (self.local_window_tokens is not None):
            raise ValueError("local_layers and local_window_tokens come together")
        has_dense_layer = len(self.sparse_layers) < self.layers
        if has_dense_layer and not self.ffn_width:
            raise ValueError("ffn_width is 0, but there are dense layers")
        if not has_dense_layer and self.ffn_width:
            raise ValueError(f"ffn_width {self.ffn_width} is used by no layer: all are sparse")
        return self

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers (from 0) whose FFN is a mixture of experts; empty for a dense model."""
        if self.moe is None:
            return ()
        dense = set(self.dense_layers)
        return tuple(layer for layer in range(self.layers) if layer not in dense)

    @property
    def q_width(self) -> int:
        """Output width of the query projection."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Output width of the key projection, and of the value projection."""
        return self.kv_heads * self.head_dim
