"""Expert-parallel training on two processes of one thread against one process of two threads, same batch, same model.

    python -m benchmarks.ep_training [--quick]

SmolLM2-135M upcycled to 4 experts, 2 for each token, in its last 6 layers; whole optimiser steps, float32, wall time,
the two sides in turn, the median of several steps each. Both losses must agree, or the program fails. `ep2_ratio` is
one process's time by that of two, above 1 where expert parallelism is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from benchmarks.report import print_report
from zenray.model.config import MoDEConfig, RopeParameters, RouterConfig, uniform_experts
from zenray.model.network import MoDE
from zenray.spec.training import PretrainJob
from zenray.training.data.stream import Batch
from zenray.training.mesh import Mesh
from zenray.training.trainer import Trainer

LENGTH = 256
LAYERS = 30


def network(layers: int) -> MoDE:
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
            sparse_layers=tuple(range(layers - 6, layers)),
            expert_groups=uniform_experts(4, 1536),
            router=RouterConfig(experts_per_token=2),
            rope_parameters=RopeParameters(rope_theta=100_000.0),
            tie_word_embeddings=True,
        )
    )


def job(sequences: int, passes: int, workers: int) -> PretrainJob:
    about: dict[str, Any] = {
        "kind": "pretrain",
        "name": "benchmark",
        "base": {"model": "none"},
        "into": {"model": "none", "version": "v1"},
        "data": {"sources": [{"domain": "prose", "builtin": "prose"}]},
        "steps": 100,
        "sequences_per_step": sequences * passes,
        "sequences_per_pass": sequences // workers,
        "workers": {"count": workers, "expert_parallel": workers},
        "activation_checkpointing": False,
    }
    return PretrainJob(**about)


def batch(sequences: int, number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    ids_BS = torch.randint(0, 49152, (sequences, LENGTH + 1), generator=generator)
    place = torch.arange(LENGTH).expand(sequences, LENGTH)
    return Batch(ids_BS[:, :-1], ids_BS[:, 1:], place, torch.zeros_like(place))


def part(whole: Batch, rank: int, world: int) -> Batch:
    return Batch(*(tensor.chunk(world)[rank] for tensor in vars(whole).values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 layers, fewer steps")
    options = parser.parse_args()
    layers, rounds = (8, 3) if options.quick else (LAYERS, 5)
    sequences, passes = 4, 2
    with tempfile.TemporaryDirectory() as folder:
        sides = {"one process, 2 threads": (1, 2), "EP 2, 1 thread each": (2, 1)}
        start = multiprocessing.get_context("spawn")
        turns = {name: [start.Barrier(world + 1) for _ in range(2)] for name, (world, _) in sides.items()}
        running = [
            start.Process(
                target=_rank_main,
                args=(rank, world, threads, folder, name, turns[name], layers, sequences, passes, rounds),
            )
            for name, (world, threads) in sides.items()
            for rank in range(world)
        ]
        for process in running:
            process.start()
        for _ in range(rounds + 1):
            for begin, end in turns.values():
                begin.wait()
                end.wait()
        for process in running:
            process.join()
            assert process.exitcode == 0
        found = {name: torch.load(_result(folder, name), weights_only=True) for name in sides}
    losses = [one["losses"] for one in found.values()]
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4), losses
    times = {name: statistics.median(one["times"][1:]) for name, one in found.items()}
    tokens = sequences * passes * LENGTH
    ratio = times["one process, 2 threads"] / times["EP 2, 1 thread each"]
    print_report(
        f"One optimiser step, {tokens:,} tokens, {layers} layers",
        ["side", "s / step", "tokens / s", "of it, gradients s"],
        [
            [name, time_s, tokens / time_s, statistics.median(found[name]["reduce"][1:])]
            for name, time_s in times.items()
        ],
        {"ep2_ratio": round(ratio, 3)},
    )


def _result(folder: str, name: str) -> Path:
    return Path(folder, f"{name.split(',')[0]}.pt")


def _rank_main(
    rank: int,
    world: int,
    threads: int,
    folder: str,
    name: str,
    turns: Any,
    layers: int,
    sequences: int,
    passes: int,
    rounds: int,
) -> None:
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    trainer = Trainer(network(layers), job(sequences, passes, world), Mesh.create(world))
    reduce_and_clip, reduced = trainer._reduce_and_clip, []

    def timed():  # type: ignore[no-untyped-def]
        started = time.perf_counter()
        norms = reduce_and_clip()
        reduced.append(time.perf_counter() - started)
        return norms

    trainer._reduce_and_clip = timed  # type: ignore[method-assign]
    times, losses = [], []
    for step in range(rounds + 1):
        batches = [part(batch(sequences, step * passes + number), rank, world) for number in range(passes)]
        turns[0].wait()
        started = time.perf_counter()
        losses.append(trainer.step(step, batches).loss)
        times.append(time.perf_counter() - started)
        turns[1].wait()
    if rank == 0:
        torch.save({"times": times, "losses": losses, "reduce": reduced}, _result(folder, name))


if __name__ == "__main__":
    main()
