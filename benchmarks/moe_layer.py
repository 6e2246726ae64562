"""The expert layer against transformers' `grouped_mm` experts: forward and backward, same weights, same routing.

    python -m benchmarks.moe_layer [--quick]

One thread, CPU time of this process, the two in turn, the best of several rounds: on a shared machine wall time says
little. At each shape both must give the same output and gradients, or the program fails. The ratio is transformers'
time by ours, above 1 where we are faster; of the two dtypes the JSON has the lower one. `eager`, transformers' loop,
is shown for orientation only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.report import print_report
from zenray.model.dispatch import assign_top_k
from zenray.model.experts import ExpertBank


@dataclass(frozen=True)
class Shape:
    hidden: int
    width: int
    experts: int
    k: int
    tokens: int


SHAPES = (Shape(256, 256, 8, 2, 2048), Shape(256, 128, 32, 4, 2048), Shape(512, 256, 64, 8, 1024))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # of the largest value


@dataclass
class Contest:
    """One shape and dtype: the layers, and a step (forward + backward) of each."""

    layers: dict[str, nn.Module]
    steps: dict[str, Callable[[], list[Tensor]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and without eager")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows, ratios = [], {}
    for shape in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            contest = make_contest(shape, dtype)
            check_equal(contest, TOLERANCE[dtype])
            best_s = measure(contest, ["ours", "grouped_mm"], rounds=5 if options.quick else 12)
            if not options.quick:
                best_s |= measure(contest, ["eager"], rounds=2)
            ratio = best_s["grouped_mm"] / best_s["ours"]
            ratios.setdefault(f"ratio_e{shape.experts}", []).append(ratio)
            times = [best_s[name] * 1e3 if name in best_s else "" for name in ("ours", "grouped_mm", "eager")]
            rows.append([f"{shape.experts}, top-{shape.k}", shape.tokens, str(dtype).split(".")[1], *times, ratio])
    print_report(
        "Expert layer, forward + backward, CPU ms",
        ["experts", "tokens", "dtype", "ours", "grouped_mm", "eager", "grouped_mm / ours"],
        rows,
        {name: round(min(found), 3) for name, found in ratios.items()},
    )


def make_contest(shape: Shape, dtype: torch.dtype) -> Contest:
    torch.manual_seed(0)
    x_TD = torch.randn(shape.tokens, shape.hidden).to(dtype)
    dy_TD = torch.randn(shape.tokens, shape.hidden).to(dtype)
    weights_TK, experts_TK = torch.randn(shape.tokens, shape.experts).softmax(-1).topk(shape.k, dim=-1)

    ours = ExpertBank(shape.experts, shape.hidden, shape.width)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.05)
    ours = ours.to(dtype)
    layers: dict[str, nn.Module] = {"ours": ours}
    for implementation in ("grouped_mm", "eager"):
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
        )
        config._experts_implementation = implementation
        layers[implementation] = Qwen3MoeExperts(config).to(dtype)
        layers[implementation].load_state_dict(ours.state_dict())

    def step(name: str) -> list[Tensor]:
        layer, x, weights = layers[name], x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        if name == "ours":  # sorting the choices is part of the layer for both
            y_TD = layer(x, assign_top_k(experts_TK, weights, shape.experts))
        else:
            y_TD = layer(x, experts_TK, weights.to(dtype))
        y_TD.backward(dy_TD)
        return [y_TD.detach(), x.grad, weights.grad, *(parameter.grad for parameter in layer.parameters())]

    return Contest(layers, {name: lambda name=name: step(name) for name in layers})


def check_equal(contest: Contest, tolerance: float) -> None:
    """Output and all gradients, relative to their largest value. AssertionError otherwise."""
    reference = contest.steps["grouped_mm"]()
    for one, other in zip(contest.steps["ours"](), reference, strict=True):
        difference = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert difference < tolerance, f"ours differs from grouped_mm by {difference:.1e} of the largest value"


def measure(contest: Contest, names: list[str], rounds: int) -> dict[str, float]:
    """The least CPU seconds of a step of each, taken in turn."""
    best_s = dict.fromkeys(names, float("inf"))
    for _ in range(rounds):
        for name in names:
            for parameter in contest.layers[name].parameters():
                parameter.grad = None
            start = time.process_time()
            contest.steps[name]()
            best_s[name] = min(best_s[name], time.process_time() - start)
    return best_s


if __name__ == "__main__":
    main()
