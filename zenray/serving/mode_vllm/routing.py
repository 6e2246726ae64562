"""Which experts a token takes, in the form of vLLM's expert layer: the same number of slots for every token.

T tokens, E experts, W slots per token. A slot without a taker has weight 0, so that its expert adds nothing. It still
costs that expert's time: slots are as few as is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 1e-5  # what a float32 softmax over thousands of experts may add up to above 1


def most_takers(cutoff_E: Tensor) -> int:
    """The most experts that one token can be taken by, when expert i takes it for a probability above cutoff_E[i].

    The probabilities of a token add up to 1, so the cut-offs of its takers add up to less: the lowest cut-offs that
    together stay below 1 are the most that fit. At least 1, for the layer needs a slot.
    """
    lowest_E = cutoff_E.to(torch.float64).sort().values.cumsum(dim=0)
    return max(1, int((lowest_E < 1 + _ROUNDING).sum()))


def choose(
    probs_TE: Tensor, slots: int, *, renormalize: bool, bias_E: Tensor | None = None, cutoff_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(weights_TW float32, experts_TW), the likeliest `slots` experts of each token, all different.

    `bias_E` moves the choice, not the weights (loss-free balancing). With `cutoff_E` only experts whose probability is
    above their cut-off have a weight (expert threshold); a token that none wants has only zeros.
    The same arithmetic as zenray.model.router outside of training.
    """
    wanted_TE = probs_TE if cutoff_E is None else probs_TE * (probs_TE > cutoff_E)
    if bias_E is None:
        weights_TW, experts_TW = wanted_TE.topk(slots, dim=-1)
    else:
        experts_TW = (wanted_TE + bias_E).topk(slots, dim=-1).indices
        weights_TW = wanted_TE.gather(-1, experts_TW)
    if renormalize:
        weights_TW = weights_TW / weights_TW.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return weights_TW, experts_TW
