"""Experts of another kind behind the same router (ZIP-0414's diverse experts): deep, wide-vocabulary and spatial ones.

B batch, S sequence, T = B·S tokens, L past + S, D hidden, H heads, N key/value heads, C head size, V vocabulary.

    deep         one more hop of attention, over the keys and values that the layer has computed for all tokens
    vocabulary   a second embedding of the token, adapted to the hidden size
    spatial      attention within a token's neighbourhood on a grid (image patches); a token off the grid sees itself

What a block computes depends on other tokens, so it is computed for all of them, and only its output is gated by the
router. Deep and spatial blocks have queries and an output of their own but share the layer's keys and values: so every
token has them whether it was routed here or not, and no cache grows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zenray.model.config import BlockKind, ExpertGroup, MoDEConfig
from zenray.model.dispatch import Assignment
from zenray.model.rope import rotate
from zenray.spec.errors import InvalidValue


class BlockContext(NamedTuple):
    """What blocks may look at, beside their input."""

    keys_BNLC: Tensor  # rotated
    values_BNLC: Tensor
    rotary: tuple[Tensor, Tensor]  # of the S new positions
    mask: Tensor | None  # (B or 1, 1, S, L): where a query may look, or what is added to its scores; None: plain causal
    ids_BS: Tensor | None
    grid_BL2: Tensor | None  # row and column of each position, −1 off the grid; None: no position is on it


class DeepBlock(nn.Module):
    """Attention once more, with queries from the state after the layer's own attention."""

    def __init__(self, config: MoDEConfig, group: ExpertGroup) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, group.width, bias=False)
        self.o_proj = nn.Linear(group.width, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        return self.attend(x_BSD, context, context.mask)

    def attend(self, x_BSD: Tensor, context: BlockContext, mask: Tensor | None) -> Tensor:
        B, S, _ = x_BSD.shape
        q_BHSC = rotate(self.q_proj(x_BSD).view(B, S, -1, self.head_dim).transpose(1, 2), *context.rotary)
        y_BHSC = F.scaled_dot_product_attention(
            q_BHSC,
            context.keys_BNLC,
            context.values_BNLC,
            attn_mask=mask,
            is_causal=mask is None and S > 1,
            enable_gqa=True,
        )
        return self.o_proj(y_BHSC.transpose(1, 2).reshape(B, S, -1))


class SpatialBlock(DeepBlock):
    """As a deep block, among the earlier tokens at most `radius` rows and columns away."""

    def __init__(self, config: MoDEConfig, group: ExpertGroup) -> None:
        super().__init__(config, group)
        self.radius = group.radius

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        S, L = x_BSD.shape[1], context.keys_BNLC.shape[2]
        near = self.neighbours(S, L, context.grid_BL2, x_BSD.device)
        return self.attend(x_BSD, context, near if context.mask is None else _within(near, context.mask))

    def neighbours(self, length: int, total: int, grid_BL2: Tensor | None, device: torch.device) -> Tensor:
        """(B or 1, 1, S, L): earlier tokens near on the grid, and every token itself."""
        query = torch.arange(total - length, total, device=device)[:, None]
        key = torch.arange(total, device=device)[None, :]
        itself = (key == query)[None]
        if grid_BL2 is None:
            return itself[:, None]
        if grid_BL2.shape[1] != total:
            raise InvalidValue(
                f"The grid has {grid_BL2.shape[1]} positions, but there are {total}, those in the cache included.",
                param="grid_positions",
            )
        here_BS12, there_B1L2 = grid_BL2[:, total - length :, None, :], grid_BL2[:, None, :, :]
        close_BSL = ((here_BS12 - there_B1L2).abs() <= self.radius).all(dim=-1)
        on_grid_BSL = (here_BS12 >= 0).all(dim=-1) & (there_B1L2 >= 0).all(dim=-1)
        return ((close_BSL & on_grid_BSL & (key <= query)[None]) | itself)[:, None]


def _within(near: Tensor, mask: Tensor) -> Tensor:
    """`mask`, of either form, and nothing outside of `near`."""
    return near & mask if mask.dtype == torch.bool else torch.where(near, mask, float("-inf"))


class VocabularyBlock(nn.Module):
    """A token's second, wider or narrower embedding, brought to the hidden size."""

    def __init__(self, config: MoDEConfig, group: ExpertGroup) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, group.width)
        self.adapter = nn.Linear(group.width, config.hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, context: BlockContext) -> Tensor:
        if context.ids_BS is None:
            raise InvalidValue("A vocabulary expert needs token ids: embeddings alone were given.", param="input_ids")
        return self.adapter(self.embed_tokens(context.ids_BS)).to(x_BSD.dtype)


BLOCKS: dict[BlockKind, type[nn.Module]] = {
    "deep": DeepBlock,
    "vocabulary": VocabularyBlock,
    "spatial": SpatialBlock,
}


def make_blocks(config: MoDEConfig) -> nn.ModuleList:
    """One module for each expert that is a block, in the router's order; they come after the feed-forward experts."""
    return nn.ModuleList(
        BLOCKS[group.kind](config, group)
        for group in config.expert_groups
        if group.kind != "feed_forward"
        for _ in range(group.num_experts)
    )


def split_off_blocks(assignment: Assignment, num_blocks: int, num_tokens: int) -> tuple[Assignment, list[Tensor]]:
    """The rows of the feed-forward experts, and for each block the weight of every token (T,), 0 where it is not
    routed to it."""
    rows = assignment.rows_E.tolist()
    feed_forward = len(rows) - num_blocks
    start = sum(rows[:feed_forward])
    weights = []
    end = start
    for count in rows[feed_forward:]:
        part = slice(end, end + count)
        empty_T = assignment.weight_R.new_zeros(num_tokens)
        weights.append(empty_T.index_add(0, assignment.token_R[part], assignment.weight_R[part]))
        end += count
    kept = Assignment(
        token_R=assignment.token_R[:start],
        weight_R=assignment.weight_R[:start],
        rows_E=assignment.rows_E[:feed_forward],
        lost_T=assignment.lost_T,
    )
    return kept, weights
