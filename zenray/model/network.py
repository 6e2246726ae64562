"""The decoder: embedding, layers of attention and feed-forward with a residual each, and the output head.

B batch, S sequence, D hidden, V vocabulary. Parameter names are those of transformers' Qwen3-MoE.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from zenray.model.attention import Attention, KeyValueCache, causal_mask
from zenray.model.balance import RouterStats, router_loss
from zenray.model.blocks import BlockContext
from zenray.model.config import MoDEConfig
from zenray.model.experts import ExpertBank
from zenray.model.feed_forward import MixtureOfExperts, SwiGLU
from zenray.model.norm import RMSNorm
from zenray.model.rope import rotary_tables
from zenray.model.router import Router


class Masks(NamedTuple):
    """Where queries may look, for layers that see everything and for local ones; None is plain causal."""

    everywhere: Tensor | None = None
    local: Tensor | None = None


class DecoderLayer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: MoDEConfig, layer: int) -> None:
        super().__init__()
        self.is_local = layer in config.local_layers
        self.is_sparse = layer in config.sparse_layers
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: nn.Module
        if self.is_sparse:
            self.mlp = MixtureOfExperts(config, experts_choose=layer in config.expert_choice_layers)
        else:
            self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        masks: Masks,
        cache: KeyValueCache | None = None,
        valid_BS: Tensor | None = None,
        ids_BS: Tensor | None = None,
        grid_BL2: Tensor | None = None,
    ) -> tuple[Tensor, RouterStats | None]:
        mask = masks.local if self.is_local else masks.everywhere
        a_BSD, keys_BNLC, values_BNLC = self.self_attn(self.input_layernorm(x_BSD), rotary, mask, cache)
        x_BSD = x_BSD + a_BSD
        h_BSD = self.post_attention_layernorm(x_BSD)
        if self.is_sparse:
            context = BlockContext(keys_BNLC, values_BNLC, rotary, mask, ids_BS, grid_BL2)
            y_BSD, stats = self.mlp(h_BSD, valid_BS, context)
            return x_BSD + y_BSD, stats
        return x_BSD + self.mlp(h_BSD), None


class Decoder(nn.Module):
    """Tokens to normalised hidden states. `gradient_checkpointing` recomputes each layer in the backward pass."""

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = True
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        x_BSD: Tensor,
        positions_BS: Tensor,
        masks: Masks,
        cache: KeyValueCache | None = None,
        valid_BS: Tensor | None = None,
        ids_BS: Tensor | None = None,
        grid_BL2: Tensor | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        """Hidden states of embedded tokens, and the router's sums of each sparse layer, in order.

        Only experts of other kinds look at `ids_BS` (vocabulary) and `grid_BL2` (spatial: row and column of every
        position, the cached ones too, −1 off the grid).
        """
        rotary = rotary_tables(self.config.rope_parameters, self.config.head_dim, positions_BS, x_BSD.dtype)
        recompute = self.gradient_checkpointing and self.training and torch.is_grad_enabled() and cache is None
        all_stats = []
        for layer in self.layers:
            inputs = (x_BSD, rotary, masks)
            if recompute:
                x_BSD, stats = checkpoint(layer, *inputs, None, valid_BS, ids_BS, grid_BL2, use_reentrant=False)
            else:
                x_BSD, stats = layer(*inputs, cache, valid_BS, ids_BS, grid_BL2)
            if stats is not None:
                all_stats.append(stats)
        return self.norm(x_BSD), all_stats

    def routers(self) -> list[Router]:
        """One for each sparse layer, in order."""
        return [layer.mlp.gate for layer in self.layers if layer.is_sparse]

    def after_step(self, all_stats: list[RouterStats]) -> None:
        """Let every router learn what it learns without gradients: once per optimizer step, on the global batch's sums
        (and the mean of the cut-offs), one entry for each sparse layer."""
        for router, stats in zip(self.routers(), all_stats, strict=True):
            router.after_step(stats)


class MoDEOutput(NamedTuple):
    logits: Tensor  # (B, S, V)
    router_stats: list[RouterStats]  # one for each sparse layer, in order


class MoDE(nn.Module):
    """The whole network, as plain PyTorch. `zenray.model.hf` wraps the same modules for transformers."""

    def __init__(self, config: MoDEConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if self.lm_head.weight.device.type != "meta":
            initialize(self, config.initializer_range)

    def forward(self, ids_BS: Tensor, valid_BS: Tensor | None = None, grid_BS2: Tensor | None = None) -> MoDEOutput:
        """`valid_BS` is False at padding: not attended to, and not counted by the router's balancing. `grid_BS2`: row
        and column of each token, −1 off the grid, for spatial experts."""
        B, S = ids_BS.shape
        positions_BS = torch.arange(S, device=ids_BS.device).expand(B, S)
        masks = build_masks(self.config, S, valid_BS, ids_BS.device)
        h_BSD, stats = self.model(
            self.model.embed_tokens(ids_BS), positions_BS, masks, None, valid_BS, ids_BS, grid_BS2
        )
        return MoDEOutput(self.lm_head(h_BSD), stats)

    def router_loss(self, stats: list[RouterStats], loads: list[Tensor] | None = None) -> Tensor:
        """What the routers add to the training loss: the sum over layers (Switch). `loads`: global-batch counts."""
        parts = [
            router_loss(layer, self.config.router, None if loads is None else loads[index])
            for index, layer in enumerate(stats)
        ]
        return torch.stack(parts).sum() if parts else torch.zeros((), device=self.lm_head.weight.device)


def build_masks(config: MoDEConfig, length: int, valid_BS: Tensor | None, device: torch.device) -> Masks:
    """Masks for a whole sequence, without a cache."""
    everywhere = causal_mask(length, 0, valid_BL=valid_BS, device=device)
    if not config.local_layers:
        return Masks(everywhere)
    return Masks(everywhere, causal_mask(length, 0, window=config.sliding_window, valid_BL=valid_BS, device=device))


@torch.no_grad()
def initialize(model: nn.Module, std: float) -> None:
    """Normal(0, std) for every matrix; biases 0; norms keep their ones."""
    for module in model.modules():
        initialize_module(module, std)


@torch.no_grad()
def initialize_module(module: nn.Module, std: float) -> None:
    """`initialize` for the parameters that `module` itself owns."""
    if isinstance(module, nn.Linear | nn.Embedding | Router):
        nn.init.normal_(module.weight, std=std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ExpertBank):
        nn.init.normal_(module.gate_up_proj, std=std)
        nn.init.normal_(module.down_proj, std=std)
