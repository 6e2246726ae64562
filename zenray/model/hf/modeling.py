"""The network as a `PreTrainedModel`: transformers' loading, saving, generation and caches around our modules.

B batch, S sequence, L past + S, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import ModelOutput

from zenray.model.balance import RouterStats, router_loss
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.network import Decoder, DecoderLayer, Masks, initialize_module
from zenray.spec.errors import InvalidValue


@dataclass
class ZenModeOutput(ModelOutput):
    """`loss` is the language-model loss plus `aux_loss`, the routers' share of it."""

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    router_stats: tuple[RouterStats, ...] | None = None


class ZenModeForCausalLM(PreTrainedModel, GenerationMixin):
    """The same parameters under the same names as `zenray.model.network.MoDE`.

    Whoever trains it by a loop of their own, transformers' Trainer included, must call `model.model.after_step(stats)`
    once per optimizer step: thresholds of experts that choose, and biases of loss-free balancing, learn only there.
    """

    config_class = ZenModeConfig
    config: ZenModeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _no_split_modules = [DecoderLayer.__name__]
    _skip_keys_device_placement = ["cache"]
    _supports_sdpa = True

    def __init__(self, config: ZenModeConfig) -> None:
        super().__init__(config)
        self.mode = config.to_mode()
        self.model = Decoder(self.mode)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialize_module(module, self.config.initializer_range)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        grid_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> ZenModeOutput:
        """Logits of the last `logits_to_keep` positions (0: all). `labels` (B, S), −100 ignored, add a loss.

        `grid_positions` (B, up to L, 2): row and column of each position from the first one on, −1 off the grid, for
        spatial experts; positions after them (generated text) are off the grid.
        """
        if output_hidden_states or output_attentions:
            raise InvalidValue(
                "This model does not return hidden states or attention weights.",
                hint="Register a forward hook on model.layers[i].",
                param="output_hidden_states",
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise InvalidValue("Give either input_ids or inputs_embeds.", param="input_ids")
        x_BSD = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        S = x_BSD.shape[1]
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + S, device=x_BSD.device)[None]
        masks = self._masks(x_BSD, attention_mask, past_key_values, position_ids)
        valid_BS = attention_mask[:, -S:] if attention_mask is not None and attention_mask.dim() == 2 else None
        if grid_positions is not None:
            total = S if past_key_values is None else past_key_values.get_seq_length() + S
            grid_positions = nn.functional.pad(grid_positions, (0, 0, 0, total - grid_positions.shape[1]), value=-1)
        h_BSD, stats = self.model(x_BSD, position_ids, masks, past_key_values, valid_BS, input_ids, grid_positions)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h_BSD[:, kept, :])
        loss = aux_loss = None
        if stats:
            aux_loss = torch.stack([router_loss(layer, self.mode.router) for layer in stats]).sum()
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss if aux_loss is None else loss + aux_loss
        return ZenModeOutput(
            loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=past_key_values, router_stats=tuple(stats)
        )

    def _masks(self, x_BSD: Tensor, attention_mask: Tensor | None, cache: Cache | None, position_ids: Tensor) -> Masks:
        about = {
            "config": self.config,
            "inputs_embeds": x_BSD,
            "attention_mask": attention_mask,
            "past_key_values": cache,
            "position_ids": position_ids,
        }
        everywhere = create_causal_mask(**about)
        if not self.mode.local_layers:
            return Masks(everywhere)
        return Masks(everywhere, create_sliding_window_causal_mask(**about))
