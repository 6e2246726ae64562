"""A dense checkpoint as upcycling reads it: any Llama- or Qwen-style folder, one layer at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from zenray.model.checkpoints.completeness import check
from zenray.model.config import MoDEConfig, RopeParameters
from zenray.model.upcycling.drop import FeedForwardWeights
from zenray.model.weights import TensorFolder, TensorPlan
from zenray.spec.errors import InvalidValue, NotFound, suggest

_BIASES = "Biases are supported on the query, key and value projections alone, as Qwen2 has them."
SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_FIELDS = RopeParameters.__dataclass_fields__


class DenseSource:
    """Configuration and tensors of a dense model in Hugging Face's layout. Reads lazily; keeps nothing.

    Raises NotFound; InvalidValue naming the field of `config.json` that this network cannot say; InvalidDocument for
    tensors that are missing, misshapen or quantized, or that the config does not speak of.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "config.json").is_file():
            raise NotFound(f"{folder} has no config.json: it is not a checkpoint in Hugging Face's layout.")
        self.folder = folder
        self.hf_config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        self.config = dense_config(self.hf_config)
        self.tensors = TensorFolder(folder)
        self._names = sorted(check(folder))  # without what old checkpoints saved though it is computed

    def layer_names(self, layer: int) -> list[str]:
        """The tensors of one layer other than its FFN's."""
        prefix = f"model.layers.{layer}."
        return [name for name in self._names if name.startswith(prefix) and not name.startswith(f"{prefix}mlp.")]

    def outer_names(self) -> list[str]:
        """The tensors outside the layers; without the head where it is tied to the embedding."""
        names = [name for name in self._names if not name.startswith("model.layers.")]
        tied = self.config.tie_word_embeddings
        return [name for name in names if not (tied and name == "lm_head.weight")]

    def feed_forward(self, layer: int) -> FeedForwardWeights:
        """One layer's FFN, in memory."""
        return FeedForwardWeights(*(self.tensors.read(plan.name) for plan in self.feed_forward_plans(layer)))

    def feed_forward_plans(self, layer: int) -> list[TensorPlan]:
        """Names and shapes of gate, up and down of one layer."""
        return [self.tensors.plan(f"model.layers.{layer}.mlp.{part}_proj.weight") for part in ("gate", "up", "down")]

    def read(self, name: str) -> Tensor:
        return self.tensors.read(name)


def dense_config(hf: PreTrainedConfig) -> MoDEConfig:
    """The dense network that a Llama- or Qwen-style `config.json` describes. InvalidValue for what we cannot say."""
    kind = hf.model_type
    if kind not in SUPPORTED:
        raise InvalidValue(f"A checkpoint of model_type {kind!r} cannot be upcycled.", hint=suggest(kind, SUPPORTED))
    _refuse(hf, "hidden_act", ("silu", "swish"))
    _refuse(hf, "mlp_bias", (False, None), hint=_BIASES)
    _refuse(hf, "pretraining_tp", (1, None))
    if kind != "qwen2":
        _refuse(hf, "attention_bias", (False, None), hint=_BIASES)
    heads = hf.num_attention_heads
    window = getattr(hf, "sliding_window", None)
    local = _local_layers(hf) if window is not None else ()
    return MoDEConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        max_position_embeddings=hf.max_position_embeddings,
        rope_parameters=_rope(hf.rope_parameters),
        sliding_window=window if local else None,
        local_layers=local,
        qk_norm=kind == "qwen3",
        attention_bias=kind == "qwen2",
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=bool(hf.tie_word_embeddings),
        initializer_range=getattr(hf, "initializer_range", 0.02),
    )


def _local_layers(hf: PreTrainedConfig) -> tuple[int, ...]:
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:  # Mistral: a window means everywhere
        return tuple(range(hf.num_hidden_layers))
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def _rope(parameters: dict[str, Any]) -> RopeParameters:
    unknown = [name for name, value in parameters.items() if name not in _ROPE_FIELDS and value is not None]
    if unknown:
        raise InvalidValue(f"rope_parameters has {', '.join(unknown)}, which this network does not have.")
    return RopeParameters(**{name: value for name, value in parameters.items() if value is not None})


def _refuse(hf: PreTrainedConfig, name: str, allowed: tuple[Any, ...], *, hint: str | None = None) -> None:
    value = getattr(hf, name, None)
    if value not in allowed and value is not None:
        raise InvalidValue(f"The checkpoint has {name} = {value!r}, which this network does not have.", hint=hint)
