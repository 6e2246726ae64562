"""Every error that zenray shows to a person or a client.

    ZenrayError                       500  internal_error
    ├── InvalidRequest                400  invalid_request
    │   ├── UnknownField              400  unknown_parameter
    │   ├── InvalidValue              400  invalid_value
    │   ├── ContextLengthExceeded     400  context_length_exceeded
    │   └── RequestTooLarge           413  request_too_large
    ├── InvalidDocument               400  invalid_document     (a file that a person wrote)
    ├── InvalidApiKey                 401  invalid_api_key
    ├── ScopeDenied                   403  model_not_allowed
    ├── NotFound                      404  not_found
    │   └── ModelNotFound             404  model_not_found
    ├── Conflict                      409  conflict             (control's own API only: the OpenAI client retries 409)
    ├── InsufficientQuota             429  insufficient_quota   (never retried)
    ├── RateLimited                   429  rate_limit_exceeded
    ├── CorruptData                   500  corrupt_data         (stored bytes differ from their manifest)
    ├── UpstreamFailed                502  upstream_failed
    └── Unavailable                   503  server_is_overloaded
        ├── ModelNotReady             503  model_not_ready
        ├── StorageUnavailable        503  storage_unavailable
        └── ClusterUnavailable        503  cluster_unavailable

A message says what is wrong, with the numbers; a hint says what to do. Neither ever holds a secret or a prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class ZenrayError(Exception):
    """An error with a machine-readable code, an HTTP status and, where one exists, a way out."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    should_retry: ClassVar[bool | None] = None  # None: the client's own rule for the status

    def __init__(
        self, message: str, *, hint: str | None = None, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.param = param
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message

    def to_openai(self) -> dict[str, dict[str, str | None]]:
        """The body of OpenAI's error shape: all four keys, always."""
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """`retry-after` (whole seconds, at least 1) and `x-should-retry`, where they apply."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        if self.should_retry is not None:
            headers["x-should-retry"] = "true" if self.should_retry else "false"
        return headers


class InvalidRequest(ZenrayError):
    code, status, type = "invalid_request", 400, "invalid_request_error"


class UnknownField(InvalidRequest):
    code = "unknown_parameter"


class InvalidValue(InvalidRequest):
    code = "invalid_value"


class ContextLengthExceeded(InvalidRequest):
    code = "context_length_exceeded"


class RequestTooLarge(InvalidRequest):
    code, status = "request_too_large", 413


class InvalidDocument(ZenrayError):
    code, status, type = "invalid_document", 400, "invalid_request_error"


class InvalidApiKey(ZenrayError):
    code, status, type = "invalid_api_key", 401, "invalid_request_error"


class ScopeDenied(ZenrayError):
    code, status, type = "model_not_allowed", 403, "invalid_request_error"


class NotFound(ZenrayError):
    code, status, type = "not_found", 404, "invalid_request_error"


class ModelNotFound(NotFound):
    code = "model_not_found"


class Conflict(ZenrayError):
    code, status, type = "conflict", 409, "invalid_request_error"
    should_retry = False


class InsufficientQuota(ZenrayError):
    code, status, type = "insufficient_quota", 429, "insufficient_quota"
    should_retry = False


class RateLimited(ZenrayError):
    code, status, type = "rate_limit_exceeded", 429, "requests"


class CorruptData(ZenrayError):
    code, status = "corrupt_data", 500


class UpstreamFailed(ZenrayError):
    code, status = "upstream_failed", 502


class Unavailable(ZenrayError):
    code, status = "server_is_overloaded", 503


class ModelNotReady(Unavailable):
    code = "model_not_ready"


class StorageUnavailable(Unavailable):
    code = "storage_unavailable"


class ClusterUnavailable(Unavailable):
    code = "cluster_unavailable"


def suggest(name: str, known: Iterable[str], *, most: int = 20) -> str:
    """A hint for an unknown name: the nearest known one, then the known ones (at most `most`)."""
    names = sorted(known)
    if not names:
        return "There are none yet."
    near = get_close_matches(name, names, n=1, cutoff=0.6)
    listed = ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
    return f"Did you mean {near[0]!r}? Known: {listed}." if near else f"Known: {listed}."
