"""The catalog: packaged models and a user's own, read from YAML files, complete with derived prices and limits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from zenray.catalog.derive import Anchors, build_entry, complete
from zenray.catalog.entries import ChatGroup, ModelEntry, ModelFile, VariantFile
from zenray.catalog.policy import FamilyPolicy
from zenray.spec.documents import load_document, parse_document
from zenray.spec.errors import InvalidDocument, ModelNotFound, suggest

_PACKAGED = Path(__file__).parent
_VARIANT_KEY = re.compile(r"^[\"']?variant_of[\"']?\s*:", re.MULTILINE)


class Catalog:
    """All models that a platform may serve, by name. Immutable once loaded."""

    def __init__(self, entries: Iterable[ModelEntry], family: FamilyPolicy) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self.family = family

    @classmethod
    def load(cls, user_dirs: Iterable[Path | str] = ()) -> Catalog:
        """The packaged models and those of `user_dirs` (every *.yaml file in them; subfolders are not searched).

        Reads files, blocking, in well under a second. Raises InvalidDocument with file and line for a file that is
        wrong, a folder that is not there, or a name that two files give.
        """
        family = load_document(_PACKAGED / "family.yaml", FamilyPolicy)
        files = [
            _read(path) for folder in (_PACKAGED / "models", *map(Path, user_dirs)) for path in _yaml_files(folder)
        ]
        _refuse_repeated_names(files)
        models = {file.name: (path, file) for path, file in files if isinstance(file, ModelFile)}
        anchors = _anchors(models.values())
        entries = [complete(file, str(path), family, anchors) for path, file in models.values()]
        by_name = {entry.name: entry for entry in entries}
        for path, file in files:
            if isinstance(file, VariantFile):
                entries.append(_vary(file, path, by_name))
        catalog = cls(sorted(entries, key=lambda entry: (entry.parameters.total, entry.name)), family)
        catalog._check_routing()
        return catalog

    def get(self, name: str) -> ModelEntry:
        """The model called `name`. ModelNotFound, with the nearest name, when there is none."""
        try:
            return self._entries[name]
        except KeyError:
            raise ModelNotFound(
                f"The catalog has no model {name!r}.", hint=suggest(name, self._entries, most=40), param="model"
            ) from None

    def names(self) -> tuple[str, ...]:
        """All names, smallest model first."""
        return tuple(self._entries)

    def __iter__(self) -> Iterator[ModelEntry]:
        return iter(self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def chat_menu(self) -> dict[ChatGroup, tuple[ModelEntry, ...]]:
        """The chat model selector: its groups in order, each with its models."""
        return {group: tuple(e for e in self if e.chat_group is group) for group in ChatGroup}

    def variants_of(self, name: str) -> tuple[ModelEntry, ...]:
        return tuple(entry for entry in self if entry.variant_of == name)

    def _check_routing(self) -> None:
        auto = self._entries.get(self.family.auto.name)
        if auto is not None:
            raise InvalidDocument(
                f"{auto.file}: the name {auto.name!r} stands for automatic routing.",
                hint="Give the model a name of its own.",
            )
        for name in self.family.named_models():
            if name not in self._entries:
                raise InvalidDocument(
                    f"{_PACKAGED / 'family.yaml'}: routing names {name!r}, which no file defines.",
                    hint=suggest(name, self._entries),
                )


def _yaml_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InvalidDocument(f"{folder}: no such folder of models.", hint="Create it, or leave it out.")
    return sorted(folder.glob("*.yaml"))


def _read(path: Path) -> tuple[Path, ModelFile | VariantFile]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDocument(f"{path}: cannot be read: {error}.") from None
    if _VARIANT_KEY.search(text):
        return path, parse_document(text, VariantFile, where=str(path))
    return path, parse_document(text, ModelFile, where=str(path))


def _refuse_repeated_names(files: Iterable[tuple[Path, ModelFile | VariantFile]]) -> None:
    seen: dict[str, Path] = {}
    for path, file in files:
        if file.name in seen:
            raise InvalidDocument(
                f"{path}: the name {file.name!r} is already given by {seen[file.name]}.",
                hint="Give the model a name of its own.",
            )
        seen[file.name] = path


def _anchors(models: Iterable[tuple[Path, ModelFile]]) -> Anchors:
    """What the packaged family gives. A user's prices are not anchors: they would move the prices of others."""
    prices_in, prices_out, limits, batches = {}, {}, {}, {}
    for path, file in models:
        total = file.parameters.total
        if path.parent != _PACKAGED / "models":
            continue
        if file.price:
            prices_in[total] = file.price.input_usd_per_1k
            prices_out[total] = file.price.output_usd_per_1k
        if file.requests_per_minute:
            limits[total] = Decimal(file.requests_per_minute)
        if file.serving:
            batches[total] = Decimal(file.serving.max_batch_size)
    return Anchors(
        input_usd_per_1k=prices_in, output_usd_per_1k=prices_out, requests_per_minute=limits, batch_size=batches
    )


def _vary(file: VariantFile, path: Path, by_name: dict[str, ModelEntry]) -> ModelEntry:
    """The base's entry with the file's differences. A variant of a variant is refused."""
    base = by_name.get(file.variant_of)
    if base is None:
        raise InvalidDocument(
            f"{path}: variant_of names {file.variant_of!r}, which no file defines as a model of its own.",
            hint=suggest(file.variant_of, by_name),
        )
    # Claims stay with the base: its scores were not measured on the variant.
    changed: dict[str, Any] = {
        "name": file.name,
        "summary": file.summary,
        "variant_of": file.variant_of,
        "differs": file.differs,
        "chat_group": file.chat_group,
        "sources": file.sources,
        "notes": file.notes,
        "file": str(path),
    }
    if file.modalities is not None:
        changed["modalities"] = file.modalities
    if file.serving is not None:
        changed["serving"] = file.serving
    if file.context_tokens is not None:
        changed |= {"context_tokens": file.context_tokens, "yarn": file.yarn}
    return build_entry(base.model_dump(exclude={"claims"}) | changed)
