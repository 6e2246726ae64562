"""OpenAI's wire: which request fields a client may send, with their types and ranges.

An allow-list. Fields that are not named here never reach an engine; above all not vLLM's extensions, with which a
tenant could choose its priority, its chat template or where its cache is sent. One table serves checking and the
OpenAPI document. A field that is null counts as absent, as it does at OpenAI.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from zenray.spec.errors import InvalidRequest, InvalidValue, UnknownField, suggest

MAX_CHOICES = 128
MAX_STOPS = 4
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of `max_tokens` for /v1/completions

Json = Any
Check = Callable[[Json, str], None]
"""Takes a value that is not null and its path in the body; raises InvalidValue or UnknownField."""


@dataclass(frozen=True, slots=True)
class Field:
    """One request field. `forwarded=False`: accepted, since clients send it, but no engine needs it."""

    check: Check
    schema: Mapping[str, Json]
    forwarded: bool = True


def _shown(value: Json) -> str:
    """What was sent, short enough for a message and without a prompt's text."""
    if isinstance(value, str):
        return f"a string of {len(value)} characters" if len(value) > 32 else repr(value)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int | float):
        return str(value)[:40]
    return "a list" if isinstance(value, list) else "an object"


def _refuse(path: str, expected: str, value: Json) -> InvalidValue:
    return InvalidValue(f"Invalid value for '{path}': expected {expected}, got {_shown(value)}.", param=path)


def integer(low: int | None = None, high: int | None = None, *, forwarded: bool = True) -> Field:
    schema: dict[str, Json] = {"type": "integer"}
    expected = "an integer"
    if low is not None and high is not None:
        expected = f"an integer from {low} to {high}"
        schema |= {"minimum": low, "maximum": high}
    elif low is not None:
        expected = f"an integer of at least {low}"
        schema |= {"minimum": low}

    def check(value: Json, path: str) -> None:
        if type(value) is not int or (low is not None and value < low) or (high is not None and value > high):
            raise _refuse(path, expected, value)

    return Field(check, schema, forwarded)


