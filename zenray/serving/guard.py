"""What a replica's port lets through: the routes that somebody needs, and only with the replica's key.

vLLM asks for its key on `/v1` alone, and offers routes that change the engine (LoRA by path, sleep, profile). A
replica's port is reachable by whoever reaches its host, so both are narrowed here, in front of the engine.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

FREE_ROUTES = frozenset({"/health"})
ALLOWED_ROUTES = frozenset(
    {
        "/health",
        "/metrics",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
    }
)


class Guard:
    """Pure ASGI middleware: 404 outside `allowed`, 401 without `Authorization: Bearer KEY` except on FREE_ROUTES."""

    def __init__(self, app: AsgiApp, *, key: str, allowed: frozenset[str] = ALLOWED_ROUTES) -> None:
        if not key:
            raise ValueError("a replica needs a key: its port is open to whoever reaches the host")
        self._app = app
        self._key_digest = hashlib.sha256(key.encode()).digest()
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            raise RuntimeError(f"a replica speaks HTTP only, not {scope['type']}")
        else:
            await self._http(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
        if path not in self._allowed:
            await _refuse(send, 404, f"No route {path} on this replica.", "NotFoundError")
        elif path not in FREE_ROUTES and not self._has_key(scope):
            await _refuse(send, 401, "This replica needs its own key.", "Unauthorized")
        else:
            await self._app(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, token = value.partition(b" ")
                digest = hashlib.sha256(token.strip()).digest()
                return scheme.lower() == b"bearer" and hmac.compare_digest(digest, self._key_digest)
        return False


async def _refuse(send: Send, status: int, message: str, kind: str) -> None:
    body = json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
