"""`config.json` of a MoDE model: the fields of MoDEConfig in Hugging Face's words."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from zenray.model.config import MoDEConfig

LOCAL, EVERYWHERE = "sliding_attention", "full_attention"


class ZenModeConfig(PreTrainedConfig):
    """Kept in step with MoDEConfig, which checks it: an impossible combination is refused here as there.

    `layer_types` (what transformers' caches and vLLM read) stands for MoDEConfig's `local_layers`.
    """

    model_type: ClassVar[str] = "zen_mode"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "router_stats"]

    vocab_size: int = 256
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    sparse_layers: list[int] | tuple[int, ...] = ()
    expert_groups: list[dict[str, Any]] | tuple[dict[str, Any], ...] = ()
    router: dict[str, Any] | None = None
    expert_choice_layers: list[int] | tuple[int, ...] = ()
    shared_expert_width: int = 0
    shared_expert_gate: bool = False
    max_position_embeddings: int = 4096
    rope_parameters: dict[str, Any] | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.layer_types is None:
            self.layer_types = [EVERYWHERE] * self.num_hidden_layers
        self.to_mode()  # refuses what cannot be built

    @classmethod
    def from_mode(cls, mode: MoDEConfig, **tokens: Any) -> ZenModeConfig:
        """The Hugging Face form of `mode`. `tokens`: pad_token_id, bos_token_id, eos_token_id, dtype."""
        values = asdict(mode)
        local = set(values.pop("local_layers"))
        layer_types = [LOCAL if layer in local else EVERYWHERE for layer in range(mode.num_hidden_layers)]
        rope = {name: value for name, value in values.pop("rope_parameters").items() if value is not None}
        for name in ("sparse_layers", "expert_choice_layers", "expert_groups"):
            values[name] = list(values[name])
        return cls(**values, layer_types=layer_types, rope_parameters=_used_rope_fields(rope), **tokens)

    def to_mode(self) -> MoDEConfig:
        """The network's own configuration. Raises InvalidValue for what cannot be built."""
        layer_types = self.layer_types or []
        router = self.router or {}
        if router:  # in versions from before it was a setting of its own, experts that choose followed `renormalize`
            router = {"expert_choice_renormalize": router.get("renormalize", True), **router}
        return MoDEConfig.from_dict(
            {
                "vocab_size": self.vocab_size,
                "hidden_size": self.hidden_size,
                "intermediate_size": self.intermediate_size,
                "num_hidden_layers": self.num_hidden_layers,
                "num_attention_heads": self.num_attention_heads,
                "num_key_value_heads": self.num_key_value_heads,
                "head_dim": self.head_dim,
                "sparse_layers": self.sparse_layers,
                "expert_groups": self.expert_groups,
                "router": router,
                "expert_choice_layers": self.expert_choice_layers,
                "shared_expert_width": self.shared_expert_width,
                "shared_expert_gate": self.shared_expert_gate,
                "max_position_embeddings": self.max_position_embeddings,
                "rope_parameters": self.rope_parameters or {},
                "sliding_window": self.sliding_window,
                "local_layers": [layer for layer, kind in enumerate(layer_types) if kind == LOCAL],
                "qk_norm": self.qk_norm,
                "attention_bias": self.attention_bias,
                "rms_norm_eps": self.rms_norm_eps,
                "tie_word_embeddings": self.tie_word_embeddings,
                "initializer_range": self.initializer_range,
            }
        )

    @property
    def num_experts(self) -> int:
        return sum(group["num_experts"] for group in self.expert_groups)

    @property
    def num_experts_per_tok(self) -> int:
        return self.to_mode().router.experts_per_token


_ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}


def _used_rope_fields(rope: dict[str, Any]) -> dict[str, Any]:
    """Only what the rope type reads; transformers warns about the rest."""
    names = ("rope_type", "rope_theta", *_ROPE_FIELDS[rope["rope_type"]])
    return {name: rope[name] for name in names if name in rope}
