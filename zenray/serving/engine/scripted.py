"""An engine without a model: vLLM's OpenAI routes, answered by a script, with a count of every token it emitted.

Alone: `python -m zenray.serving.engine.scripted --port 0 --model NAME` (prints one JSON line with its port). In a Serve
replica: engine kind `scripted`. `GET /scripted/emitted[?id=chatcmpl-…]` tells what was emitted; see `truth.py`. How one
request is steered: `Script` in `script.py`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import orjson

from zenray.serving.engine.script import SCRIPT_HEADER, Script
from zenray.serving.engine.truth import Emitted, Truth
from zenray.serving.engine.wire import DONE, Wire, error_body, sse
from zenray.serving.guard import ALLOWED_ROUTES, AsgiApp, Guard, Receive, Scope, Send
from zenray.spec.errors import InvalidValue

SCRIPTED_ROUTES = ALLOWED_ROUTES | {"/scripted/emitted"}
_TOKEN_IDS_FROM = 1000


class _Refused(Exception):
    def __init__(self, status: int, kind: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind, status, param)


class _Cut(Exception):
    """The script wants the connection dropped: the server closes it when the application raises."""


@dataclass(frozen=True)
class _Ask:
    """One request, read."""

    wire: Wire
    script: Script
    entry: Emitted
    length: int  # tokens of each choice
    finish: str
    stream: bool
    usage: bool
    continuous: bool


class ScriptedEngine:
    """A pure ASGI application. One instance serves one model in one event loop."""

    def __init__(
        self,
        model: str,
        *,
        script: Script | None = None,
        max_model_len: int = 8192,
        emitted_path: Path | None = None,
        on_first_token: Callable[[float], None] | None = None,
    ) -> None:
        self.model = model
        self.max_model_len = max_model_len
        self.truth = Truth(emitted_path)
        self._script = script or Script()
        self._on_first_token = on_first_token  # told the seconds from a request to its first token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await _lifespan(receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            if scope["method"] == "POST" and path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
                body = await _read_json(receive)
                if path == "/tokenize":
                    return await _json(send, 200, self._tokenize(body))
                ask = self._read(body, scope, chat=path == "/v1/chat/completions")
                return await self._answer(ask, receive, send)
            if scope["method"] == "GET":
                return await self._get(path, scope, send)
            raise _Refused(404, "NotFoundError", f"No route {scope['method']} {path}.")
        except _Refused as refused:
            await _json(send, refused.status, refused.body)

    async def _get(self, path: str, scope: Scope, send: Send) -> None:
        if path == "/health":
            await _bytes(send, 200, b"", b"text/plain")
        elif path == "/v1/models":
            card = {"id": self.model, "object": "model", "created": int(time.time()), "owned_by": "vllm"}
            card |= {"root": self.model, "parent": None, "max_model_len": self.max_model_len, "permission": []}
            await _json(send, 200, {"object": "list", "data": [card]})
        elif path == "/scripted/emitted":
            wanted = parse_qs(scope.get("query_string", b"").decode()).get("id")
            await _json(send, 200, self.truth.report(wanted[0] if wanted else None))
        elif path == "/metrics":
            await _bytes(send, 200, self._metrics().encode(), b"text/plain; version=0.0.4; charset=utf-8")
        else:
            raise _Refused(404, "NotFoundError", f"No route GET {path}.")

    def _metrics(self) -> str:
        totals, label = self.truth.totals, f'{{model_name="{self.model}"}}'
        return (
            f"# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{label} {self.truth.running}\n"
            f"# TYPE vllm:num_requests_waiting gauge\nvllm:num_requests_waiting{label} 0\n"
            f"# TYPE vllm:prompt_tokens_total counter\nvllm:prompt_tokens_total{label} {totals['prompt_tokens']}\n"
            "# TYPE vllm:generation_tokens_total counter\n"
            f"vllm:generation_tokens_total{label} {totals['completion_tokens']}\n"
        )

    def _tokenize(self, body: dict[str, Any]) -> dict[str, Any]:
        text = _prompt_text(body, chat="messages" in body)
        count = _count_tokens(text, body.get("messages"))
        tokens = list(range(_TOKEN_IDS_FROM, _TOKEN_IDS_FROM + count))
        return {"count": count, "max_model_len": self.max_model_len, "tokens": tokens, "token_strs": None}

    def _read(self, body: dict[str, Any], scope: Scope, *, chat: bool) -> _Ask:
        if body.get("model") not in (None, self.model):
            raise _Refused(404, "NotFoundError", f"The model `{body['model']}` does not exist.", "model")
        headers = dict(scope["headers"])
        header = headers.get(SCRIPT_HEADER.encode(), b"").decode()
        text = _prompt_text(body, chat=chat)
        try:
            script = self._script.for_request(header, text)
        except InvalidValue as error:
            raise _Refused(400, "BadRequestError", str(error)) from None
        if script.status is not None:
            raise _Refused(script.status, "InternalServerError", f"The script answers with {script.status}.")
        prompts = 1 if chat or not isinstance(body.get("prompt"), list) else max(1, len(body["prompt"]))
        prompt_tokens = script.prompt_tokens or _count_tokens(text, body.get("messages"))
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        self._check_context(prompt_tokens, asked or 0)
        limit = asked or self.max_model_len - prompt_tokens
        whole = limit if body.get("ignore_eos") else max(script.tokens, body.get("min_tokens") or 0)
        base = headers.get(b"x-request-id", b"").decode() or body.get("request_id") or uuid.uuid4().hex
        options = body.get("stream_options") or {}
        entry = Emitted(
            id=("chatcmpl-" if chat else "cmpl-") + base,
            prompt_tokens=prompt_tokens,
            cached_tokens=min(script.cached_tokens, prompt_tokens),
            stream=bool(body.get("stream")),
            by_choice=[0] * ((body.get("n") or 1) * prompts),
        )
        return _Ask(
            wire=Wire(chat=chat, id=entry.id, model=self.model),
            script=script,
            entry=entry,
            length=min(whole, limit),
            finish="stop" if whole < limit else "length",
            stream=entry.stream,
            usage=bool(options.get("include_usage")),
            continuous=bool(options.get("include_usage")) and bool(options.get("continuous_usage_stats")),
        )

    def _check_context(self, prompt_tokens: int, asked: int) -> None:
        if prompt_tokens + asked > self.max_model_len or prompt_tokens >= self.max_model_len:
            raise _Refused(
                400,
                "BadRequestError",
                f"This model's maximum context length is {self.max_model_len} tokens. However, you requested {asked} "
                f"output tokens and your prompt contains {prompt_tokens} input tokens. Please reduce the length of the "
                "input prompt.",
                "input_tokens",
            )

    async def _answer(self, ask: _Ask, receive: Receive, send: Send) -> None:
        """Send the answer, unless the client goes away first: then stop at once, as vLLM aborts."""
        self.truth.open(ask.entry)
        work = asyncio.ensure_future(self._stream(ask, send) if ask.stream else self._whole(ask, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work
                self.truth.close(ask.entry, "cut")
            else:
                failed = work.exception()
                self.truth.close(ask.entry, "failed" if failed or ask.script.fail_after is not None else "finished")
                if failed:
                    raise failed
        except asyncio.CancelledError:
            work.cancel()
            self.truth.close(ask.entry, "cut")
            raise
        finally:
            gone.cancel()

    async def _steps(self, ask: _Ask) -> AsyncIterator[int]:
        """The number of new tokens of each choice, at the script's times."""
        begun_at = asyncio.get_running_loop().time()
        due = begun_at + ask.script.first_ms / 1000
        left = ask.length
        while left > 0:
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            if left == ask.length and self._on_first_token is not None:
                self._on_first_token(asyncio.get_running_loop().time() - begun_at)
            due += ask.script.delay_ms / 1000
            new = min(left, ask.script.tokens_per_chunk)
            left -= new
            yield new

    async def _stream(self, ask: _Ask, send: Send) -> None:
        entry, wire = ask.entry, ask.wire
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        if wire.chat:
            for index in range(len(entry.by_choice)):
                await _more(send, wire.role_chunk(index, entry.prompt_tokens if ask.continuous else None))
        steps = 0
        async for new in self._steps(ask):
            if ask.script.fail_after == steps:
                return await self._fail(ask, send)
            steps += 1
            for index, done in enumerate(entry.by_choice):
                finish = ask.finish if done + new == ask.length else None
                running = (entry.prompt_tokens, done + new) if ask.continuous else None
                chunk = wire.token_chunk(index, _text(done, new), finish, running=running, usage_follows=ask.usage)
                entry.add(index, new)  # before it is sent: the truth is never less than what a client has read
                await _more(send, chunk)
        if ask.script.fail_after is not None and ask.script.fail_after >= steps:
            return await self._fail(ask, send)
        if ask.usage:
            await _more(send, wire.usage_chunk(entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens))
        await send({"type": "http.response.body", "body": DONE})

    async def _whole(self, ask: _Ask, send: Send) -> None:
        entry = ask.entry
        async for _ in self._steps(ask):
            pass
        if ask.script.fail_after is not None:
            return await self._fail(ask, send, started=False)
        texts = [(_text(0, ask.length), ask.finish)] * len(entry.by_choice)
        for index in range(len(texts)):
            entry.add(index, ask.length)
        await _bytes(
            send, 200, ask.wire.whole(texts, entry.prompt_tokens, entry.completion_tokens, entry.cached_tokens)
        )

    async def _fail(self, ask: _Ask, send: Send, *, started: bool = True) -> None:
        body = error_body("The script fails here.", "InternalServerError", 500)
        match ask.script.fail:
            case "die":
                os._exit(1)
            case "hang":
                await asyncio.Event().wait()
            case "cut":
                raise _Cut
            case "error" if started:
                await _more(send, sse(body))
                await send({"type": "http.response.body", "body": DONE})
            case _:
                await _json(send, 500, body)


