"""Expert-parallel training on two processes of one thread, against one process of two threads and against transformers.

    python -m benchmarks.ep_training [--quick]

SmolLM2-135M upcycled to 4 experts, 2 for each token, in its last 6 layers; whole optimiser steps of two passes,
float32, wall time. Every side is a program of its own that trains one step when it is told to; they take turns in
every round, with the same weights and tokens, and their losses must agree, or the benchmark fails. `ep2_ratio` is one
process's time by that of two, `vs_transformers_ratio` transformers' by ours: above 1 where ours is faster. transformers
5.23 (its all-to-all expert parallelism beside FSDP2) is installed into an environment of its own below .zenray/bench,
on this environment's torch, and left out with --quick.
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
from pathlib import Path
from typing import IO, Any

import torch

from benchmarks.ep_worker import LENGTH, network, peer_config
from benchmarks.report import print_report

LAYERS = 30
TRANSFORMERS = "5.23.0"
PEER_HOME = Path(".zenray/bench/transformers")
SEQUENCES, PASSES = 4, 2  # of a pass, over all processes; passes of a step


@dataclass
class Side:
    """Its processes, and what their first one said of each step."""

    name: str
    processes: list[subprocess.Popen[str]]
    times_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

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
    def median_s(self) -> float:
        return statistics.median(self.times_s[1:])  # the first step warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="8 layers, fewer steps, without transformers")
    quick = parser.parse_args().quick
    layers, rounds = (8, 3) if quick else (LAYERS, 6)
    why_not = "left out by --quick" if quick else install_transformers()
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        write_inputs(folder, layers, rounds + 1)
        ours = [sys.executable, "-m", "benchmarks.ep_worker", str(folder), str(layers), str(SEQUENCES), str(PASSES)]
        sides = [
            start(stack, "one process, 2 threads", ours, 1, 2),
            start(stack, "EP 2, 1 thread each", ours, 2, 1),
            start(stack, "EP 2, fully sharded", [*ours, "sharded"], 2, 1),
        ]
        if why_not is None:
            script = str(Path(__file__).with_name("ep_peer.py"))
            theirs = [str(PEER_HOME.absolute() / "bin/python"), script, str(folder)]
            sides.append(start(stack, "transformers EP 2", theirs, 2, 1))
        for side in sides:
            side.wait_until_ready()
        for number in range(rounds + 1):
            for side in sides if number % 2 else sides[::-1]:
                side.step()
    report(sides, layers, why_not)


def report(sides: list[Side], layers: int, why_not: str | None) -> None:
    expected = torch.tensor(sides[0].losses)
    for side in sides[1:]:
        if not torch.allclose(torch.tensor(side.losses), expected, rtol=1e-3):
            raise RuntimeError(f"{side.name} lost {side.losses}, {sides[0].name} {sides[0].losses}")
    tokens = SEQUENCES * PASSES * LENGTH
    times = {side.name: side.median_s for side in sides}
    ours = min(times["EP 2, 1 thread each"], times["EP 2, fully sharded"])
    theirs = times.get("transformers EP 2")
    print_report(
        f"One optimiser step, {tokens:,} tokens, {layers} layers",
        ["side", "s / step", "fastest s", "tokens / s"],
        [[side.name, side.median_s, min(side.times_s), tokens / side.median_s] for side in sides],
        {
            "ep2_ratio": round(times["one process, 2 threads"] / times["EP 2, 1 thread each"], 3),
            "ep2_sharded_ratio": round(times["one process, 2 threads"] / times["EP 2, fully sharded"], 3),
            "vs_transformers_ratio": None if theirs is None else round(theirs / ours, 3),
            "transformers": why_not or TRANSFORMERS,
        },
    )


def write_inputs(folder: Path, layers: int, steps: int) -> None:
    """The same weights and tokens for all sides."""
    torch.save(network(layers).state_dict(), folder / "state.pt")
    generator = torch.Generator().manual_seed(0)
    shape = (steps, PASSES, SEQUENCES, LENGTH + 1)
    torch.save(torch.randint(0, 49152, shape, generator=generator), folder / "batches.pt")
    (folder / "config.json").write_text(json.dumps(peer_config(layers)))


def start(stack: ExitStack, name: str, command: list[str], world: int, threads: int) -> Side:
    """Its processes, found by one another as torchrun's are; killed at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world):
        about = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "OMP_NUM_THREADS": threads}
        about |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TRANSFORMERS_VERBOSITY": "error"}
        environment = {**os.environ, **{key: str(value) for key, value in about.items()}}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        stack.callback(process.kill)
        processes.append(process)
    return Side(name, processes)


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
