"""A network with what a run minimises: next-token loss and distance to teachers (`zenray.model.distillation`).

T tokens, B sequences of S tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from zenray.model.balance import RouterStats
from zenray.model.distillation import HeadLoss, Taught, head_loss
from zenray.model.network import Masks, MoDE
from zenray.training.data.stream import Batch


def hidden_states(model: MoDE, batch: Batch) -> tuple[Tensor, list[RouterStats]]:
    """(h_TD, router sums of each sparse layer) of packed sequences whose documents do not see one another."""
    h_BSD, stats = _decode(model, batch)
    return h_BSD.flatten(0, 1), stats


def _decode(model: MoDE, batch: Batch, x_BSD: Tensor | None = None) -> tuple[Tensor, list[RouterStats]]:
    """`x_BSD`: hidden states after the layers before the model's, where it is a later part of a network."""
    config = model.config
    masks = Masks(batch.mask(), batch.mask(config.sliding_window) if config.local_layers else None)
    x_BSD = model.model.embed_tokens(batch.ids_BS) if x_BSD is None else x_BSD
    found: tuple[Tensor, list[RouterStats]] = model.model(x_BSD, batch.positions_BS, masks, ids_BS=batch.ids_BS)
    return found


class Objective(nn.Module):
    """A network with its loss: the one module in whose forward pass every weight is used, the head's too.

    Without `has_head` a part of a network that others go on from: then it gives hidden states in place of a loss.
    """

    def __init__(self, model: MoDE, *, has_head: bool = True) -> None:
        super().__init__()
        self.model, self.has_head = model, has_head

    def forward(
        self,
        batch: Batch,
        teachers: Sequence[Taught] = (),
        *,
        distillation: float = 0.0,
        temperature: float = 1.0,
        x_BSD: Tensor | None = None,
    ) -> tuple[HeadLoss | Tensor, list[RouterStats]]:
        """`x_BSD`: what the part of the network before this one made of the batch."""
        h_BSD, stats = _decode(self.model, batch, x_BSD)
        if not self.has_head:
            return h_BSD, stats
        h_TD = h_BSD.flatten(0, 1)
        head_VD, labels_T = self.model.lm_head.weight, batch.labels_BS.flatten()
        loss = head_loss(h_TD, head_VD, labels_T, teachers, distillation=distillation, temperature=temperature)
        return loss, stats

    def hidden_states(self, batch: Batch) -> Tensor:
        """h_TD alone. Afterwards the head's weight is whole until the next pass."""
        return hidden_states(self.model, batch)[0]
