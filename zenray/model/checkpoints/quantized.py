"""A folder with packed weights (AWQ, GPTQ) into a new one as it is, checked against the model that was quantized.

Nobody converts them: which bits a weight became was decided by whoever quantized it, with data.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from zenray.model.checkpoints.completeness import (
    Expected,
    StoredTensor,
    compare,
    expected_tensors,
    load_config,
    named,
    read_weights,
)
from zenray.model.checkpoints.folder import OnConverted, copy_beside, link_or_copy, write_json
from zenray.model.checkpoints.source import INDEX_NAME, read_json
from zenray.spec.errors import InvalidDocument, InvalidValue, suggest

_WORD_BITS = 32
_PACKED, _PLAIN = "I32", frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True)
class Packing:
    """How a method lays the bits of a weight [out, in] into 32-bit words: `along_out` as AWQ does, else along `in`."""

    method: str
    bits: int
    along_out: bool

    def shapes(self, weight: tuple[int, ...], group: int) -> dict[str, tuple[int, ...]]:
        """The tensors that stand in place of one weight, by the ends of their names."""
        out_size, in_size = weight
        groups = in_size // (group if group > 0 else in_size)
        words = (in_size, out_size * self.bits // _WORD_BITS)
        return {
            "qweight": words if self.along_out else (in_size * self.bits // _WORD_BITS, out_size),
            "qzeros": (groups, out_size * self.bits // _WORD_BITS),
            "scales": (groups, out_size),
        }


PACKINGS = {"awq-int4": Packing("awq", 4, along_out=True), "gptq-int8": Packing("gptq", 8, along_out=False)}
"""By the name of the format that they are published under."""


def copy_quantized(source: Path, target: Path, format: str, on_converted: OnConverted) -> None:
    """Check `source` and write it to `target`, an empty folder. InvalidDocument saying what is missing or another."""
    tensors, _ = check_quantized(source, format)
    copy_beside(source, target)
    # The model's own code is never run; all else stays, above all how the weights are packed.
    write_json(target / "config.json", {k: v for k, v in read_json(source / "config.json").items() if k != "auto_map"})
    files = sorted({tensor.file for tensor in tensors.values()})
    sizes = {file: (source / file).stat().st_size for file in files}
    done_bytes = 0
    for file in files:
        on_converted(done_bytes, sum(sizes.values()))
        link_or_copy(source / file, target / file)
        done_bytes += sizes[file]
    on_converted(done_bytes, done_bytes)
    if (source / INDEX_NAME).is_file():
        shutil.copyfile(source / INDEX_NAME, target / INDEX_NAME)


def check_quantized(folder: Path, format: str) -> tuple[dict[str, StoredTensor], int]:
    """The folder's tensors, and the parameters of the model that they are a quantization of.

    InvalidDocument when they are packed in another way than `format` says, and saying what is missing, wrong or too
    much; InvalidValue for a format that is not packed.
    """
    if format not in PACKINGS:
        raise InvalidValue(f"Weights cannot be imported as {format!r}.", hint=suggest(format, PACKINGS))
    packing = PACKINGS[format]
    group = _group_size(folder, packing, format)
    config = load_config(folder, quantized=True)
    stored = read_weights(folder)
    plain = expected_tensors(config)
    shapes = _packed_shapes(plain, stored, packing, group)
    compare(folder, config.model_type, shapes, stored, plain.tied)
    odd = [f"{name} ({t.dtype})" for name, t in sorted(stored.items()) if t.dtype not in _types(name)]
    if odd:
        raise InvalidDocument(f"{folder} holds tensors of a type that {format} does not have: {named(odd)}.")
    return stored, _parameters(config, plain)


def _group_size(folder: Path, packing: Packing, format: str) -> int:
    """Weights that share a scale; -1: a whole row."""
    said: dict[str, Any] = read_json(folder / "config.json").get("quantization_config") or {}
    method, bits = said.get("quant_method"), said.get("bits", said.get("w_bit"))
    if (method, bits) != (packing.method, packing.bits):
        found = f"{method} in {bits} bits" if said else "not quantized"
        raise InvalidDocument(
            f"{folder / 'config.json'}: the weights are {found}, and {format} is {packing.method} in {packing.bits}.",
            hint=f"Known: {', '.join(sorted(PACKINGS))}; leave the format out for weights that are not quantized.",
        )
    group = said.get("group_size", said.get("q_group_size"))
    if not isinstance(group, int) or group == 0:
        raise InvalidDocument(f"{folder / 'config.json'}: quantization_config.group_size is {group!r}.")
    return group


def _packed_shapes(
    plain: Expected, stored: dict[str, StoredTensor], packing: Packing, group: int
) -> dict[str, tuple[int, ...]]:
    """The model's tensors with those that are stored packed in place of their weights.

    GPTQ's `g_idx` may be left out: it only says in which order the inputs were quantized.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, tensor in plain.tensors.items():
        layer = name.removesuffix(".weight")
        if f"{layer}.qweight" not in stored or len(tensor.shape) != 2:
            shapes[name] = tuple(tensor.shape)
            continue
        shapes |= {f"{layer}.{end}": shape for end, shape in packing.shapes(tuple(tensor.shape), group).items()}
        if not packing.along_out and f"{layer}.g_idx" in stored:
            shapes[f"{layer}.g_idx"] = (tensor.shape[1],)
    return shapes


def _types(name: str) -> frozenset[str]:
    return frozenset({_PACKED}) if name.endswith((".qweight", ".qzeros", ".g_idx")) else _PLAIN


def _parameters(config: PretrainedConfig, plain: Expected) -> int:
    tied = plain.tied if config.tie_word_embeddings else {}
    return sum(tensor.numel() for name, tensor in plain.tensors.items() if name not in tied)