def scripted_app(engine: ScriptedEngine, key: str | None) -> AsgiApp:
    """The engine behind the same guard as every replica; `key` None leaves it open, for tests in one process."""
    return Guard(engine, key=key, allowed=SCRIPTED_ROUTES) if key else engine


def _text(done: int, new: int) -> str:
    return "".join(f" t{number}" for number in range(done, done + new))


def _prompt_text(body: dict[str, Any], *, chat: bool) -> str:
    """All text of the prompt. Raises _Refused (400) when there is none of the right type."""
    if not chat:
        prompt = body.get("prompt")
        if isinstance(prompt, str) or (isinstance(prompt, list) and prompt):
            return prompt if isinstance(prompt, str) else "\n".join(str(part) for part in prompt)
        raise _Refused(400, "BadRequestError", "Either prompt or prompt_embeds must be provided.", "prompt")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise _Refused(400, "BadRequestError", "messages: expected a list of messages.", "messages")
    parts: list[str] = []
    for message in messages:
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
        elif isinstance(content, list):
            parts += [str(part.get("text", "")) for part in content if isinstance(part, dict)]
    return "\n".join(parts)


def _count_tokens(text: str, messages: object) -> int:
    return max(1, len(text.split()) + 4 * (len(messages) if isinstance(messages, list) else 0))


