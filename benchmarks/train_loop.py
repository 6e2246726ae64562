"""What the platform costs around a training step: Ray Train and our loop against bare PyTorch, and checkpoints.

    python -m benchmarks.train_loop [--quick]

The bare side is a plain loop in a plain process: the same network, loss and batches, backward, clip, fused AdamW.
Ours is `zenray.training.loop` in a Ray Train worker, with its events, routing statistics and reports. Each has one
thread, and they take turns step by step, so that both meet the same machine. `overhead_ratio` is the median over pairs
of our wall time by the bare one's.

Every other block of our steps begins with a checkpoint of the whole state (weights and both moments), taken, written
and sent to a store while the block goes on. `checkpoint_ratio` is 1 + the time that such a block takes longer than its
neighbour of ours, by a minute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from benchmarks.report import print_report
from zenray.model.config import MoDEConfig, RouterConfig, uniform_experts
from zenray.model.distillation import head_loss
from zenray.model.network import MoDE
from zenray.spec.training import Checkpoints, PretrainJob
from zenray.storage.local import LocalStore
from zenray.training.data.stream import PackedDomain, SequenceStream
from zenray.training.data.tokens import DomainTokens
from zenray.training.events import EventPlace, EventStream
from zenray.training.loop import TrainingSet, train
from zenray.training.loss import hidden_states
from zenray.training.notice import Notice, watch_in_actor
from zenray.training.trainer import Trainer
from zenray.training.uploads import RayRecorder

TIMES_NAME = "times.json"
VOCABULARY, LENGTH, SEQUENCES = 8192, 256, 8
CONFIG = MoDEConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
    sparse_layers=tuple(range(6)),
    expert_groups=uniform_experts(8, 512),
    router=RouterConfig(experts_per_token=2),
    tie_word_embeddings=True,
)
Times = tuple[float, float]  # seconds of wall and of CPU time


def _now() -> Times:
    return time.perf_counter(), time.process_time()


def _since(start: Times) -> Times:
    now = _now()
    return now[0] - start[0], now[1] - start[1]


def job(steps: int, checkpoint_every: int) -> PretrainJob:
    about: dict[str, Any] = {
        "kind": "pretrain",
        "name": "benchmark",
        "base": {"model": "none"},
        "into": {"model": "none", "version": "v1"},
        "data": {"sources": [{"domain": "noise", "builtin": "prose"}], "sequence_tokens": LENGTH},
        "steps": steps,
        "sequences_per_step": SEQUENCES,
        "sequences_per_pass": SEQUENCES,
        "optimisation": {"warmup_steps": 0},
        "checkpoints": {"every_steps": checkpoint_every},
        "evaluation": {"sequences": 0},
        "activation_checkpointing": False,
    }
    return PretrainJob(**about)


def data() -> TrainingSet:
    tokens = torch.randint(0, VOCABULARY, (60_000,), generator=torch.Generator().manual_seed(0)).numpy()
    documents = DomainTokens("noise", tokens, torch.arange(0, 60_001, 500).numpy())
    return TrainingSet(SequenceStream([PackedDomain(documents, LENGTH, 0)], [1.0], 0), {})


def network() -> MoDE:
    torch.manual_seed(0)
    model = MoDE(CONFIG)
    model.model.gradient_checkpointing = False
    return model


def set_up() -> None:
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def serve_bare_steps() -> None:
    """In a process of its own: for each number on standard input, so many steps; answers with their times."""
    set_up()
    model, stream = network(), data().stream
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    done = 0
    for line in sys.stdin:
        started = _now()
        for _ in range(int(line)):
            batch = stream.batch(done * SEQUENCES, SEQUENCES)
            h_TD, stats = hidden_states(model, batch)
            head = head_loss(h_TD, model.lm_head.weight, batch.labels_BS.flatten())
            loss = head.total / batch.num_targets + model.router_loss(stats)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()
            done += 1
        print(*_since(started), flush=True)


class Turns:
    """Listens to our loop's events. In a block without a checkpoint the bare process has its turn after every step."""

    def __init__(self, tell: EventStream, block: int, settle: Callable[[], None]) -> None:
        self.tell, self.block, self.settle = tell, block, settle
        self.with_checkpoint: list[Times] = []  # of whole blocks
        self.pairs: list[tuple[Times, Times]] = []  # of single steps: ours, the bare one
        self._bare = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.train_loop", "--bare"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._steps = 0
        self._started = _now()

    def __call__(self, event: dict[str, Any]) -> None:
        self.tell(event)
        if event["event"] != "step":
            return
        number, of_block = divmod(self._steps, self.block)
        self._steps += 1
        has_checkpoint, is_last = number % 2 == 0, of_block + 1 == self.block
        if has_checkpoint and not is_last:
            return
        ours = _since(self._started)
        if has_checkpoint:
            self.with_checkpoint.append(ours)
            self.settle()
        else:
            self.pairs.append((ours, self._bare_step()))
        self._started = _now()

    def _bare_step(self) -> Times:
        assert self._bare.stdin is not None and self._bare.stdout is not None
        self._bare.stdin.write("1\n")
        self._bare.stdin.flush()
        wall, cpu = self._bare.stdout.readline().split()
        return float(wall), float(cpu)

    def close(self) -> None:
        self._bare.kill()
        self._bare.wait()


