"""What a person points at: recognised by its files, or refused with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zenray.spec.errors import InvalidDocument, NotFound

BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
"""What is taken along from a folder, beside its config and its weights."""
SINGLE_NAME, INDEX_NAME = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class SafetensorsSource:
    """A folder in Hugging Face's layout."""

    folder: Path

    def files(self) -> list[Path]:
        """All that an import may read, in a fixed order."""
        names = {"config.json", INDEX_NAME, *BESIDE_WEIGHTS}
        entries = (path for path in self.folder.iterdir() if path.is_file())
        return sorted(path for path in entries if path.name in names or path.suffix == ".safetensors")


@dataclass(frozen=True)
class GgufSource:
    """One GGUF file."""

    file: Path

    def files(self) -> list[Path]:
        """As that of a folder."""
        return [self.file]


def recognise(path: Path) -> SafetensorsSource | GgufSource:
    """What `path` holds. NotFound when it is not there; InvalidDocument for what cannot be imported."""
    if path.is_file():
        return _recognise_file(path)
    if not path.is_dir():
        raise NotFound(f"{path}: no such file or folder.")
    names = sorted(entry.name for entry in path.iterdir() if entry.is_file())
    if any(name.endswith(".safetensors") for name in names):
        if "config.json" not in names:
            if "adapter_config.json" in names:
                raise InvalidDocument(
                    f"{path} is an adapter, not a model.",
                    hint="Merge it into its base model first.",
                )
            raise InvalidDocument(f"{path} has weights but no config.json.", hint="Copy the model's config.json there.")
        return SafetensorsSource(path)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return _recognise_file(path / ggufs[0])
    if ggufs:
        raise InvalidDocument(f"{path} has {len(ggufs)} GGUF files: {', '.join(ggufs)}.", hint="Name one of them.")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise _pickle(path / pickles[0])
    raise InvalidDocument(f"{path} has no weights: neither a .safetensors nor a .gguf file is in it.")


def _recognise_file(path: Path) -> GgufSource:
    if path.name.endswith(_PICKLES):
        raise _pickle(path)
    if path.suffix == ".safetensors":
        raise InvalidDocument(f"{path} is one file of a model.", hint=f"Name its folder: {path.parent}")
    if path.suffix != ".gguf":
        raise InvalidDocument(f"{path} is neither a folder nor a .gguf file.")
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InvalidDocument(f"{path} does not begin as a GGUF file does.")
    return GgufSource(path)


def _pickle(path: Path) -> InvalidDocument:
    return InvalidDocument(
        f"{path} is a pickle: reading it can run any code that its maker put in, so zenray does not.",
        hint="Get the model's .safetensors, or convert it on a machine that may be lost.",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object out of a file. InvalidDocument naming the file when it is not one."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InvalidDocument(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(data, dict):
        raise InvalidDocument(f"{path} holds no JSON object.")
    return data
