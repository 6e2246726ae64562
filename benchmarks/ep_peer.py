"""The other side of benchmarks.ep_training: transformers' own all-to-all expert parallelism, in its own environment.

    python ep_peer.py FOLDER SEQUENCES

One of WORLD_SIZE processes (RANK and MASTER_ADDR from the environment, as torchrun sets them), with nothing of zenray.
FOLDER holds `state.pt`, the weights of the other sides, and `batches.pt`; each process takes SEQUENCES in a pass.
Speaks the protocol of `ep_training`: for every line it reads it trains one step and answers with seconds and loss.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig


def main() -> None:
    folder, of_pass = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = load(folder, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    batches = torch.load(folder / "batches.pt", weights_only=True)
    print(json.dumps({"ready": True}), flush=True)
    for step, _ in enumerate(sys.stdin):
        dist.barrier()
        started = time.perf_counter()
        loss = train_step(model, optimizer, [ids.chunk(world)[rank] for ids in batches[step].split(of_pass * world)])
        print(json.dumps({"time_s": time.perf_counter() - started, "loss": loss}), flush=True)
    dist.destroy_process_group()


def load(folder: Path, world: int) -> Qwen3MoeForCausalLM:
    """Saved by the first process, then read by all with experts cut over them, as a user would."""
    config = Qwen3MoeConfig(**json.loads((folder / "config.json").read_text()))
    if dist.get_rank() == 0:
        whole = Qwen3MoeForCausalLM(config)
        whole.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
        whole.save_pretrained(folder / "transformers")
    dist.barrier()
    model = Qwen3MoeForCausalLM.from_pretrained(
        folder / "transformers",
        dtype=torch.float32,
        experts_implementation="grouped_mm",
        distributed_config=DistributedConfig(fsdp_size=world, ep_size=world, ep_implementation="all_to_all"),
    )
    model.train()
    assert any(isinstance(one, DTensor) for one in model.parameters())
    return model


def train_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, parts: list[torch.Tensor]) -> float:
    """Forward and backward of every pass, gradients clipped at 1, AdamW. FSDP averages over processes."""
    optimizer.zero_grad(set_to_none=True)
    total = torch.zeros(())
    for number, ids in enumerate(parts):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(number + 1 == len(parts))
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) / len(parts)
        loss.backward()
        total += loss.detach()
    gradients = [one.grad.to_local() if isinstance(one.grad, DTensor) else one.grad for one in model.parameters()]
    square = torch.stack([one.square().sum() for one in gradients]).sum()
    both = torch.stack([square, total])
    dist.all_reduce(both)
    torch._foreach_mul_(gradients, min(1.0, 1.0 / float(both[0].sqrt() + 1e-6)))
    optimizer.step()
    return float(both[1]) / dist.get_world_size()


if __name__ == "__main__":
    main()
