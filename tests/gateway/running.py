"""A gateway as a real process, with a fake control and scripted engines around it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import aiohttp
import openai

from tests.gateway.fake_control import TOKEN, FakeControl, route

KEY = "sk-zen-good"


class Engine:
    """`python -m zenray.serving.engine.scripted` on a free port."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"

    @classmethod
    async def start(cls, *arguments: str) -> Engine:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "zenray.serving.engine.scripted",
            *arguments,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | {"VLLM_API_KEY": "engine-key"},
        )
        assert process.stdout
        return cls(process, json.loads(await process.stdout.readline())["port"])

    async def emitted(self, answer_id: str) -> Any:
        """What the engine itself counted for one answer."""
        headers = {"authorization": "Bearer engine-key"}
        url = f"{self.url}/scripted/emitted?id={answer_id}"
        async with aiohttp.ClientSession(headers=headers) as session, session.get(url) as response:
            (entry,) = (await response.json())["requests"]
            return entry

    async def stop(self, number: int = signal.SIGKILL) -> None:
        await _stop(self.process, number)


async def _stop(process: asyncio.subprocess.Process, number: int) -> int:
    if process.returncode is None:
        process.send_signal(number)
    return await process.wait()


class RunningGateway:
    """`python -m zenray.gateway` on a free port; what it logs is kept."""

    def __init__(self, folder: Path, control: FakeControl, **settings: object) -> None:
        self.folder = folder
        self.control = control
        self.log: list[dict[str, Any]] = []
        self.url = ""
        self._settings = settings
        self._readers: list[asyncio.Task[None]] = []
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.pid

    async def start(self, *, wait_for_snapshot: bool = True) -> RunningGateway:
        (self.folder / "edge-token").write_text(TOKEN)
        config = {
            "port": 0,
            "control_url": self.control.url,
            "edge_token_file": str(self.folder / "edge-token"),
            "state_dir": str(self.folder / "state"),
            "ship_interval_s": 0.05,
        }
        (self.folder / "gateway.json").write_text(json.dumps(config | self._settings))
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "zenray.gateway",
            str(self.folder / "gateway.json"),
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        self._readers.append(asyncio.create_task(self._read(self._process)))
        listening = await self.logged("listening")
        self.url = listening["url"]
        for number in range(int(str(self._settings.get("processes", 1)))):
            await self.logged("started", gateway_id=f"gateway-{number}")
        if wait_for_snapshot:
            await self.logged("snapshot_applied")
        return self

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr
        while line := await process.stderr.readline():
            try:
                self.log.append(json.loads(line))
            except ValueError:
                self.log.append({"event": "not json", "line": line.decode()})

    async def logged(self, event: str, *, timeout_s: float = 60, **fields: object) -> dict[str, Any]:
        """The first log line of an event with these fields, waited for."""
        async with asyncio.timeout(timeout_s):
            while True:
                for line in self.log:
                    if line["event"] == event and all(line.get(name) == value for name, value in fields.items()):
                        return line
                assert self._process is None or self._process.returncode is None, self.log
                await asyncio.sleep(0.01)

    async def stop(self, number: int = signal.SIGTERM) -> int:
        assert self._process
        status = await _stop(self._process, number)
        await asyncio.gather(*self._readers)
        return status

    async def wait(self) -> int:
        """The exit status of a gateway that ends by itself."""
        assert self._process
        async with asyncio.timeout(60):
            return await self._process.wait()

    def client(self, key: str = KEY, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=key, **({"max_retries": 0} | options))


async def until(condition: Any, *, timeout_s: float = 60) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the conditions are facts of other processes
            await asyncio.sleep(0.01)


__all__ = ["KEY", "Engine", "FakeControl", "RunningGateway", "route", "until"]
