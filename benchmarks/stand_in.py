"""What stands around a gateway in its benchmarks: a small control, a bare pass-through, an upstream of fixed delay.

    python -m benchmarks.stand_in control < STANDING.json     # prints {"port": …}
    python -m benchmarks.stand_in passthrough PORT URL        # two workers, as many as the gateway has

The control answers the edge routes as the real one does (long poll, leases, usage once per billing key), from memory.
`GET /billed` tells how many events it holds, and their tokens.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from benchmarks import programs
from zenray.serving.engine.wire import DONE, Wire
from zenray.spec.edge import (
    Endpoint,
    KeyEntry,
    Lease,
    LeaseRequest,
    OrgEntry,
    RouteEntry,
    RouteState,
    Snapshot,
    UsageAck,
    UsageBatch,
)
from zenray.spec.money import Price

TOKEN = "edge-token-of-the-benchmark"
KEY = "sk-zen-benchmark-0"
MODEL = "zen-benchmark"
CREDIT_NANO_USD = 10**15
LONG_POLL_S = 10
PROCESSES = 2
ANSWER = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"up","choices":[{"index":0,"message":{"role":'
    '"assistant","content":"Paris is the capital of France.","refusal":null,"annotations":null,"audio":null,'
    '"function_call":null,"tool_calls":[],"reasoning":null},"logprobs":null,"finish_reason":"stop","stop_reason":null,'
    '"token_ids":null}],"service_tier":null,"system_fingerprint":null,"usage":{"prompt_tokens":30,"total_tokens":38,'
    '"completion_tokens":8,"prompt_tokens_details":null},"prompt_logprobs":null,"prompt_token_ids":null,'
    '"kv_transfer_params":null}'
)
NGINX = """worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/nginx.log; load_module {module};
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000; keepalive_timeout 75s;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port} backlog=2048; location / {{
    default_type {kind}; client_body_buffer_size 1m;
    echo_read_request_body; {commands}
  }} }}
}}
"""


@dataclass(frozen=True)
class Standing:
    """What control knows: `keys` keys and `deployments` models, all answered by `urls`."""

    urls: list[str]
    upstream_model: str = "up"
    keys: int = 10
    deployments: int = 1
    engine_key: str = "engine-key"


def key_name(number: int) -> str:
    return f"sk-zen-benchmark-{number}"


def model_name(number: int) -> str:
    return MODEL if number == 0 else f"{MODEL}-{number}"


def snapshot(standing: Standing) -> Snapshot:
    price = Price(
        version="1",
        input_usd_per_1k=Decimal("0.001"),
        cached_input_usd_per_1k=Decimal("0.0005"),
        output_usd_per_1k=Decimal("0.002"),
    )
    keys = {
        hashlib.sha256(key_name(number).encode()).hexdigest(): KeyEntry(
            key_id=f"key_{number}", org=f"org-{number % 10}", scopes=(MODEL + "*",)
        )
        for number in range(standing.keys)
    }
    routes = {
        model_name(number): RouteEntry(
            model=model_name(number),
            created_at=1,
            state=RouteState.READY,
            revision=f"{model_name(number)}--1",
            upstream_model=standing.upstream_model,
            endpoints=tuple(
                Endpoint(replica_id=f"{number}#{place}", url=url) for place, url in enumerate(standing.urls)
            ),
            engine_key=standing.engine_key,
            price=price,
            context_tokens=8192,
            default_max_tokens=256,
        )
        for number in range(standing.deployments)
    }
    orgs = {f"org-{number}": OrgEntry(org=f"org-{number}", cache_salt=f"{number}" * 32) for number in range(10)}
    return Snapshot(version=1, full=True, issued_at=time.time(), keys=keys, orgs=orgs, routes=routes)


class Control:
    """Edge routes from memory."""

    def __init__(self, standing: Standing) -> None:
        self._snapshot = snapshot(standing).model_dump_json().encode()
        self._free_nano_usd: dict[str, int] = {}
        self._leased: dict[tuple[str, str, str], tuple[int | None, Lease]] = {}
        self._billed: dict[str, tuple[int, int, int, int]] = {}

    def application(self) -> web.Application:
        app = web.Application(client_max_size=64 << 20, middlewares=[_with_token])
        app.router.add_get("/edge/snapshot", self._changes)
        app.router.add_post("/edge/leases", self._lease)
        app.router.add_post("/edge/usage", self._usage)
        app.router.add_get("/billed", self._report)
        return app

    async def _changes(self, request: web.Request) -> web.Response:
        if request.query["since"] == "1":
            await asyncio.sleep(LONG_POLL_S)
            return web.Response(status=204)
        return web.Response(body=self._snapshot, content_type="application/json")

    async def _lease(self, request: web.Request) -> web.Response:
        wish = LeaseRequest.model_validate_json(await request.read())
        asker = (wish.gateway_id, wish.boot_id, wish.org)
        last = self._leased.get(asker)
        if last is None or last[0] != wish.sequence:
            free = self._free_nano_usd.get(wish.org, CREDIT_NANO_USD) + wish.give_back_nano_usd
            granted = min(free, wish.wanted_nano_usd)
            self._free_nano_usd[wish.org] = free - granted
            last = wish.sequence, Lease(org=wish.org, granted_nano_usd=granted, balance_nano_usd=free)
            self._leased[asker] = last
        return web.Response(body=last[1].model_dump_json().encode(), content_type="application/json")

    async def _usage(self, request: web.Request) -> web.Response:
        batch = UsageBatch.model_validate_json(await request.read())
        before = len(self._billed)
        for event in batch.events:
            used = event.usage
            counts = (used.output_tokens, used.input_tokens, used.cached_input_tokens, event.cost_nano_usd())
            self._billed[event.billing_key] = counts
        ack = UsageAck(received=len(batch.events), new=len(self._billed) - before)
        return web.Response(body=ack.model_dump_json().encode(), content_type="application/json")

    async def _report(self, request: web.Request) -> web.Response:
        names = ("output_tokens", "input_tokens", "cached_input_tokens", "cost_nano_usd")
        sums = [sum(counts) for counts in zip(*self._billed.values(), strict=True)] or [0] * len(names)
        return web.json_response({"events": len(self._billed)} | dict(zip(names, sums, strict=True)))


@web.middleware
async def _with_token(request: web.Request, handler: Any) -> Any:
    if request.headers.get("authorization") != f"Bearer {TOKEN}":
        raise web.HTTPUnauthorized
    return await handler(request)


async def passthrough(scope: Any, receive: Any, send: Any) -> None:
    """A bare ASGI pass-through to `$UPSTREAM`: reads a request, asks with aiohttp, and writes the answer."""
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["session"] = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await scope["state"]["session"].close()
        return await send({"type": "lifespan.shutdown.complete"})
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    headers = {"content-type": "application/json", "authorization": "Bearer engine-key"}
    url = os.environ["UPSTREAM"] + scope["path"]
    async with scope["state"]["session"].post(url, data=body, headers=headers) as answer:
        kind = answer.headers["content-type"].encode()
        start: dict[str, Any] = {"type": "http.response.start", "status": answer.status}
        if answer.content_length is None:
            await send(start | {"headers": [(b"content-type", kind)]})
            async for data in answer.content.iter_any():
                await send({"type": "http.response.body", "body": data, "more_body": True})
            return await send({"type": "http.response.body", "body": b""})
        raw = await answer.read()
        await send(start | {"headers": [(b"content-type", kind), (b"content-length", b"%d" % len(raw))]})
        await send({"type": "http.response.body", "body": raw})


@contextmanager
def running(
    command: list[str], ready_url: str | None = None, *, ready_s: float = 120, log: Path, **options: Any
) -> Iterator[Any]:
    """A process until the end of the block; `ready_url` must answer 200 before. Its output is in `log`."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=options.pop("stdout", file), stderr=file, **options)
    try:
        if ready_url is not None:
            wait_for(ready_url, process, log, timeout_s=ready_s)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, *, timeout_s: float = 120) -> None:
    """Raises RuntimeError, with the end of the log, when the process ends or does not answer in time."""
    until_s = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < until_s:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} does not answer at {url}:\n{log.read_text(errors='replace')[-3000:]}")


