"""SOURCE into DEST: a complete Hugging Face folder that appears in one rename, or nothing."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoTokenizer

from zenray.model.checkpoints.completeness import check, load_config
from zenray.model.checkpoints.folder import DTYPES, OnConverted, copy_folder
from zenray.model.checkpoints.gguf import convert_gguf
from zenray.model.checkpoints.quantized import check_quantized, copy_quantized
from zenray.model.checkpoints.source import GgufSource, recognise
from zenray.model.checkpoints.template import overhead_tokens
from zenray.spec.errors import InvalidDocument, InvalidValue, suggest

PLAIN_FORMAT = "safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Report:
    """What was imported. `notes`: what a person should know, such as a chat template that is not there."""

    architecture: str
    model_type: str
    dtype: str
    parameters: int
    tensors: int
    context_tokens: int | None
    template_overhead_tokens: int | None
    notes: list[str] = field(default_factory=list)


def convert(
    source: Path,
    target: Path,
    *,
    dtype: str = "bfloat16",
    format: str = PLAIN_FORMAT,
    on_converted: OnConverted | None = None,
) -> Report:
    """Write the checkpoint `source` as a normal Hugging Face folder `target`, which must not exist yet. Blocks.

    Weights become `dtype` (bfloat16, float16, float32); packed ones (`format` awq-int4 or gptq-int8) stay as they are.
    The result was checked: every tensor that the config asks for
    is there in the right shape, and the tokenizer loads and fits the vocabulary. Until then nothing is called `target`.

    Raises InvalidDocument saying what is missing or cannot be imported; NotFound; InvalidValue.
    """
    if dtype not in DTYPES:
        raise InvalidValue(f"Weights cannot be stored as {dtype!r}.", hint=suggest(dtype, DTYPES))
    if target.exists():
        raise InvalidValue(f"{target} exists already.")
    found = recognise(source)
    partial = target.with_name(target.name + ".zenray-part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tell = on_converted or (lambda done_bytes, total_bytes: None)
        if format != PLAIN_FORMAT:
            if isinstance(found, GgufSource):
                raise InvalidDocument(f"{source} is a GGUF file, not {format}.", hint="Leave the format out.")
            copy_quantized(found.folder, partial, format, tell)
        elif isinstance(found, GgufSource):
            convert_gguf(found.file, partial, dtype, tell)
        else:
            copy_folder(found.folder, partial, dtype, tell)
        report = _check_result(partial, dtype, format, source)
        _make_readable(partial)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _check_result(folder: Path, dtype: str, format: str, source: Path) -> Report:
    if format == PLAIN_FORMAT:
        tensors = check(folder)
        parameters = sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
    else:
        tensors, parameters = check_quantized(folder, format)
    config = load_config(folder, quantized=format != PLAIN_FORMAT)
    added_tokens, notes = _check_tokenizer(folder, config.get_text_config().vocab_size, source)
    return Report(
        architecture=(config.architectures or ["unknown"])[0],
        model_type=config.model_type,
        dtype=dtype,
        parameters=parameters,
        tensors=len(tensors),
        context_tokens=getattr(config.get_text_config(), "max_position_embeddings", None),
        template_overhead_tokens=added_tokens,
        notes=notes,
    )


def _check_tokenizer(folder: Path, rows: int, source: Path) -> tuple[int | None, list[str]]:
    """What its chat template adds to a request, and notes."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InvalidDocument(f"{source} has no tokenizer.", hint="Copy the model's tokenizer.json there.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        highest = max(tokenizer.get_vocab().values())
        tokenizer("The sum of 12 and 30 is 42.")
    except Exception as error:  # broken JSON, a class that needs the model's own code, a missing file
        raise InvalidDocument(f"{source}: its tokenizer cannot be loaded: {error}") from None
    if highest >= rows:
        raise InvalidDocument(f"{source}: its tokenizer has token {highest}, its model only {rows} rows of embeddings.")
    if not (folder / "tokenizer.json").is_file():
        tokenizer.save_pretrained(folder)  # the one form that every engine reads
    if not tokenizer.chat_template:
        return None, ["There is no chat template: the model answers completions, not chats."]
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
    except Exception as error:
        return None, [f"The chat template fails on a single user message: {error}"]
    return overhead_tokens(tokenizer), []


def _make_readable(folder: Path) -> None:
    """safetensors writes files that only their owner may read; other users' replicas read them too."""
    for path in folder.iterdir():
        if path.stat().st_nlink == 1:  # a linked file is still the source's
            path.chmod(0o644)