def number(low: float, high: float) -> Field:
    def check(value: Json, path: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            raise _refuse(path, f"a number from {low:g} to {high:g}", value)

    return Field(check, {"type": "number", "minimum": low, "maximum": high})


def boolean() -> Field:
    def check(value: Json, path: str) -> None:
        if type(value) is not bool:
            raise _refuse(path, "true or false", value)

    return Field(check, {"type": "boolean"})


def text(max_chars: int | None = None, *, forwarded: bool = True) -> Field:
    def check(value: Json, path: str) -> None:
        if type(value) is not str:
            raise _refuse(path, "a string", value)
        if max_chars is not None and len(value) > max_chars:
            raise _refuse(path, f"a string of at most {max_chars} characters", value)

    return Field(check, {"type": "string"} | ({"maxLength": max_chars} if max_chars else {}), forwarded)


def one_of(*values: Json, forwarded: bool = True) -> Field:
    listed = ", ".join(_shown(value) for value in values)

    def check(value: Json, path: str) -> None:
        if not any(type(value) is type(allowed) and value == allowed for allowed in values):
            raise _refuse(path, f"one of {listed}", value)

    return Field(check, {"enum": list(values)}, forwarded)


def list_of(item: Field, *, low: int = 0, high: int | None = None) -> Field:
    expected = f"a list of {low} to {high} items" if high is not None else f"a list of at least {low} items"
    schema: dict[str, Json] = {"type": "array", "items": item.schema, "minItems": low}
    if high is not None:
        schema["maxItems"] = high

    def check(value: Json, path: str) -> None:
        if type(value) is not list:
            raise _refuse(path, "a list", value)
        if len(value) < low or (high is not None and len(value) > high):
            raise InvalidValue(
                f"Invalid value for '{path}': expected {expected}, got a list of {len(value)}.", param=path
            )
        for index, one in enumerate(value):
            item.check(one, f"{path}[{index}]")

    return Field(check, schema)


def nullable(inner: Field) -> Field:
    """Inside objects null means absent too; only list items and union members need this spelled out."""

    def check(value: Json, path: str) -> None:
        if value is not None:
            inner.check(value, path)

    return Field(check, {"anyOf": [inner.schema, {"type": "null"}]})


def any_object() -> Field:
    """An object that is the client's own, such as a JSON schema."""

    def check(value: Json, path: str) -> None:
        if type(value) is not dict:
            raise _refuse(path, "an object", value)

    return Field(check, {"type": "object"})


def text_or(other: Field) -> Field:
    def check(value: Json, path: str) -> None:
        if type(value) is not str:
            other.check(value, path)

    return Field(check, {"anyOf": [{"type": "string"}, other.schema]})


@dataclass(frozen=True, slots=True)
class Shape:
    """An object with exactly these fields. `refused` names fields of OpenAI that are not offered, and what to do."""

    fields: Mapping[str, Field]
    required: tuple[str, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def check(self, value: Json, path: str = "") -> None:
        if type(value) is not dict:
            raise _refuse(path, "an object", value)
        fields = self.fields
        for name, one in value.items():
            known = fields.get(name)
            if known is None:
                if one is None and name in self.refused:
                    continue
                raise self._unknown(name, path)
            if one is not None:
                known.check(one, f"{path}.{name}" if path else name)
        for name in self.required:
            if value.get(name) is None:
                at = f"{path}.{name}" if path else name
                raise InvalidRequest(f"Missing required parameter: '{at}'.", param=at)

    def _unknown(self, name: str, path: str) -> UnknownField:
        at = f"{path}.{name[:64]}" if path else name[:64]
        if name in self.refused:
            return UnknownField(f"'{at}' is not supported here.", hint=self.refused[name], param=at)
        return UnknownField(
            f"Unrecognized request argument supplied: '{at}'.", hint=suggest(name[:64], self.fields, most=40), param=at
        )

    def forwarded(self, body: Mapping[str, Json]) -> dict[str, Json]:
        """What of a checked body goes to the engine: without nulls, and without what no engine needs."""
        return {name: value for name, value in body.items() if value is not None and self.fields[name].forwarded}

    def schema(self) -> dict[str, Json]:
        properties = {name: dict(known.schema) for name, known in self.fields.items()}
        return {
            "type": "object",
            "properties": properties,
            "required": list(self.required),
            "additionalProperties": False,
        }

    def as_field(self) -> Field:
        return Field(self.check, self.schema())


def tagged(variants: Mapping[str, Shape], *, tag: str = "type") -> Field:
    """An object whose shape is chosen by its `tag`."""
    listed = ", ".join(repr(name) for name in variants)

    def check(value: Json, path: str) -> None:
        if type(value) is not dict:
            raise _refuse(path, "an object", value)
        kind = value.get(tag)
        shape = variants.get(kind) if type(kind) is str else None
        if shape is None:
            raise _refuse(f"{path}.{tag}", f"one of {listed}", kind)
        shape.check(value, path)

    return Field(check, {"oneOf": [shape.schema() for shape in variants.values()]})


def _logit_bias() -> Field:
    def check(value: Json, path: str) -> None:
        if type(value) is not dict:
            raise _refuse(path, "an object of token ids and numbers", value)
        for token, bias in value.items():
            if not token.isdecimal() or len(token) > 9:
                raise InvalidValue(f"Invalid key in '{path}': expected a token id, got {_shown(token)}.", param=path)
            if type(bias) not in (int, float) or not -100 <= bias <= 100:
                raise _refuse(f"{path}.{token}", "a number from -100 to 100", bias)

    return Field(check, {"type": "object", "additionalProperties": {"type": "number"}})


def _tool_choice(named: Shape) -> Field:
    words = one_of("none", "auto", "required")

    def check(value: Json, path: str) -> None:
        (words.check if type(value) is str else named.check)(value, path)

    return Field(check, {"anyOf": [words.schema, named.schema()]})


def _prompt() -> Field:
    """A string, a list of strings, a list of token ids, or a list of lists of token ids."""
    token = integer(0, 2**31 - 1)

    def check(value: Json, path: str) -> None:
        if type(value) is str:
            return
        if type(value) is not list or not value:
            raise _refuse(path, "a string, or a list that is not empty", value)
        first = type(value[0])
        if first not in (str, int, list):
            raise _refuse(f"{path}[0]", "a string, a token id or a list of token ids", value[0])
        for index, one in enumerate(value):
            if type(one) is not first:
                raise _refuse(f"{path}[{index}]", "the same type as the first item", one)
            if first is list:
                if not one:
                    raise _refuse(f"{path}[{index}]", "a list that is not empty", one)
                for place, number_ in enumerate(one):
                    token.check(number_, f"{path}[{index}][{place}]")
            elif first is int:
                token.check(one, f"{path}[{index}]")

    ids = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    strings = {"type": "array", "items": {"type": "string"}}
    return Field(check, {"anyOf": [{"type": "string"}, strings, ids, {"type": "array", "items": ids}]})


_TEXT_PART = Shape({"type": one_of("text"), "text": text()}, ("type", "text"))
_REFUSAL_PART = Shape({"type": one_of("refusal"), "refusal": text()}, ("type", "refusal"))
_IMAGE_URL = Shape({"url": text(), "detail": one_of("auto", "low", "high")}, ("url",))
_AUDIO = Shape({"data": text(), "format": one_of("wav", "mp3")}, ("data", "format"))
_USER_PARTS = {
    "text": _TEXT_PART,
    "image_url": Shape({"type": one_of("image_url"), "image_url": _IMAGE_URL.as_field()}, ("type", "image_url")),
    "input_audio": Shape({"type": one_of("input_audio"), "input_audio": _AUDIO.as_field()}, ("type", "input_audio")),
}
PART_MODALITIES = {"image_url": "vision", "input_audio": "audio"}  # as the catalog names what a model takes

_CALLED = Shape({"name": text(256), "arguments": text()}, ("name", "arguments"))
_TOOL_CALL = Shape(
    {"id": text(256), "type": one_of("function"), "function": _CALLED.as_field(), "index": integer(0)},
    ("id", "function"),
)
_TEXT_CONTENT = text_or(list_of(tagged({"text": _TEXT_PART}), low=1))
_NAMED = {"role": text(16), "name": text(256), "content": _TEXT_CONTENT}
# An assistant's message is often an answer sent back as it came, with all its empty fields.
_ASSISTANT = Shape(
    {
        "role": text(16),
        "name": text(256),
        "content": text_or(list_of(tagged({"text": _TEXT_PART, "refusal": _REFUSAL_PART}), low=1)),
        "refusal": text(),
        "tool_calls": list_of(_TOOL_CALL.as_field(), high=MAX_CHOICES),
        "reasoning": text(),
        "reasoning_content": text(),
    },
    ("role",),
    refused={
        "audio": "Send the text instead.",
        "function_call": "Use 'tool_calls'.",
        "annotations": "Leave it out.",
    },
)
_MESSAGES: Mapping[str, Shape] = {
    "system": Shape(_NAMED, ("role", "content")),
    "developer": Shape(_NAMED, ("role", "content")),
    "user": Shape(_NAMED | {"content": text_or(list_of(tagged(_USER_PARTS), low=1))}, ("role", "content")),
    "assistant": _ASSISTANT,
    "tool": Shape(_NAMED | {"tool_call_id": text(256)}, ("role", "content", "tool_call_id")),
}

_FUNCTION = Shape({"name": text(64), "description": text(), "parameters": any_object(), "strict": boolean()}, ("name",))
_TOOL = Shape({"type": one_of("function"), "function": _FUNCTION.as_field()}, ("type", "function"))
_JSON_SCHEMA = Shape(
    {"name": text(64), "description": text(), "schema": any_object(), "strict": boolean()}, ("name", "schema")
)
_RESPONSE_FORMAT = tagged(
    {
        "text": Shape({"type": one_of("text")}, ("type",)),
        "json_object": Shape({"type": one_of("json_object")}, ("type",)),
        "json_schema": Shape(
            {"type": one_of("json_schema"), "json_schema": _JSON_SCHEMA.as_field()}, ("type", "json_schema")
        ),
    }
)
_STREAM_OPTIONS = Shape({"include_usage": boolean(), "include_obfuscation": boolean()})
_TOOL_CHOICE = Shape(
    {"type": one_of("function"), "function": Shape({"name": text(64)}, ("name",)).as_field()}, ("type", "function")
)

_SAMPLING: Mapping[str, Field] = {
    "model": text(256),
    "frequency_penalty": number(-2, 2),
    "logit_bias": _logit_bias(),
    "max_tokens": integer(1),
    "n": integer(1, MAX_CHOICES),
    "presence_penalty": number(-2, 2),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": text_or(list_of(text(), high=MAX_STOPS)),
    "stream": boolean(),
    "stream_options": _STREAM_OPTIONS.as_field(),
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "user": text(512, forwarded=False),
}

CHAT = Shape(
    {
        **_SAMPLING,
        "messages": list_of(tagged(_MESSAGES, tag="role"), low=1),
        "max_completion_tokens": integer(1),
        "logprobs": boolean(),
        "top_logprobs": integer(0, MAX_TOP_LOGPROBS),
        "parallel_tool_calls": boolean(),
        "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh"),
        "response_format": _RESPONSE_FORMAT,
        "tools": list_of(_TOOL.as_field(), low=1, high=128),
        "tool_choice": _tool_choice(_TOOL_CHOICE),
        # Hints and labels: they change nothing in the answer, and no engine is told.
        "metadata": Field(any_object().check, {"type": "object"}, forwarded=False),
        "modalities": Field(list_of(one_of("text"), low=1).check, {"enum": [["text"]]}, forwarded=False),
        "prompt_cache_key": text(512, forwarded=False),
        "prompt_cache_retention": one_of("in_memory", "24h", forwarded=False),
        "safety_identifier": text(512, forwarded=False),
        "service_tier": one_of("auto", "default", forwarded=False),
        "store": one_of(False, forwarded=False),
    },
    ("model", "messages"),
    refused={
        "audio": "Answers are text only.",
        "function_call": "Use 'tool_choice'.",
        "functions": "Use 'tools'.",
        "moderation": "Leave it out.",
        "prediction": "Leave it out.",
        "prompt_cache_options": "Leave it out.",
        "verbosity": "Ask for short or long answers in a message.",
        "web_search_options": "Use 'tools'.",
    },
)

COMPLETION = Shape(
    {
        **_SAMPLING,
        "prompt": _prompt(),
        "max_tokens": integer(0),  # 0 with `echo` scores a prompt
        "echo": boolean(),
        "logprobs": integer(0, MAX_COMPLETION_LOGPROBS),
    },
    ("model", "prompt"),
    refused={"best_of": "Use 'n', and choose among the answers.", "suffix": "Use 'prompt' alone."},
)

# vLLM's answers carry fields of its own; these are taken out of whole answers.
ENGINE_ONLY_FIELDS = (
    "prompt_logprobs",
    "prompt_token_ids",
    "prompt_text",
    "kv_transfer_params",
    "ec_transfer_params",
    "metrics",
)
ENGINE_ONLY_CHOICE_FIELDS = ("stop_reason", "token_ids", "prompt_token_ids", "routed_experts", "prompt_logprobs")
