"""Networks from published checkpoints, and back: what a run starts from, learns from, and leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from zenray.model.config import MoDEConfig
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.network import MoDE, initialize
from zenray.model.upcycling.source import DenseSource
from zenray.model.weights import INDEX_NAME, TensorFolder, TensorPlan, TensorWriter
from zenray.spec.errors import InvalidValue
from zenray.training.trainable import named_tensors

TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Checkpoint:
    """A folder in Hugging Face's layout: a MoDE, or any dense network that can be upcycled."""

    folder: Path
    config: MoDEConfig
    hf: PreTrainedConfig

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads the configuration only. NotFound, InvalidValue for a network that is not ours."""
        kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
        if kind == ZenModeConfig.model_type:
            hf = ZenModeConfig.from_pretrained(folder)
            return cls(folder, hf.to_mode(), hf)
        dense = DenseSource(folder)
        return cls(folder, dense.config, dense.hf_config)

    @property
    def tokenizer_file(self) -> Path:
        path = self.folder / TOKENIZER_NAME
        if not path.is_file():
            raise InvalidValue(f"{self.folder} has no {TOKENIZER_NAME}: text cannot be turned into tokens.")
        return path

    @property
    def end_token(self) -> int:
        """What ends a document."""
        end = self.hf.eos_token_id
        end = end[0] if isinstance(end, list | tuple) and end else end
        if not isinstance(end, int):
            raise InvalidValue(f"{self.folder}: config.json names no eos_token_id, which ends a document.")
        return end

    def read(self, name: str) -> Tensor:
        """One tensor, as it is kept here. NotFound."""
        return TensorFolder(self.folder).read(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is kept here. NotFound."""
        return TensorFolder(self.folder).plan(name).dtype

    def network(self, dtype: torch.dtype = torch.float32) -> MoDE:
        """The network with its weights. CorruptData, NotFound for a missing tensor."""
        model = _empty_network(self.config).to(dtype)
        tensors = TensorFolder(self.folder)
        with torch.no_grad():
            for name, target in named_tensors(model).items():
                target.copy_(tensors.read(name))
        return model

    def fresh_network(self, seed: int) -> MoDE:
        """A network of this shape with new weights, in float32."""
        model = _empty_network(self.config)
        for norm in (part for name, part in model.named_parameters() if "norm" in name):
            torch.nn.init.ones_(norm)
        for buffer in model.buffers():
            buffer.zero_()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initialize(model, self.config.initializer_range)
        return model


def _empty_network(config: MoDEConfig) -> MoDE:
    """Without the time that initialising takes."""
    with torch.device("meta"):
        model = MoDE(config)
    model = model.to_empty(device="cpu")
    if config.tie_word_embeddings:  # to_empty made two tensors of it
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def write_checkpoint(
    base: Checkpoint, plans: list[TensorPlan], read: Callable[[TensorPlan], Tensor], output: Path
) -> None:
    """A new folder with the network of `base` and other weights, which `read` gives one by one, and its tokenizer."""
    with TensorWriter(output, plans) as writer:
        for plan in plans:
            writer.write(plan.name, read(plan).to(plan.dtype))
    skipped = {INDEX_NAME, "manifest.json", "upcycling.json"}
    for path in base.folder.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in skipped and path.name[0] != ".":
            shutil.copyfile(path, output / path.name)
