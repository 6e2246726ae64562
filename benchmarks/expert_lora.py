"""Adapters on experts: ours against PEFT's `target_parameters`, forward and backward, same weights and factors.

    python -m benchmarks.expert_lora [--quick]

One thread, CPU time, the two in turn, the best of several rounds. The ratio is PEFT's time by ours. Memory is the
extra peak of a process that trains four such layers with AdamW, above what it held before its first step: ours by
PEFT's, below 1 where we need less.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from benchmarks.moe_layer import Shape
from benchmarks.report import print_report
from zenray.model.dispatch import assign_top_k
from zenray.model.expert_lora import LoRAExperts, to_peft
from zenray.model.experts import ExpertBank

RANK, ALPHA = 8, 16
SHAPES = {
    "ratio_e8_t2048": Shape(256, 256, 8, 2, 2048),
    "ratio_e32_t1024": Shape(256, 128, 32, 4, 1024),
    "ratio_e64_t512": Shape(512, 256, 64, 8, 512),
    "ratio_e64_t64": Shape(512, 256, 64, 8, 64),
}
MEMORY_SHAPE, MEMORY_LAYERS, MEMORY_STEPS = Shape(512, 256, 64, 8, 128), 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--memory-of", choices=("ours", "peft"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if options.memory_of:
        print(extra_peak_bytes(options.memory_of))
        return
    rows, result, distances = [], {}, []
    for name, shape in SHAPES.items():
        best_s, distance = race(shape, rounds=4 if options.quick else 10)
        distances.append(distance)
        result[name] = round(best_s["peft"] / best_s["ours"], 3)
        rows.append([shape.experts, shape.tokens, best_s["ours"] * 1e3, best_s["peft"] * 1e3, result[name]])
    ours, peft = (measure_memory(kind) for kind in ("ours", "peft"))
    result["memory_ratio"] = round(ours / peft, 3)
    result["distance"] = max(distances)
    print_report(
        f"Expert LoRA, rank {RANK}, float32, forward + backward of one layer, CPU ms",
        ["experts", "tokens", "ours", "PEFT", "PEFT / ours"],
        rows,
        result,
        notes=[
            f"Extra peak memory, 4 layers, 64 experts, 128 tokens: ours {ours >> 20} MiB, PEFT {peft >> 20} MiB.",
            f"Outputs and gradients are {max(distances):.1e} of their length apart, at most.",
        ],
    )


class PeftLayer(nn.Module):
    """transformers' experts as PEFT wraps them."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=shape.hidden,
            moe_intermediate_size=shape.width,
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
        )
        config._experts_implementation = "grouped_mm"
        self.experts = Qwen3MoeExperts(config)

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self.experts(x_TD, experts_TK, weights_TK)


def make_pair(shape: Shape) -> tuple[LoRAExperts, nn.Module]:
    """Ours and PEFT's with the same weights and factors."""
    base = ExpertBank(shape.experts, shape.hidden, shape.width)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.05)
    theirs = PeftLayer(shape)
    theirs.experts.load_state_dict(base.state_dict())
    ours = LoRAExperts(base, RANK, ALPHA)
    names = ["experts.gate_up_proj", "experts.down_proj"]
    adapted = get_peft_model(theirs, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names))
    factors = {"gate_up_proj": (ours.gate_up_A, ours.gate_up_B), "down_proj": (ours.down_A, ours.down_B)}
    for module in adapted.modules():
        part = getattr(module, "parameter_name", None)
        if part in factors:
            a, b = factors[part]
            nn.init.normal_(b, std=0.05)
            peft = to_peft(a.detach(), b.detach())
            module.lora_A["default"].weight.data.copy_(peft.lora_A)
            module.lora_B["default"].weight.data.copy_(peft.lora_B)
    return ours, adapted


def race(shape: Shape, rounds: int) -> tuple[dict[str, float], float]:
    """The least CPU seconds of a step of each, taken in turn, and how far the two are apart.

    The distance is of the whole tensors, ‖ours − PEFT's‖ / ‖PEFT's‖, the largest over the output and all gradients: of
    the input, the gate weights, and both factors of both matrices. That the two are equal is for tests/parity to show;
    here float32 sums over 512 numbers, in another order by another library. AssertionError above 1e-5.
    """
    torch.manual_seed(0)
    ours, theirs = make_pair(shape)
    x_TD, dy_TD = torch.randn(2, shape.tokens, shape.hidden)
    weights_TK, experts_TK = torch.randn(shape.tokens, shape.experts).softmax(-1).topk(shape.k, dim=-1)

    def step(name: str) -> list[Tensor]:
        x, weights = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        if name == "ours":
            y_TD = ours(x, assign_top_k(experts_TK, weights, shape.experts))
        else:
            y_TD = theirs(x, experts_TK, weights)
        y_TD.backward(dy_TD)
        return [y_TD.detach(), x.grad, weights.grad]

    pairs = zip(step("ours") + gradients_of_ours(ours), step("peft") + gradients_of_pefts(theirs), strict=True)
    distance = max(float((one - other).norm() / other.norm()) for one, other in pairs)
    assert distance <= 1e-5, f"ours differs from PEFT by {distance:.1e}"
    best_s = {"ours": float("inf"), "peft": float("inf")}
    for _ in range(rounds):
        for name, layer in (("ours", ours), ("peft", theirs)):
            layer.zero_grad()
            start = time.process_time()
            step(name)
            best_s[name] = min(best_s[name], time.process_time() - start)
    return best_s, distance


def gradients_of_ours(layer: LoRAExperts) -> list[Tensor]:
    """Of A and B of gate_up_proj, then of down_proj, in PEFT's layout."""
    return [
        *to_peft(layer.gate_up_A.grad, layer.gate_up_B.grad),
        *to_peft(layer.down_A.grad, layer.down_B.grad),
    ]


def gradients_of_pefts(layer: nn.Module) -> list[Tensor]:
    found = {part: module for module in layer.modules() if (part := getattr(module, "parameter_name", None))}
    return [
        factor["default"].weight.grad
        for part in ("gate_up_proj", "down_proj")
        for factor in (found[part].lora_A, found[part].lora_B)
    ]


def measure_memory(kind: str) -> int:
    """Extra peak bytes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.expert_lora", "--memory-of", kind]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(ran.stdout.strip().splitlines()[-1]))


def extra_peak_bytes(kind: str) -> int:
    """What training steps need above what is there before them: Linux's resident memory, its peak reset in between."""
    shape = MEMORY_SHAPE
    torch.manual_seed(0)
    layers = [make_pair(shape)[0 if kind == "ours" else 1] for _ in range(MEMORY_LAYERS)]
    gc.collect()
    weights_TK, experts_TK = torch.randn(shape.tokens, shape.experts).softmax(-1).topk(shape.k, dim=-1)
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters() if p.requires_grad], lr=1e-4)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = resident_bytes("VmRSS")
    for _ in range(MEMORY_STEPS):
        x = torch.randn(shape.tokens, shape.hidden)
        for layer in layers:
            if kind == "ours":
                x = x + layer(x, assign_top_k(experts_TK, weights_TK, shape.experts))
            else:
                x = x + layer(x, experts_TK, weights_TK)
        x.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the peak) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
