"""Files that a person writes: YAML, parsed strictly, with errors that name the line and the nearest key."""

from __future__ import annotations

from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from zenray.spec.errors import InvalidDocument


class Document(BaseModel):
    """Base of everything that a person or another process writes: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


D = TypeVar("D", bound=BaseModel)


def load_document(path: Path, schema: type[D]) -> D:
    """Read one YAML file as `schema`. Raises InvalidDocument with file, line, and what to write instead."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        beside = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = (
            f"Files in {path.parent}: {', '.join(beside)}."
            if beside
            else f"The folder {path.parent} has no .yaml file."
        )
        raise InvalidDocument(f"{path}: no such file.", hint=hint) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDocument(f"{path}: cannot be read: {error}.") from None
    return parse_document(text, schema, where=str(path))


def parse_document(text: str, schema: type[D], *, where: str) -> D:
    """As `load_document`, for text that is already read; `where` names it in errors."""
    try:
        node = _compose(text)
        _refuse_repeated_keys(node, where, set())
        data = {} if node is None else yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise InvalidDocument(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    except ValueError as error:  # a tag or a date that the value does not fit, which PyYAML passes on as it comes
        raise InvalidDocument(f"{where}: not valid YAML: {error}.") from None
    except RecursionError:
        raise InvalidDocument(f"{where}: not valid YAML: nested too deeply, or containing itself.") from None
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise InvalidDocument(f"{where}: expected keys and values, got {type(data).__name__}.")
    return _validated(data, node, schema, where)


def _compose(text: str) -> yaml.Node | None:
    """By libyaml, ten times as fast, but for text nested so deeply that its wrapper would crash the process.

    A level of nesting is a bracket, or begins at a column of its own, where two may: a key's list stands below the key.
    """
    deepest = max(map(len, text.splitlines()), default=0) + text.count("[") + text.count("{")
    if yaml.__with_libyaml__ and deepest < 2_000:
        with suppress(yaml.YAMLError):  # the other one says better what is wrong, and where
            return yaml.compose(text, Loader=yaml.CSafeLoader)
    return yaml.compose(text, Loader=yaml.SafeLoader)


def read_document(data: Any, schema: type[D], *, where: str) -> D:
    """As `parse_document`, for what is already parsed (a request's body): errors name keys, not lines."""
    return _validated(data, None, schema, where)


def _validated(data: Any, node: yaml.Node | None, schema: type[D], where: str) -> D:
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        lines = [_describe(item, node, schema, where) for item in error.errors()]
        raise InvalidDocument("\n".join(lines)) from None


def _describe(item: Any, node: yaml.Node | None, schema: type[BaseModel], where: str) -> str:
    path = item["loc"]
    line = _line_of(node, path)
    place = f"{where}:{line}" if line else where
    name = ".".join(str(part) for part in path) or "(whole file)"
    if item["type"] == "extra_forbidden":
        known = _keys_at(schema, path[:-1])
        near = get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known keys: {', '.join(sorted(known))}."
        return f"{place}: unknown key {name!r}. {hint}"
    if item["type"] == "missing":
        return f"{place}: key {name!r} is missing."
    return f"{place}: {name}: {item['msg']}."


def _line_of(node: yaml.Node | None, path: tuple[Any, ...]) -> int | None:
    """The 1-based line of the deepest part of `path` that is in the file."""
    line = node.start_mark.line + 1 if node else None
    for part in path:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                if not any(key.value == "kind" and value.value == part for key, value in node.value):
                    return line  # else the part is only pydantic's name for one of several schemas
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _keys_at(schema: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that `schema` allows at `path`; what cannot be followed gives the keys reached so far."""
    reached: list[type[BaseModel]] = [schema]  # several: a union, until the path says which by its `kind`
    for part in path:
        if isinstance(part, int):
            continue
        field = reached[0].model_fields.get(part)
        inner = _models_in(field.annotation) if field else [one for one in reached if _kind_of(one) == part]
        if not inner:
            break
        reached = inner
    return list(reached[0].model_fields)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _models_in(argument)]


def _kind_of(schema: type[BaseModel]) -> str | None:
    """The one value that the key `kind` may have."""
    field = schema.model_fields.get("kind")
    values: tuple[Any, ...] = getattr(field.annotation, "__args__", ()) if field else ()
    return str(values[0]) if len(values) == 1 else None


def _refuse_repeated_keys(node: yaml.Node | None, where: str, visited: set[int]) -> None:
    """Refuse a mapping that has a key twice, or a list or mapping as a key. `visited`: ids of nodes, for aliases."""
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise InvalidDocument(
                    f"{where}:{key.start_mark.line + 1}: a key must be a word, not a list or mapping."
                )
            if key.value in seen:
                raise InvalidDocument(
                    f"{where}:{key.start_mark.line + 1}: key {key.value!r} is already on line {seen[key.value]}."
                )
            seen[key.value] = key.start_mark.line + 1
            _refuse_repeated_keys(value, where, visited)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _refuse_repeated_keys(value, where, visited)
