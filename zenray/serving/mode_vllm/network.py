"""The whole network for vLLM: embedding, layers over pipeline stages, head, and the loading of a zen_mode checkpoint.

T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from zenray.model.config import MoDEConfig
from zenray.serving.mode_vllm.layers import Gate, MixtureOfExperts, SelfAttention, SwiGLU
from zenray.serving.mode_vllm.limits import check_servable
from zenray.serving.mode_vllm.weights import for_vllm


class DecoderLayer(nn.Module):
    """Pre-norm, the residual carried beside the hidden state so that vLLM's norm adds it in the same pass."""

    def __init__(self, vllm_config: VllmConfig, config: MoDEConfig, prefix: str) -> None:
        super().__init__()
        layer = extract_layer_index(prefix)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SelfAttention(vllm_config, config, layer, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp: nn.Module
        if layer in config.sparse_layers:
            self.mlp = MixtureOfExperts(vllm_config, config, layer, f"{prefix}.mlp")
        else:
            self.mlp = SwiGLU(vllm_config, config, config.intermediate_size, f"{prefix}.mlp")

    def forward(self, positions: Tensor, x_TD: Tensor, residual_TD: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual_TD is None:
            residual_TD, x_TD = x_TD, self.input_layernorm(x_TD)
        else:
            x_TD, residual_TD = self.input_layernorm(x_TD, residual_TD)
        x_TD = self.self_attn(positions, x_TD)
        x_TD, residual_TD = self.post_attention_layernorm(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class ZenModeDecoder(nn.Module):
    """Tokens to normalised hidden states; between pipeline stages, hidden state and residual."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config.to_mode()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: DecoderLayer(vllm_config, config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        if get_pp_group().is_first_rank:
            x_TD = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            residual_TD = None
        else:
            assert intermediate_tensors is not None
            x_TD, residual_TD = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            x_TD, residual_TD = layer(positions, x_TD, residual_TD)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": x_TD, "residual": residual_TD})
        x_TD, _ = self.norm(x_TD, residual_TD)
        return x_TD


class ZenModeForCausalLM(nn.Module, SupportsPP):
    """What vLLM makes of a checkpoint with `model_type: zen_mode`."""

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".mlp.gate_proj": (".mlp.gate_up_proj", 0),
            ".mlp.up_proj": (".mlp.gate_up_proj", 1),
            ".shared_expert.gate_proj": (".shared_expert.gate_up_proj", 0),
            ".shared_expert.up_proj": (".shared_expert.gate_up_proj", 1),
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_config
        self.mode: MoDEConfig = self.config.to_mode()
        check_servable(self.mode)
        self.quant_config = vllm_config.quant_config
        self.model = ZenModeDecoder(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.mode.vocab_size,
            self.mode.hidden_size,
            quant_config=self.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )
        if self.mode.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.mode.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """logits_TV of the last pipeline stage's hidden states."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Names of the parameters that were filled. A tensor that the network does not have is an error."""
        loaded = AutoWeightsLoader(self).load_weights(for_vllm(weights, self.mode), mapper=self.hf_to_vllm_mapper)
        for module in self.modules():
            if isinstance(module, Gate):
                module.after_loading()
        return loaded
