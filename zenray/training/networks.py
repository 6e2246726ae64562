"""Networks from published checkpoints, and back: what a run starts from, learns from, and leaves behind."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from zenray.model.checkpoints.source import INDEX_NAME
from zenray.model.config import MoDEConfig
from zenray.model.experts import ExpertBank
from zenray.model.hf.configuration import ZenModeConfig
from zenray.model.network import MoDE, initialize_module
from zenray.model.upcycling.source import DenseSource
from zenray.model.weights import TensorFolder, TensorPlan, TensorWriter
from zenray.spec.errors import InvalidValue
from zenray.training.expert_parallel import expert_banks
from zenray.training.trainable import named_tensors

TOKENIZER_NAME = "tokenizer.json"

Keep = Callable[[MoDE], None]
"""Takes parts of a network away, in place, before there is memory for any."""


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

    def outline(self) -> MoDE:
        """The network without memory, on the meta device."""
        with torch.device("meta"):
            return MoDE(self.config)

    def network(self, dtype: torch.dtype = torch.float32, keep: Keep | None = None) -> MoDE:
        """The network, or what `keep` leaves of it, with its weights. CorruptData, NotFound for a missing tensor."""
        model = self._empty_network(keep).to(dtype)
        tensors = TensorFolder(self.folder)
        kept = {f"{bank}.{name}": rows for bank, part in expert_banks(model) for name, rows in _rows(part).items()}
        with torch.no_grad():
            for name, target in named_tensors(model).items():
                if target.numel():  # a worker may have none of a bank's experts
                    target.copy_(tensors.read(name, kept.get(name)))
        return model

    def fresh_network(self, seed: int, keep: Keep | None = None) -> MoDE:
        """A network of this shape, or what `keep` leaves of it, with new weights, in float32.

        Weights are drawn in the whole network's order, so that no part of it depends on what else is kept.
        """
        model = self._empty_network(keep)
        for norm in (part for name, part in model.named_parameters() if "norm" in name):
            nn.init.ones_(norm)
        for buffer in model.buffers():
            buffer.zero_()
        kept = dict(model.named_modules())
        if self.config.tie_word_embeddings:  # one weight, drawn as the head's
            kept["lm_head"] = kept["model.embed_tokens"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for name, part in self.outline().named_modules():
                mine = kept.get(name)
                is_gone = mine is None or (isinstance(mine, nn.Identity) and not isinstance(part, nn.Identity))
                drawn = part.to_empty(device="cpu", recurse=False) if is_gone or _rows(mine) else mine
                initialize_module(drawn, self.config.initializer_range)
                for weight, rows in _rows(mine).items():
                    getattr(mine, weight).data.copy_(getattr(drawn, weight)[rows])
                part.to_empty(device="meta", recurse=False)
        return model

    def _empty_network(self, keep: Keep | None) -> MoDE:
        """Without the time that initialising takes."""
        model = self.outline()
        if keep is not None:
            keep(model)
        model = model.to_empty(device="cpu")
        if self.config.tie_word_embeddings and isinstance(model.lm_head, nn.Linear):  # to_empty made two tensors of it
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


def _rows(part: nn.Module | None) -> dict[str, slice]:
    """Of a bank that keeps some experts only: which rows of each of the whole bank's weights it keeps."""
    if not isinstance(part, ExpertBank) or part.num_experts == part.whole_experts:
        return {}
    rows = slice(part.first_expert, part.first_expert + part.num_experts)
    return dict.fromkeys(("gate_up_proj", "down_proj"), rows)


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