async def _read_json(receive: Receive) -> dict[str, Any]:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    try:
        body = orjson.loads(b"".join(parts))
    except orjson.JSONDecodeError as error:
        raise _Refused(400, "BadRequestError", f"JSON decode error: {error}") from None
    if not isinstance(body, dict):
        raise _Refused(400, "BadRequestError", "Input should be a valid dictionary.")
    return body


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _bytes(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _json(send: Send, status: int, body: object) -> None:
    await _bytes(send, status, orjson.dumps(body))


def main() -> None:
    """Run one scripted engine under uvicorn; the first line on stdout is `{"port": …, "pid": …}`."""
    import uvicorn

    parser = argparse.ArgumentParser(prog="python -m zenray.serving.engine.scripted", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default="scripted")
    parser.add_argument("--script", default="", help="words, such as 'tokens=5 delay_ms=2'")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--emitted", type=Path, help="append one JSON line for each closed request")
    arguments = parser.parse_args()
    engine = ScriptedEngine(
        arguments.model,
        script=Script().changed_by(arguments.script),
        max_model_len=arguments.max_model_len,
        emitted_path=arguments.emitted,
    )
    listener = socket.create_server(("127.0.0.1", arguments.port), backlog=2048)
    print(orjson.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}).decode(), flush=True)
    app = scripted_app(engine, os.environ.get("VLLM_API_KEY"))
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
