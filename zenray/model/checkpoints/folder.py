"""A folder in Hugging Face's layout into a new one: only what a model needs, weights in one floating-point type."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig

from zenray.model.checkpoints.completeness import StoredTensor, check, load_config
from zenray.model.checkpoints.source import BESIDE_WEIGHTS, INDEX_NAME, SINGLE_NAME, read_json
from zenray.model.weights import DTYPE_CODES, STORED_DTYPES

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
OnConverted = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


def copy_folder(source: Path, target: Path, dtype: str, on_converted: OnConverted) -> None:
    """Check `source` and write it to `target`, an empty folder. Peak memory: the largest file of the source.

    Raises InvalidDocument, with what is missing, for a checkpoint that is not complete.
    """
    tensors = check(source)
    copy_beside(source, target)
    write_config(read_json(source / "config.json"), target, dtype)
    if not (target / "generation_config.json").is_file():
        write_generation_config(target)
    _write_weights(source, target, tensors, dtype, on_converted)


def copy_beside(source: Path, target: Path) -> None:
    """Tokenizer, template, licence …: what a model needs beside its config and its weights."""
    for name in BESIDE_WEIGHTS:
        if (source / name).is_file():
            if name.endswith(".json"):
                read_json(source / name)
            shutil.copyfile(source / name, target / name)


def write_config(raw: dict[str, object], target: Path, dtype: str) -> None:
    """`config.json`, saying how the weights are stored; without what would make a reader run the model's own code."""
    kept = {key: value for key, value in raw.items() if key not in ("torch_dtype", "auto_map", "_name_or_path")}
    kept = {key: value for key, value in kept.items() if key not in ("_model_name_or_path", "quantization_config")}
    kept["dtype"] = dtype
    write_json(target / "config.json", kept)


def write_generation_config(target: Path) -> None:
    """`generation_config.json` as the model's config implies it: its end, begin and padding tokens."""
    raw = GenerationConfig.from_model_config(load_config(target)).to_diff_dict()
    write_json(target / "generation_config.json", {k: v for k, v in raw.items() if not k.startswith("_")})


def _write_weights(
    source: Path, target: Path, tensors: dict[str, StoredTensor], dtype: str, on_converted: OnConverted
) -> None:
    by_file: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        by_file.setdefault(tensor.file, []).append(name)
    files = sorted(by_file)
    renamed = {
        file: SINGLE_NAME if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        for number, file in enumerate(files, start=1)
    }
    sizes = {file: (source / file).stat().st_size for file in files}
    done_bytes = 0
    for file in files:
        on_converted(done_bytes, sum(sizes.values()))
        _write_file(source / file, target / renamed[file], by_file[file], tensors, dtype)
        done_bytes += sizes[file]
    on_converted(done_bytes, done_bytes)
    if len(files) > 1:
        weight_map = {name: renamed[tensors[name].file] for name in sorted(tensors)}
        total_bytes = sum(torch.Size(t.shape).numel() * _written(t, dtype).itemsize for t in tensors.values())
        write_json(target / INDEX_NAME, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


def _write_file(source: Path, target: Path, names: list[str], tensors: dict[str, StoredTensor], dtype: str) -> None:
    with safe_open(source, framework="pt") as file:
        whole = set(file.keys()) == set(names)
        wanted = {name: _written(tensors[name], dtype) for name in names}
        if whole and all(tensors[name].dtype == DTYPE_CODES[wanted[name]] for name in names):
            link_or_copy(source, target)
            return
        cast = {name: file.get_tensor(name).to(wanted[name]).contiguous() for name in names}
    save_file(cast, target, metadata={"format": "pt"})


def _written(tensor: StoredTensor, dtype: str) -> torch.dtype:
    """The type in which a tensor is written: only weights change theirs."""
    return STORED_DTYPES[tensor.dtype] if tensor.is_buffer else DTYPES[dtype]


def link_or_copy(source: Path, target: Path) -> None:
    """`target` with the bytes of `source`; without copying them where both are on one disk."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def write_json(path: Path, data: object) -> None:
    """In one form: two equal documents are equal files."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
