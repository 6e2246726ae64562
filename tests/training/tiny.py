"""A tiny MoDE version with a byte-level tokenizer, some text, and jobs on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from zenray.model.config import ExpertGroup, MoDEConfig, RouterConfig
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.network import MoDE
from zenray.model.weights import TensorPlan, TensorWriter
from zenray.spec.training import DistillJob, PretrainJob
from zenray.training.history import Event
from zenray.training.reading import StoredCheckpoint
from zenray.training.trainable import named_tensors

END = 256
CONFIG = MoDEConfig(
    vocab_size=END + 1,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    sparse_layers=(1,),
    expert_groups=(ExpertGroup("general", 2, 16), ExpertGroup("code", 2, 16)),
    router=RouterConfig(experts_per_token=2, selection_bias=True),
    tie_word_embeddings=True,
    initializer_range=0.1,
)


def write_version(folder: Path, config: MoDEConfig = CONFIG, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint in Hugging Face's layout, with a tokenizer whose tokens are bytes."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    tensors = named_tensors(MoDE(config).to(dtype))
    with TensorWriter(folder, [TensorPlan(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    hf = ZenModeConfig.from_mode(config, dtype=dtype, eos_token_id=END)
    hf.architectures = ["ZenModeForCausalLM"]
    hf.save_pretrained(folder)
    alphabet = {token: number for number, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab={**alphabet, "<end>": END}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_text(folder: Path) -> dict[str, Path]:
    """Two domains, as a jsonl file each."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for domain, line in (("count", "{0} and {0} make {1}. "), ("spell", "The word {0} has {1} letters. ")):
        texts = [line.format(number, 2 * number) * (1 + number % 4) for number in range(60)]
        found[domain] = folder / f"{domain}.jsonl"
        found[domain].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return found


def job(text: dict[str, Path], kind: str = "pretrain", **changes: Any) -> PretrainJob | DistillJob:
    sources = [{"domain": domain, "path": str(path)} for domain, path in text.items()]
    about: dict[str, Any] = {
        "kind": kind,
        "name": "tiny",
        "base": {"model": "tiny", "version": "v0"},
        "into": {"model": "tiny", "version": "v1"},
        "data": {"sources": sources, "sequence_tokens": 32, "validation_share": 0.2},
        "steps": 6,
        "sequences_per_step": 4,
        "sequences_per_pass": 2,
        "optimisation": {"learning_rate": 1e-2, "warmup_steps": 1},
        "checkpoints": {"every_steps": 2},
        "evaluation": {"every_steps": 3, "sequences": 3},
        **changes,
    }
    if kind == "distill":
        return DistillJob(**{"teachers": [{"version": {"model": "teacher", "version": "v0"}}], **about})
    return PretrainJob(**about)


class FolderRecorder:
    """Checkpoints in a folder of this machine. `dies_after`: the record at which the process is as good as killed."""

    def __init__(self, root: Path, dies_after: int | None = None) -> None:
        self.root, self.dies_after = root, dies_after
        self.names: list[str] = []

    def latest(self) -> StoredCheckpoint | None:
        done = sorted(self.root.glob("step-*")) if self.root.is_dir() else []
        return StoredCheckpoint.at(done[-1]) if done else None

    def record(self, name: str, metrics: Event, write: Callable[[Path], None]) -> None:
        folder = self.root / "unfinished"
        folder.mkdir(parents=True)
        write(folder)
        folder.rename(self.root / name)
        self.names.append(name)
        if len(self.names) == self.dies_after:
            raise KeyboardInterrupt

    def settle(self) -> None:
        """It always is."""
