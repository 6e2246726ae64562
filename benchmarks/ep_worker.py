"""Our sides of benchmarks.ep_training: one process of expert-parallel training, told by lines on standard input.

    python -m benchmarks.ep_worker FOLDER LAYERS SEQUENCES [sharded]

WORLD_SIZE processes form one expert group; each takes SEQUENCES in a pass. For every line read, one step is trained,
and answered with its seconds and its loss.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from zenray.model.config import MoDEConfig, RopeParameters, RouterConfig, uniform_experts
from zenray.model.network import MoDE
from zenray.spec.training import PretrainJob
from zenray.training.data.stream import Batch
from zenray.training.mesh import Mesh
from zenray.training.trainer import Trainer

LENGTH = 256


def network(layers: int) -> MoDE:
    """SmolLM2-135M's shape with Qwen3-MoE's norms of queries and keys, which transformers' class has."""
    torch.manual_seed(0)
    return MoDE(
        MoDEConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=layers,
            num_attention_heads=9,
            num_key_value_heads=3,
            head_dim=64,
            qk_norm=True,
            sparse_layers=tuple(range(layers - 6, layers)),
            expert_groups=uniform_experts(4, 1536),
            router=RouterConfig(experts_per_token=2, balance_loss="none"),
            rope_parameters=RopeParameters(rope_theta=100_000.0),
            tie_word_embeddings=True,
        )
    )


def peer_config(layers: int) -> dict[str, Any]:
    """The same network in transformers' words."""
    return {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": list(range(layers - 6)),
        "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
        "tie_word_embeddings": True,
        "router_aux_loss_coef": 0.0,
    }


def job(of_step: int, of_pass: int, workers: int) -> PretrainJob:
    about: dict[str, Any] = {
        "kind": "pretrain",
        "name": "benchmark",
        "base": {"model": "none"},
        "into": {"model": "none", "version": "v1"},
        "data": {"sources": [{"domain": "prose", "builtin": "prose"}]},
        "steps": 100,
        "sequences_per_step": of_step,
        "sequences_per_pass": of_pass,
        "workers": {"count": workers, "expert_parallel": workers},
        "optimisation": {"warmup_steps": 0, "final_share": 1.0},
        "activation_checkpointing": "none",
    }
    return PretrainJob(**about)


def batch(ids_BS: Tensor) -> Batch:
    """Sequences of one document each, and the token after every token."""
    place = torch.arange(LENGTH).expand(ids_BS.shape[0], LENGTH)
    none = torch.zeros_like(place)
    return Batch(ids_BS[:, :-1], ids_BS[:, 1:], place, document_BS=none, domain_BS=none)


def main() -> None:
    folder, layers, of_pass = Path(sys.argv[1]), *map(int, sys.argv[2:4])
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.set_flush_denormal(True)
    if world > 1:
        dist.init_process_group("gloo")
    model = network(layers)
    model.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    mesh = Mesh.create(world, fully_sharded=sys.argv[4:] == ["sharded"])
    batches = torch.load(folder / "batches.pt", weights_only=True)
    trainer = Trainer(model, job(batches.shape[1], of_pass, world), mesh)
    print(json.dumps({"ready": True}), flush=True)
    for step, _ in enumerate(sys.stdin):
        parts = [batch(ids.chunk(world)[rank]) for ids in batches[step].split(of_pass * world)]
        if world > 1:
            dist.barrier()
        started = time.perf_counter()
        loss = trainer.step(step, parts).lm_loss
        print(json.dumps({"time_s": time.perf_counter() - started, "loss": loss}), flush=True)


if __name__ == "__main__":
    main()