@contextmanager
def upstream_up(folder: Path, delay_s: float = 0.02) -> Iterator[str]:
    """nginx that answers every POST after a fixed delay, in vLLM's shape."""
    with _nginx_up(folder, "application/json", f"echo_sleep {delay_s}; echo -n '{ANSWER}';") as url:
        yield url


@contextmanager
def streaming_upstream_up(folder: Path, chunks: int, gap_s: float) -> Iterator[str]:
    """nginx that answers every POST with a stream in vLLM's shape: `chunks` tokens, the first of them at once."""
    wire, prompt_tokens = Wire(chat=True, id="chatcmpl-1", model="up", created=1), 30
    written = [wire.role_chunk(0, prompt_tokens)]
    for number in range(chunks):
        finish = "length" if number == chunks - 1 else None
        running = (prompt_tokens, number + 1)
        written.append(wire.token_chunk(0, f" t{number}", finish, running=running, usage_follows=True))
    written[1] = written[0] + written[1]
    written[-1] += wire.usage_chunk(prompt_tokens, chunks, 0) + DONE
    commands = [f"echo -n '{_quoted(chunk)}'; echo_flush;" for chunk in written[1:]]
    with _nginx_up(folder, "text/event-stream", f"\n    echo_sleep {gap_s}; ".join(commands)) as url:
        yield url


