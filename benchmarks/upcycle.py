"""Upcycling a checkpoint of SmolLM2-135M's shape to 8 experts in every layer: peak memory, and time against the disk's.

    python -m benchmarks.upcycle [--quick] [--layers N]
    python -m benchmarks.upcycle --shape 8b [--folder DIR]    benchmarks.upcycle_large: 45 GB of disk, some minutes

Memory is the extra peak of a process of its own, above what it held before it began; the bound is the output and one
layer, and the ratio is measured by bound, below 1 where we need less. Time is compared with writing as many bytes of
zeros and bringing both to the disk. Weights are random: the work is the same.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import upcycle_large
from benchmarks.expert_lora import resident_bytes
from benchmarks.report import print_report
from zenray.model.upcycling.recipe import GroupRecipe, UpcyclingRecipe, select_layers
from zenray.model.upcycling.upcycle import upcycle

EXPERTS, RATE = 8, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--run", nargs=2, metavar=("SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="8 layers")
    parser.add_argument("--shape", choices=("smollm2", "8b"), default="smollm2")
    parser.add_argument("--folder", type=Path, help="of --shape 8b: a disk with room, for what is written")
    options = parser.parse_args()
    if options.shape == "8b":
        upcycle_large.measure(options.folder)
        return
    if options.quick:
        options.layers = 8
    torch.set_num_threads(1)
    if options.run:
        print(json.dumps(run(Path(options.run[0]), Path(options.run[1]), options.layers)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch, "dense"), Path(scratch, "mode")
        make_dense(source, options.layers)
        command = [sys.executable, "-m", "benchmarks.upcycle", "--layers", str(options.layers), "--run"]
        ran = subprocess.run([*command, str(source), str(output)], capture_output=True, text=True, check=True)
        measured = json.loads(ran.stdout.strip().splitlines()[-1])
        output_bytes = sum(path.stat().st_size for path in output.iterdir())
        disk_s = write_zeros(Path(scratch, "zeros"), output_bytes)
    layer_bytes = output_bytes / options.layers
    bound = output_bytes + layer_bytes
    result = {
        "memory_ratio": round(measured["extra_peak_bytes"] / bound, 4),
        "time_ratio": round(measured["took_s"] / disk_s, 3),
    }
    print_report(
        f"Upcycling {options.layers} layers of SmolLM2's shape to {EXPERTS} experts, half of each drawn anew",
        ["", "value"],
        [
            ["output", f"{output_bytes / 1e6:,.0f} MB"],
            ["of which one layer", f"{layer_bytes / 1e6:,.0f} MB"],
            ["extra peak memory", f"{measured['extra_peak_bytes'] / 1e6:,.0f} MB"],
            ["time", f"{measured['took_s']:.1f} s, of it CPU {measured['cpu_s']:.1f} s"],
            ["writing as many zeros", f"{disk_s:.1f} s"],
        ],
        result,
    )


def make_dense(folder: Path, layers: int) -> None:
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def run(source: Path, output: Path, layers: int) -> dict[str, float]:
    recipe = UpcyclingRecipe(
        groups=(GroupRecipe("general", (RATE,) * EXPERTS),), layers=select_layers("all", layers), mode="joint"
    )
    Path("/proc/self/clear_refs").write_text("5")
    before, start, cpu = resident_bytes("VmRSS"), time.monotonic(), time.process_time()
    upcycle(source, recipe, output)
    flush(output)
    return {
        "took_s": time.monotonic() - start,
        "cpu_s": time.process_time() - cpu,
        "extra_peak_bytes": resident_bytes("VmHWM") - before,
    }


def write_zeros(path: Path, size_bytes: int) -> float:
    """Seconds to bring as many zeros to the disk."""
    block = bytes(4 << 20)
    start = time.monotonic()
    with path.open("wb") as file:
        for _ in range(size_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.monotonic() - start


def flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


if __name__ == "__main__":
    main()
