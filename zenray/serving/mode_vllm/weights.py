"""From the tensors of a zen_mode checkpoint to what vLLM's loaders take: one tensor for each matrix of each expert.

E experts, D hidden, I width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from torch import Tensor
from torch.nn.functional import pad

from zenray.model.config import MoDEConfig
from zenray.model.experts import runs

_EXPERTS = re.compile(r"(?P<stem>.*\.mlp\.experts\.)(?:banks\.(?P<bank>\d+)\.)?(?P<kind>gate_up_proj|down_proj)")


def for_vllm(weights: Iterable[tuple[str, Tensor]], config: MoDEConfig) -> Iterator[tuple[str, Tensor]]:
    """Fused experts apart, narrower ones padded with zeros to the widest: silu(0)·0 = 0, so nothing changes.

    The router's temperature goes into its weight, in float32. All other tensors pass as they are.
    """
    for name, tensor in weights:
        match = _EXPERTS.fullmatch(name)
        if match is not None:
            yield from _one_by_one(match, tensor, config)
        elif name.endswith(".mlp.gate.weight"):
            yield name, tensor.float() / config.router.temperature
        else:
            yield name, tensor


def _one_by_one(match: re.Match[str], fused: Tensor, config: MoDEConfig) -> Iterator[tuple[str, Tensor]]:
    """`fused` is (E, 2I, D), gate rows first, or (E, D, I), of a whole layer or of one bank of equal widths."""
    first = sum(count for _, count in runs(config.expert_widths)[: int(match["bank"] or 0)])
    widest = max(config.expert_widths)
    for expert, matrix in enumerate(fused, start=first):
        stem = f"{match['stem']}{expert}."
        if match["kind"] == "down_proj":
            yield f"{stem}down_proj.weight", pad(matrix, (0, widest - matrix.shape[1]))
        else:
            gate, up = matrix.chunk(2)
            missing = (0, 0, 0, widest - gate.shape[0])
            yield f"{stem}gate_proj.weight", pad(gate, missing)
            yield f"{stem}up_proj.weight", pad(up, missing)