def _quoted(chunk: bytes) -> str:
    return chunk.decode().replace("\n", "\\n")


@contextmanager
def _nginx_up(folder: Path, kind: str, commands: str) -> Iterator[str]:
    port = free_port()
    settings = {"folder": folder, "module": programs.echo_module(), "port": port, "kind": kind, "commands": commands}
    (folder / "nginx.conf").write_text(NGINX.format(**settings))
    url = f"http://127.0.0.1:{port}"
    command = [str(programs.nginx()), "-c", str(folder / "nginx.conf"), "-e", str(folder / "nginx.log")]
    with running(command, url, log=folder / "nginx.log"):
        yield url


@contextmanager
def gateway_up(folder: Path, standing: Standing, *, processes: int = PROCESSES) -> Iterator[tuple[str, str, int]]:
    """A control and a gateway with keys, scopes, leases, metering and log: (its URL, control's URL, its process id)."""
    folder.mkdir(parents=True)
    command = [sys.executable, "-m", "benchmarks.stand_in", "control"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with running(command, log=folder / "control.log", **pipes) as control:
        control.stdin.write(json.dumps(asdict(standing)).encode())
        control.stdin.close()
        control_url = f"http://127.0.0.1:{json.loads(control.stdout.readline())['port']}"
        port = free_port()
        (folder / "token").write_text(TOKEN)
        config = {"port": port, "control_url": control_url, "edge_token_file": str(folder / "token")}
        config |= {"state_dir": str(folder / "state"), "processes": processes}
        (folder / "gateway.json").write_text(json.dumps(config))
        url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "zenray.gateway", str(folder / "gateway.json")]
        with running(command, url + "/readyz", log=folder / "gateway.log") as gateway:
            _wait_for_all(url, processes)
            yield url, control_url, gateway.pid


def _wait_for_all(url: str, processes: int, timeout_s: float = 60) -> None:
    """The kernel deals connections to the gateway's processes: ask until each of them has said that it is ready."""
    ready: set[str] = set()
    until_s = time.monotonic() + timeout_s
    while len(ready) < processes:
        if time.monotonic() > until_s:
            raise RuntimeError(f"of {processes} processes only {sorted(ready)} are ready")
        try:
            with urllib.request.urlopen(url + "/readyz", timeout=2) as answer:
                ready.add(json.load(answer)["gateway_id"])
        except OSError:
            time.sleep(0.1)


@contextmanager
def passthrough_up(folder: Path, upstream_url: str) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.stand_in:passthrough", "--port", str(port)]
    command += ["--workers", str(PROCESSES), "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    command += ["--log-level", "error"]
    log = folder / "passthrough.log"
    with running(command, log=log, env=os.environ | {"UPSTREAM": upstream_url}) as process:
        url = f"http://127.0.0.1:{port}"
        until_s = time.monotonic() + 60
        while not listening(port) and process.poll() is None and time.monotonic() < until_s:
            time.sleep(0.1)
        time.sleep(1)  # for the second worker
        yield url


def billed(control_url: str, expected: int, *, timeout_s: float = 30) -> dict[str, int]:
    """What control has been sent, once it is `expected` events or the time is up."""
    until_s = time.monotonic() + timeout_s
    while True:
        request = urllib.request.Request(control_url + "/billed", headers={"authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            found: dict[str, int] = json.load(answer)
        if found["events"] >= expected or time.monotonic() > until_s:
            return found
        time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def main() -> None:
    if sys.argv[1:] != ["control"]:
        sys.exit("usage: python -m benchmarks.stand_in control < STANDING.json")
    listener = socket.create_server(("127.0.0.1", 0))
    print(json.dumps({"port": listener.getsockname()[1]}), flush=True)
    application = Control(Standing(**json.load(sys.stdin))).application()
    web.run_app(application, sock=listener, print=lambda *_: None, access_log=None)


if __name__ == "__main__":
    main()
