"""An engine's event stream on its way to the client: usage is counted and taken out, the model's name is put right.

The hot path reads only the two ends of an event. Its head, up to the list of choices, is the same on every event of a
stream; it is parsed once, and then recognised. Its tail is the running usage. No text of a model can look like either:
inside a JSON string every quote is preceded by a backslash. An event of any other shape is parsed whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

from zenray.spec.errors import UpstreamFailed
from zenray.spec.openai import ENGINE_ONLY_FIELDS
from zenray.spec.usage import Usage

MAX_EVENT_BYTES = 16 << 20
DONE = b"data: [DONE]\n\n"
_CHOICES = b'"choices":['
_TAIL = re.compile(
    rb'\],"usage":\{"prompt_tokens":(\d{1,9}),"total_tokens":\d+,"completion_tokens":(\d{1,9})'
    rb'(?:,"completion_tokens_details":null)?\}\}$'
)
_TAIL_BYTES = 160
_INDEX = re.compile(rb'\{"index":(\d{1,4}),')
_MAX_TOKENS = 2**32 - 1  # what a slot of the meter holds
_FINISH = b'"finish_reason":"'


class Counter(Protocol):
    """What the running usage is told to: a `Charge` of the meter."""

    def count(self, choice: int, input_tokens: int, output_tokens: int) -> None: ...

    def first_token(self) -> None: ...


def read_usage(usage: Mapping[str, Any]) -> Usage:
    """An engine's final usage. Raises UpstreamFailed when it is none."""
    details = usage.get("prompt_tokens_details") or {}
    try:
        read = Usage(
            input_tokens=usage["prompt_tokens"],
            cached_input_tokens=min(details.get("cached_tokens") or 0, usage["prompt_tokens"]),
            output_tokens=usage.get("completion_tokens") or 0,
        )
        if max(read.input_tokens, read.output_tokens) > _MAX_TOKENS:
            raise ValueError("more tokens than any engine makes")
    except (KeyError, TypeError, ValueError):
        raise UpstreamFailed("The engine's usage cannot be read.") from None
    return read


class EventStream:
    """Turns an engine's bytes into the client's, in whatever pieces they come. One for each answer.

    `final` is the engine's final usage once it has come, `error` its error event, `done` tells that the stream ended as
    it should. Every running usage is counted before the bytes that carry it are returned.
    """

    def __init__(self, counter: Counter, *, model: str, choices: int, include_usage: bool) -> None:
        self.final: Usage | None = None
        self.finish_reason: str | None = None
        self.error: Mapping[str, Any] | None = None
        self.done = False
        self._counter = counter
        self._model = model
        self._single = choices == 1
        self._include_usage = include_usage
        self._ending = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"
        self._rest = b""
        self._head_in = b"\0"  # begins no event
        self._head_out = b""
        self._token_seen = False

    def feed(self, data: bytes) -> bytes:
        """What to pass on for the next bytes of the engine; may be empty. Raises UpstreamFailed when it is no stream.

        After `error` or `done` is set nothing more is to be fed.
        """
        events = (self._rest + data if self._rest else data).split(b"\n\n")
        self._rest = events.pop()
        if len(self._rest) > MAX_EVENT_BYTES:
            raise UpstreamFailed(f"The engine sent an event of more than {MAX_EVENT_BYTES} bytes.")
        passed = []
        for event in events:
            passed.append(self._known(event) or self._parsed(event))
            if self.done or self.error is not None:
                break
        return passed[0] if len(passed) == 1 else b"".join(passed)

    def _known(self, event: bytes) -> bytes | None:
        """The hot path; None: the event has another shape."""
        if not event.startswith(self._head_in):
            return None
        tail = _TAIL.search(event, max(0, len(event) - _TAIL_BYTES))
        if tail is None:
            return None
        start = len(self._head_in)
        choice = 0
        if not self._single:
            index = _INDEX.match(event, start)
            if index is None:
                return None
            choice = int(index[1])
        output_tokens = int(tail[2])
        self._counter.count(choice, int(tail[1]), output_tokens)
        if output_tokens and not self._token_seen:
            self._token_seen = True
            self._counter.first_token()
        if _FINISH in event:
            self._note_finish(event)
        return self._head_out + event[start : tail.start()] + self._ending

    def _note_finish(self, event: bytes) -> None:
        start = event.rfind(_FINISH) + len(_FINISH)
        self.finish_reason = event[start : event.find(b'"', start)][:64].decode("utf-8", "replace")

    def _parsed(self, event: bytes) -> bytes:
        if not event.startswith(b"data:"):
            # A comment (an engine's keep-alive) goes on as it is; an empty event goes nowhere.
            return event + b"\n\n" if event.startswith(b":") else b""
        raw = event[5:].strip()
        if raw == b"[DONE]":
            self.done = True
            return DONE
        try:
            chunk = orjson.loads(raw)
        except orjson.JSONDecodeError:
            raise UpstreamFailed("The engine sent an event that is not JSON.") from None
        if type(chunk) is not dict:
            raise UpstreamFailed("The engine sent an event that is not an object.")
        if chunk.get("error") is not None:
            self.error = chunk["error"] if isinstance(chunk["error"], dict) else {"message": str(chunk["error"])}
            return b""
        return self._chunk(event, chunk)

    def _chunk(self, event: bytes, chunk: dict[str, Any]) -> bytes:
        usage = chunk.pop("usage", None)
        choices = chunk.get("choices")
        for name in ENGINE_ONLY_FIELDS:
            chunk.pop(name, None)
        chunk["model"] = self._model
        if choices:
            self._learn_head(event)
            if type(usage) is dict:
                self._count(choices[0], usage)
            for choice in choices:
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
            if self._include_usage:
                chunk["usage"] = None
        elif type(usage) is dict:
            self.final = read_usage(usage)
            if not self._include_usage:
                return b""
            chunk["usage"] = usage
        return b"data: " + orjson.dumps(chunk) + b"\n\n"

    def _count(self, choice: Mapping[str, Any], usage: Mapping[str, Any]) -> None:
        running = read_usage(usage)
        self._counter.count(choice.get("index") or 0, running.input_tokens, running.output_tokens)
        if running.output_tokens and not self._token_seen:
            self._token_seen = True
            self._counter.first_token()

    def _learn_head(self, event: bytes) -> None:
        """Remember the event's head, if it can be told apart for sure: closed at the choices it is a document."""
        end = event.find(_CHOICES) + len(_CHOICES)
        if self._head_out or end < len(_CHOICES) or not event.startswith(b"data: "):
            return
        try:
            head = orjson.loads(event[6:end] + b"]}")
        except orjson.JSONDecodeError:
            return
        if type(head) is dict and list(head)[-1] == "choices" and "usage" not in head:
            head["model"] = self._model
            head["choices"] = head.pop("choices")
            self._head_in = event[:end]
            self._head_out = b"data: " + orjson.dumps(head)[:-2]
