"""What went wrong at an engine, said in OpenAI's words.

A client may see what an engine says about the client's own request. It never sees what is between the gateway and its
engines: addresses, keys, the names that engines know models by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from zenray.spec.errors import (
    ContextLengthExceeded,
    InvalidRequest,
    RequestTooLarge,
    Unavailable,
    UpstreamFailed,
    ZenrayError,
)

_CLIENT_ERRORS = (400, 422)


def from_answer(status: int, raw: bytes, *, upstream_model: str, model: str) -> ZenrayError:
    """The error for an engine's answer that is not 200."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        body = None
    error = body.get("error", body) if isinstance(body, dict) else None
    return _translate(status, error if isinstance(error, dict) else {}, upstream_model, model)


def from_event(error: Mapping[str, Any], *, upstream_model: str, model: str) -> ZenrayError:
    """The error for an engine's `data: {"error": …}` in a stream that had begun."""
    code = error.get("code")
    return _translate(code if isinstance(code, int) else 500, error, upstream_model, model)


def died(started: bool) -> UpstreamFailed:
    """The connection to the engine broke: before its answer began, or in the middle of it."""
    where = "in the middle of the answer" if started else "before it answered"
    return UpstreamFailed(f"The model's replica was lost {where}.", hint="Retry the request.", retry_after_s=1)


def _translate(status: int, error: Mapping[str, Any], upstream_model: str, model: str) -> ZenrayError:
    message = str(error.get("message") or "")[:2000]
    if upstream_model:
        message = message.replace(upstream_model, model)
    param = error.get("param") if isinstance(error.get("param"), str) else None
    if status in _CLIENT_ERRORS:
        if "maximum context length" in message or "longer than the maximum model length" in message:
            return ContextLengthExceeded(message, param="messages" if param in (None, "input_tokens") else param)
        return InvalidRequest(message or "The engine refused the request.", param=param)
    if status == 413:
        return RequestTooLarge(message or "The engine finds the request too large.")
    if status in (429, 503):
        return Unavailable(f"The model '{model}' is overloaded.", hint="Retry.", retry_after_s=1)
    # 401, 403 and 404 mean that gateway and engine are set up differently: nothing that a client can mend.
    return UpstreamFailed(f"The model's replica failed (status {status}).", hint="Retry the request.")
