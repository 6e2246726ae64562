"""Refuses a body that is larger than anything control takes, before it is read into memory."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zenray.control.api.errors import render
from zenray.spec.errors import RequestTooLarge

MAX_BODY_BYTES = 64 << 20


class BodyLimit:
    """ASGI middleware. Believes `content-length` where it is sent, and counts where it is not."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await render(self._error())(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_bytes:
                raise self._error()  # inside the application, whose error handler answers
            return message

        await self._app(scope, counted, send)

    def _error(self) -> RequestTooLarge:
        return RequestTooLarge(f"The body is larger than {self._max_bytes:,} bytes.", hint="Send it in parts.")
