"""A sharded checkpoint of Llama-3.1-8B's shape through `zenray run`: peak memory and time at a size that is in use.

    python -m benchmarks.upcycle --shape 8b [--folder DIR]

The weights are random, in bfloat16, written tensor by tensor; the last 4 of 32 layers become 4 experts, half of each
drawn anew. Needs 45 GB of disk, as what is no longer needed is deleted on the way: the base's published files once they
are in the job's cache, and that cache once all experts are made. Memory is the peak of the job's whole process, torch
included (VmHWM, which also counts what is mapped of files). The time to make the experts is compared with that of
copying the finished files, both until all is on the disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import print_report
from zenray.cli.home import Home
from zenray.model.hf import ZenModeConfig
from zenray.model.network import MoDE
from zenray.model.upcycling.drop import seeded
from zenray.model.upcycling.upcycle import RECORD_NAME
from zenray.model.weights import TensorFolder, TensorPlan, TensorWriter
from zenray.spec.versions import Manifest, VersionRef
from zenray.storage.base import ObjectStore
from zenray.storage.opening import open_store
from zenray.storage.versions import newest, publish

SHAPE = LlamaConfig(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131_072,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    dtype=torch.bfloat16,
)
EXPERTS, SPARSE_LAYERS = 4, 4
NEEDED_BYTES = 45_000_000_000
BASE, MADE = VersionRef(model="dense-8b", version="v0"), VersionRef(model="mode-8b", version="v1")
JOB = f"""
kind: upcycle
name: upcycle-8b
base: {{model: {BASE.model}, version: {BASE.version}}}
into: {{model: {MADE.model}, version: {MADE.version}}}
groups: [{{name: general, experts: {EXPERTS}, drop_rate: 0.5}}]
layers: last {SPARSE_LAYERS}
stock_format: none
"""


def measure(folder: Path | None) -> None:
    """Make, run, check, compare, print; everything below a temporary folder of `folder`, which is then removed."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="upcycle-8b-") as scratch:
        free_bytes = shutil.disk_usage(scratch).free
        if free_bytes < NEEDED_BYTES:
            sys.exit(f"{scratch} has {free_bytes / 1e9:.0f} GB free, {NEEDED_BYTES / 1e9:.0f} GB are needed.")
        home = Home(Path(scratch, "home"))
        store = open_store(home.storage())
        dense = Path(scratch, "dense")
        write_dense(dense)
        publish(store, BASE, dense)
        shutil.rmtree(dense)
        ran = run_job(home, store, Path(scratch, "job.yaml"))
        made = newest(store, MADE.model)
        check(store, made)
        copy_s = copy(store, made, Path(scratch, "copy"))
    report(made, ran, copy_s)


def write_dense(folder: Path) -> None:
    """A sharded checkpoint as it comes from Hugging Face: 4 files and an index."""
    plans = dense_plans()
    with TensorWriter(folder, plans, shard_bytes=5_000_000_000) as writer:
        for plan in plans:
            writer.write(plan.name, drawn(plan))
    SHAPE.architectures = ["LlamaForCausalLM"]
    SHAPE.save_pretrained(folder)


def dense_plans() -> list[TensorPlan]:
    with torch.device("meta"):
        model = LlamaForCausalLM(SHAPE)
    return [TensorPlan(name, tuple(tensor.shape), torch.bfloat16) for name, tensor in model.state_dict().items()]


def drawn(plan: TensorPlan) -> Tensor:
    """A tensor's weights, the same each time: so the finished model can be compared when the base is gone."""
    return torch.empty(plan.shape, dtype=plan.dtype).normal_(std=0.02, generator=seeded(0, plan.name))


