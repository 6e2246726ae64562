"""Expert-parallel training on two processes of one thread, against one process of two threads and against transformers.

    python -m benchmarks.ep_training [--quick] [--rounds N]

SmolLM2-135M upcycled to 4 experts, 2 for each token, in its last 6 layers; whole optimiser steps, float32, wall time.
Two sides at a time run one job: so many sequences a step, so many in a pass of each process, so one process makes
twice the passes of two. Every side is a program of its own that trains one step when it is told to; they take turns,
with the same weights and tokens, and all losses must agree, or the benchmark fails. `ep2_ratio` is one process's time
by that of two, `vs_transformers_ratio` transformers' by ours, each the median over neighbouring steps: above 1 where
ours is faster. Our plain layout keeps dense weights whole; `vs_transformers_sharded_ratio` is with both cut.
transformers 5.23 (its all-to-all expert parallelism beside FSDP2) is installed into an environment of its own below
.zenray/bench, on this environment's torch. --quick leaves it out, and EP beside fully sharded weights.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.ep_worker import LENGTH, network, peer_config
from benchmarks.report import print_report

LAYERS = 30
TRANSFORMERS = "5.23.0"
PEER_HOME = Path(".zenray/bench/transformers")
OF_STEP = 8  # sequences of a step, over all processes


@dataclass
class Side:
    """A program on so many processes, and what the first one said of each step."""

    name: str
    command: list[str]
    world: int
    times_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, stack: ExitStack) -> None:
        """Its processes, found by one another as torchrun's are; they share two threads, and end with the stack."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(self.world):
            about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.world, "OMP_NUM_THREADS": 2 // self.world}
            about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRANSFORMERS_VERBOSITY": "error"}
            process = subprocess.Popen(
                self.command,
                env={**os.environ, **{key: str(value) for key, value in about.items()}},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            self.processes.append(process)

    def wait_until_ready(self) -> None:
        for process in self.processes:
            self._answer(process)

    def step(self) -> None:
        for process in self.processes:
            _pipe(process.stdin).write("step\n")
            _pipe(process.stdin).flush()
        answers = [self._answer(process) for process in self.processes]
        self.times_s.append(max(answer["time_s"] for answer in answers))
        self.losses.append(answers[0]["loss"])

    def _answer(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        line = _pipe(process.stdout).readline()
        if not line:
            raise RuntimeError(f"{self.name}: a process ended with status {process.wait()}")
        return json.loads(line)

    @property
    def warm_s(self) -> list[float]:
        return self.times_s[1:]

    def ratio(self, other: Side) -> float:
        """How many times as long as the other's its steps take: the median over rounds."""
        return round(statistics.median(mine / its for mine, its in zip(self.warm_s, other.warm_s, strict=True)), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 layers, two sides: within a minute or so")
    parser.add_argument("--rounds", type=int, default=4, help="measured after one that warms up")
    options = parser.parse_args()
    quick, rounds = options.quick, options.rounds
    layers, of_pass = (8, 4) if quick else (LAYERS, 2)  # four whole networks of longer passes do not fit into 24 GB
    why_not = "left out by --quick" if quick else install_transformers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder, layers, rounds + 1)
        ours = [sys.executable, "-m", "benchmarks.ep_worker", str(folder), str(layers), str(of_pass)]
        one = partial(Side, "one process, 2 threads", ours, 1)
        parallel = partial(Side, "EP 2, 1 thread each", ours, 2)
        duels = {"ep2_ratio": take_turns(one(), parallel(), rounds)}
        if not quick:
            sharded = Side("EP 2, fully sharded", [*ours, "sharded"], 2)
            duels["ep2_sharded_ratio"] = take_turns(one(), sharded, rounds)
        if why_not is None:
            script = str(Path(__file__).with_name("ep_peer.py"))
            theirs = [str(PEER_HOME.absolute() / "bin/python"), script, str(folder), str(of_pass)]
            duels["vs_transformers_ratio"] = take_turns(Side("transformers EP 2", theirs, 2), parallel(), rounds)
    report(duels, layers, why_not)


def take_turns(one: Side, other: Side, rounds: int) -> tuple[Side, Side]:
    """Both, after a step each that warms up and so many more."""
    with ExitStack() as stack:
        for side in (one, other):
            side.start(stack)
        for side in (one, other):
            side.wait_until_ready()
        for number in range(rounds + 1):
            for side in (one, other) if number % 2 else (other, one):
                side.step()
    return one, other


def report(duels: dict[str, tuple[Side, Side]], layers: int, why_not: str | None) -> None:
    tokens = OF_STEP * LENGTH
    sides = [side for pair in duels.values() for side in pair]
    for side in sides:
        if not torch.allclose(torch.tensor(side.losses), torch.tensor(sides[0].losses), rtol=1e-3):
            raise RuntimeError(f"{side.name} lost {side.losses}, {sides[0].name} {sides[0].losses}")
    medians = [statistics.median(side.warm_s) for side in sides]
    print_report(
        f"One optimiser step, {tokens:,} tokens, {layers} layers",
        ["side", "s / step, median", "fastest s", "tokens / s"],
        [[side.name, median, min(side.warm_s), tokens / median] for side, median in zip(sides, medians, strict=True)],
        {
            **{name: one.ratio(other) for name, (one, other) in duels.items()},
            "vs_transformers_sharded_ratio": like_for_like(duels),
            "transformers": why_not or TRANSFORMERS,
        },
    )


def like_for_like(duels: dict[str, tuple[Side, Side]]) -> float | None:
    """transformers' time by ours where our dense weights are cut over the workers as FSDP cuts theirs."""
    if not {"ep2_sharded_ratio", "vs_transformers_ratio"} <= duels.keys():
        return None
    ours, theirs = duels["ep2_sharded_ratio"][1], duels["vs_transformers_ratio"][0]
    return round(statistics.median(theirs.warm_s) / statistics.median(ours.warm_s), 3)


def write_inputs(folder: Path, layers: int, steps: int) -> None:
    """The same weights and tokens for all sides."""
    torch.save(network(layers).state_dict(), folder / "state.pt")
    generator = torch.Generator().manual_seed(0)
    shape = (steps, OF_STEP, LENGTH + 1)
    torch.save(torch.randint(0, 49152, shape, generator=generator), folder / "batches.pt")
    (folder / "config.json").write_text(json.dumps(peer_config(layers)))


def install_transformers() -> str | None:
    """Install once; why it could not be, or None. Everything but transformers itself is this environment's."""
    done = PEER_HOME / f"installed-{TRANSFORMERS}"
    if done.exists():
        return None
    venv.create(PEER_HOME, with_pip=False)
    packages = next(PEER_HOME.glob("lib/python*/site-packages"))
    (packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")  # read after its own
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    try:
        command += ["--target", str(packages), f"transformers=={TRANSFORMERS}"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return error.stderr[-300:]
    done.touch()
    return None


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


if __name__ == "__main__":
    main()