def worker(about: dict[str, Any]) -> None:
    """Blocks 0 and 1 warm up; from then on a checkpoint falls at the beginning of every even block."""
    os.chdir(about["repository"])
    watch_in_actor()
    set_up()
    block, folder = about["block"], Path(about["folder"])
    recorder = RayRecorder(folder / "scratch", Checkpoints())
    wanted = job((2 + 2 * about["rounds"]) * block + 1, 2 * block)
    store = LocalStore(folder / "events")
    with EventStream(store, EventPlace("benchmark"), keep=folder / "events.jsonl") as tell:
        turns = Turns(tell, block, recorder.settle)
        try:
            train(Trainer(network(), wanted), data(), recorder, turns, Notice())
        finally:
            turns.close()
    # Ray keeps only what is reported with a checkpoint.
    (folder / TIMES_NAME).write_text(json.dumps([turns.with_checkpoint, turns.pairs]), encoding="utf-8")


def measure(block: int, rounds: int) -> tuple[list[Times], list[tuple[Times, Times]]]:
    """Whole blocks with a checkpoint, and pairs of steps of ours and of the bare loop, without what warms up."""
    ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
    with tempfile.TemporaryDirectory() as folder:
        about = {"block": block, "rounds": rounds, "folder": folder, "repository": os.getcwd()}
        run = RunConfig(name="benchmark", storage_path=f"{folder}/store")
        trainer = TorchTrainer(
            worker, train_loop_config=about, scaling_config=ScalingConfig(num_workers=1), run_config=run
        )
        trainer.fit()
        with_checkpoint, pairs = json.loads((Path(folder) / TIMES_NAME).read_text(encoding="utf-8"))
    ray.shutdown()
    return with_checkpoint[1:], pairs[block:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter blocks, fewer rounds: about a minute")
    parser.add_argument("--bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        serve_bare_steps()
        return
    block, rounds = (3, 3) if options.quick else (8, 8)
    with_checkpoint, pairs = measure(block, rounds)
    plain = [sum(ours[0] for ours, _ in pairs[start : start + block]) for start in range(0, len(pairs), block)]
    lost_s = [one[0] - other for one, other in zip(with_checkpoint, plain, strict=True)]
    cost_s = max(0.0, statistics.median(lost_s))
    state_bytes = 3 * 4 * sum(parameter.numel() for parameter in network().parameters())
    overheads = sorted(ours[0] / bare[0] for ours, bare in pairs)

    def row(side: str, times: list[Times], steps: int = 1) -> list[str | float]:
        return [side, *(statistics.median(one[clock] for one in times) / steps * 1e3 for clock in (0, 1))]

    print_report(
        f"One thread each, {rounds} rounds of blocks of {block} steps",
        ["side", "wall ms a step, median", "CPU ms a step, median"],
        [
            row("bare PyTorch", [bare for _, bare in pairs]),
            row("Ray Train and our loop", [ours for ours, _ in pairs]),
            row(f"the same, with a checkpoint of {state_bytes / 1e6:.0f} MB in the block", with_checkpoint, block),
        ],
        {
            "overhead_ratio": round(statistics.median(overheads), 3),
            "checkpoint_ratio": round(1 + cost_s / 60, 4),
        },
        notes=[
            f"Overhead of {len(pairs)} pairs: {overheads[0]:.3f} to {overheads[-1]:.3f}, "
            f"half of them within {overheads[len(pairs) // 4]:.3f} and {overheads[-1 - len(pairs) // 4]:.3f}; "
            f"a checkpoint costs {min(lost_s):.2f} to {max(lost_s):.2f} s, median {cost_s:.2f} s."
        ],
    )


if __name__ == "__main__":
    main()
