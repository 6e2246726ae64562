"""Causal grouped-query attention (arXiv 2305.13245), with optional query/key norm, local window and key/value cache.

B batch, S sequence, L past + S, D hidden, H heads, N key/value heads, C head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zenray.model.config import MoDEConfig
from zenray.model.linear import Linear
from zenray.model.norm import RMSNorm
from zenray.model.rope import rotate


class KeyValueCache(Protocol):
    """What attention needs of a cache; `transformers.Cache` satisfies it."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, N, S, C) of one layer; returns all of that layer's (B, N, L, C)."""
        ...


class Attention(nn.Module):
    def __init__(self, config: MoDEConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x_BSD: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the keys (rotated) and values (B, N, L, C) that it looked at.

        `mask`: (B or 1, 1, S, L), True where a query may look; None means plain causal without a past.
        """
        B, S, _ = x_BSD.shape
        q_BHSC = self.q_norm(self.q_proj(x_BSD).view(B, S, -1, self.head_dim)).transpose(1, 2)
        k_BNLC = self.k_norm(self.k_proj(x_BSD).view(B, S, -1, self.head_dim)).transpose(1, 2)
        v_BNLC = self.v_proj(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2)
        q_BHSC, k_BNLC = rotate(q_BHSC, *rotary), rotate(k_BNLC, *rotary)
        if cache is not None:
            k_BNLC, v_BNLC = cache.update(k_BNLC, v_BNLC, self.layer)
        y_BHSC, k_BNLC, v_BNLC = self.attend(q_BHSC, k_BNLC, v_BNLC, mask)
        return self.o_proj(y_BHSC.transpose(1, 2).reshape(B, S, -1)), k_BNLC, v_BNLC

    def attend(
        self, q_BHSC: Tensor, k_BNLC: Tensor, v_BNLC: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y_BHSC, and the keys and values that were looked at: where workers share a sequence, those of all of them."""
        is_causal = mask is None and q_BHSC.shape[2] > 1
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC, k_BNLC, v_BNLC, attn_mask=mask, is_causal=is_causal, enable_gqa=True
        )
        return y_BHSC, k_BNLC, v_BNLC


def causal_mask(
    length: int,
    past: int,
    *,
    window: int | None = None,
    valid_BL: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Where `length` new queries may look, after `past` earlier positions: (B or 1, 1, S, L) of bool, or None.

    None stands for "plain causal", which attention does without a mask. `window` counts the query's own position.
    `valid_BL` is False at padding; a padding query sees itself, so that its (unused) row is not 0/0.
    """
    if past == 0 and valid_BL is None and (window is None or window >= length):
        return None
    query = torch.arange(past, past + length, device=device)[:, None]
    key = torch.arange(past + length, device=device)[None, :]
    visible = key <= query
    if window is not None:
        visible = visible & (key > query - window)
    if valid_BL is None:
        return visible[None, None]
    visible = visible[None] & valid_BL.to(torch.bool)[:, None, :]
    return (visible | (key == query)[None])[:, None]
