"""Rotary position embedding (arXiv 2104.09864) and its context extensions: YaRN, Llama 3's, linear.

B batch, S sequence, H heads, C head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zenray.model.config import RopeParameters


def inverse_frequencies(
    rope: RopeParameters, head_dim: int, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Radians per position of each of the head_dim/2 pairs (float32), and the factor on cos and sin."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    wavelength_unit = rope.rope_theta**exponent  # wavelength = 2π · this, in positions
    frequencies = 1.0 / wavelength_unit
    if rope.rope_type == "linear":
        return frequencies / rope.factor, 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, wavelength_unit, head_dim), _yarn_attention_factor(rope)
    if rope.rope_type == "llama3":
        return _llama3(rope, frequencies), 1.0
    return frequencies, 1.0


def rotary_tables(
    rope: RopeParameters, head_dim: int, positions_BS: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos_BSC and sin_BSC for these positions. Angles are float32 whatever `dtype` is: bf16 cannot count past 256."""
    frequencies, factor = inverse_frequencies(rope, head_dim, positions_BS.device)
    angles = positions_BS[..., None].to(torch.float32) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x_BHSC: Tensor, cos_BSC: Tensor, sin_BSC: Tensor) -> Tensor:
    """Turn each pair (x[c], x[c + C/2]) by its position's angle."""
    first, second = x_BHSC.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BHSC * cos_BSC.unsqueeze(1) + turned * sin_BSC.unsqueeze(1)


def _yarn(rope: RopeParameters, wavelength_unit: Tensor, head_dim: int) -> Tensor:
    """YaRN section 3.2, "NTK-by-parts": pairs that turn more than beta_fast times within the old context keep their
    frequency, those that turn less than beta_slow times are slowed by `factor`, and a ramp joins the two."""
    context = rope.original_max_position_embeddings
    assert context is not None  # RopeParameters has checked it

    def pair_turning(times: float) -> float:
        """The (fractional) index of the pair that turns `times` times within the old context."""
        return head_dim * math.log(context / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(pair_turning(rope.beta_fast)), 0)
    high = min(math.ceil(pair_turning(rope.beta_slow)), head_dim - 1)
    pairs = torch.arange(head_dim // 2, dtype=torch.float32, device=wavelength_unit.device)
    slowed_share = ((pairs - low) / (high - low if high != low else 0.001)).clamp(0, 1)
    kept_share = 1 - slowed_share
    return (1.0 / (rope.factor * wavelength_unit)) * (1 - kept_share) + (1.0 / wavelength_unit) * kept_share


def _yarn_attention_factor(rope: RopeParameters) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor) + 1.0


def _llama3(rope: RopeParameters, frequencies: Tensor) -> Tensor:
    """Llama 3.1: pairs that turn often in the old context stay, those that hardly turn are slowed by `factor`."""
    context = rope.original_max_position_embeddings
    assert context is not None
    turns = context * frequencies / (2 * math.pi)  # within the old context
    kept_share = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept_share) * frequencies / rope.factor + kept_share * frequencies
