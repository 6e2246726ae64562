"""The shape of a decoder network as plain numbers: counted in `catalog` without torch, built in `model`.

Enough to say a dense Llama or Qwen, a Qwen3-MoE, a Qwen2-MoE and a Mixtral exactly. Only what changes the number or
the shape of weights stands here: context length, RoPE and routing rules belong to whoever uses them.
"""

from __future__ import annotations

from pydantic import Field, model_validator

from zenray.spec.documents import Document


class MoeDimensions(Document):
    """The sparse FFN of a layer: a router over `experts` SwiGLU experts, `top_k` of which see a token."""

    experts: int = Field(ge=1)
    top_k: int = Field(ge=1)
    expert_width: int | None = Field(None, ge=1, description="Intermediate width of every expert.")
    expert_widths: tuple[int, ...] | None = Field(None, description="Instead of `expert_width`: one width an expert.")
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
        if self.expert_widths is not None:
            if len(self.expert_widths) != self.experts:
                raise ValueError(f"{len(self.expert_widths)} expert_widths for {self.experts} experts")
            if min(self.expert_widths) < 1:
                raise ValueError(f"expert_widths must be at least 1, got {min(self.expert_widths)}")
        if self.shared_gate and not self.shared_width:
            raise ValueError("shared_gate needs a shared expert: shared_width is 0")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """The intermediate width of each expert, in order."""
        if self.expert_widths is not None:
            return self.expert_widths
        assert self.expert_width is not None  # the validator above
        return (self.expert_width,) * self.experts


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