def run_job(home: Home, store: ObjectStore, job: Path) -> dict[str, float]:
    """`zenray run`, watched: seconds of its three parts, and the peak resident bytes of the process that works."""
    job.write_text(JOB)
    work = home.cache / "jobs"
    program = "import sys; from zenray.cli.main import main; sys.exit(main())"
    start = time.monotonic()
    peak_bytes, fetched_s, made_s = 0, 0.0, 0.0
    with subprocess.Popen(
        [sys.executable, "-c", program, "run", str(job)], env=os.environ | {"ZENRAY_HOME": str(home.root)}
    ) as process:
        while process.poll() is None:
            peak_bytes = max(peak_bytes, *peaks_below(process.pid), 0)
            if (
                not fetched_s
                and (work / "versions" / BASE.model / BASE.version / BASE.format / "manifest.json").exists()
            ):
                fetched_s = time.monotonic() - start
                for info in list(store.list(BASE.prefix)):
                    store.delete(info.key)
            if not made_s and any(work.glob(f"upcycle-8b-*/safetensors/{RECORD_NAME}")):
                flush(next(work.glob("upcycle-8b-*/safetensors")))
                made_s = time.monotonic() - start
                shutil.rmtree(work / "versions")
            time.sleep(0.1)
    if process.returncode:
        sys.exit(process.returncode)
    total_s = time.monotonic() - start
    return {
        "fetch_s": fetched_s,
        "make_s": made_s - fetched_s,
        "publish_s": total_s - made_s,
        "peak_bytes": peak_bytes,
    }


def peaks_below(pid: int) -> Iterator[int]:
    """VmHWM of each process that `pid` has started."""
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            lines = Path(f"/proc/{child.pid}/status").read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        yield from (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def check(store: ObjectStore, made: Manifest) -> None:
    """Every tensor in the shape that the network has; what is copied, and expert after expert, by the bits."""
    folder = stored_folder(store, made)
    config = ZenModeConfig.from_pretrained(folder).to_mode()
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in MoDE(config).state_dict().items()}
    tensors = TensorFolder(folder)
    assert {name: tensors.plan(name).shape for name in tensors.names} == expected
    plans = {plan.name: plan for plan in dense_plans()}
    copied = ["lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.layers.31.self_attn.k_proj.weight"]
    for name in copied:
        assert torch.equal(tensors.read(name), drawn(plans[name])), name
    last = f"model.layers.{SHAPE.num_hidden_layers - 1}.mlp"
    gate = drawn(plans[f"{last}.gate_proj.weight"])
    for expert in range(EXPERTS):
        found = tensors.read(f"{last}.experts.gate_up_proj", row=expert)[: gate.shape[0]]
        kept = (found == gate).all(dim=1).sum()
        assert kept == SHAPE.intermediate_size // 2, f"expert {expert} keeps {kept} of {gate.shape[0]} neurons"


def stored_folder(store: ObjectStore, made: Manifest) -> Path:
    """Where the local store keeps a version's files."""
    return Path(store.uri.removeprefix("file:")) / made.ref.prefix


def copy(store: ObjectStore, made: Manifest, target: Path) -> float:
    """Seconds to copy the finished files and to bring them to the disk."""
    start = time.monotonic()
    shutil.copytree(stored_folder(store, made), target)
    flush(target)
    return time.monotonic() - start


def flush(folder: Path) -> None:
    """Bring what was written there to the disk."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def report(made: Manifest, ran: dict[str, float], copy_s: float) -> None:
    layer = 3 * SHAPE.hidden_size * SHAPE.intermediate_size * torch.bfloat16.itemsize * EXPERTS
    result = {
        "memory_ratio": round(ran["peak_bytes"] / (made.size_bytes + layer), 4),
        "time_ratio": round(ran["make_s"] / copy_s, 3),
        "peak_gb": round(ran["peak_bytes"] / 1e9, 3),
        "output_gb": round(made.size_bytes / 1e9, 3),
    }
    print_report(
        f"Llama-3.1-8B's shape, its last {SPARSE_LAYERS} layers to {EXPERTS} experts each, by zenray run",
        ["", "value"],
        [
            ["output", f"{made.size_bytes / 1e9:.2f} GB in {len(made.files)} files"],
            ["of which one sparse layer", f"{layer / 1e9:.2f} GB"],
            ["peak memory of the process", f"{ran['peak_bytes'] / 1e9:.2f} GB"],
            ["fetch and verify the base", f"{ran['fetch_s']:.0f} s"],
            ["make", f"{ran['make_s']:.0f} s"],
            ["hash and publish", f"{ran['publish_s']:.0f} s"],
            ["copying the finished files", f"{copy_s:.0f} s"],
        ],
        result,
    )
