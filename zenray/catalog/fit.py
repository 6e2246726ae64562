"""Widths that give a network its claimed totals, or the sum that shows that no widths can.

With T parameters in all and A active in a token, top-k of E equal experts: routed parameters X and the rest S satisfy
X + S = T and X·k/E + S = A, so X = (T − A) / (1 − k/E). S holds attention, embeddings, router, dense layers, the
shared expert, and the experts that are no FFN: every token pays for those (`accounting`).
"""

from __future__ import annotations

from zenray.catalog.accounting import ParameterCount, count_parameters
from zenray.spec.dimensions import ModelDimensions, MoeDimensions
from zenray.spec.errors import InvalidValue

TOLERANCE = 0.02


def fit_widths(dimensions: ModelDimensions, total: int, active: int, *, multiple: int = 64) -> ModelDimensions:
    """`dimensions` with the FFN width (dense), or expert and shared widths (mixture), that come nearest.

    Widths are multiples of `multiple`. All FFN experts get one width; everything else, blocks too, is kept.
    InvalidValue, with the sum, when total and active cannot both be met within 2 %.
    """
    if dimensions.moe is None:
        fitted = _fit_dense(dimensions, total, multiple)
    else:
        fitted = _fit_mixture(dimensions, dimensions.moe, total, active, multiple)
    count = count_parameters(fitted)
    if abs(count.total / total - 1) > TOLERANCE or abs(count.active / active - 1) > TOLERANCE:
        raise InvalidValue(_why_not(fitted, count, total, active))
    return fitted


def _fit_dense(dimensions: ModelDimensions, total: int, multiple: int) -> ModelDimensions:
    without = count_parameters(dimensions)
    rest = without.total - without.dense_ffn
    width = (total - rest) / (3 * dimensions.hidden_size * dimensions.layers)
    return _with(dimensions, ffn_width=max(multiple, _nearest(width, multiple)))


def _fit_mixture(
    dimensions: ModelDimensions, moe: MoeDimensions, total: int, active: int, multiple: int
) -> ModelDimensions:
    share = moe.top_k / moe.experts
    if share == 1:
        raise InvalidValue(f"All {moe.experts} experts see every token, so {total:,} parameters cannot be {active:,}.")
    per_width = len(dimensions.sparse_layers) * 3 * dimensions.hidden_size
    routed = (total - active) / (1 - share)
    width = max(multiple, _nearest(routed / (per_width * len(moe.widths)), multiple))
    bare = MoeDimensions(experts=moe.experts, top_k=moe.top_k, expert_width=width, blocks=moe.blocks)
    left = active - count_parameters(_with(dimensions, moe=bare)).active
    shared = max(0, _nearest(left / per_width, multiple))
    gate = moe.shared_gate and shared > 0
    return _with(dimensions, moe=bare.model_copy(update={"shared_width": shared, "shared_gate": gate}))


def _nearest(width: float, multiple: int) -> int:
    return multiple * round(width / multiple)


def _with(dimensions: ModelDimensions, **changes: object) -> ModelDimensions:
    return dimensions.model_copy(update=changes)


def _why_not(nearest: ModelDimensions, count: ParameterCount, total: int, active: int) -> str:
    came_to = f"the nearest widths come to {count.total / 1e9:.2f}B and {count.active / 1e9:.2f}B"
    claimed = f"{total / 1e9:g}B total and {active / 1e9:g}B active"
    if nearest.moe is None:
        return f"{claimed} cannot be met by the width of a dense FFN: {came_to}."
    k, experts = nearest.moe.top_k, nearest.moe.experts
    routed = (total - active) / (1 - k / experts)
    rest = count.active - count.routed_active
    return (
        f"{claimed} with {k} of {experts} experts cannot both be true: routed experts would be "
        f"({total / 1e9:g} − {active / 1e9:g}) / (1 − {k}/{experts}) = {routed / 1e9:.1f}B, which leaves "
        f"{(total - routed) / 1e9:.1f}B for the rest, and the rest is at least {rest / 1e9:.1f}B; {came_to}."
    )
