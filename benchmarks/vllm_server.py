"""vLLM's own API server, which the benchmarks compare with: started as a program of its own, ended whatever happens."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.stand_in import free_port


@dataclass(frozen=True)
class Server:
    url: str
    key: str
    process: subprocess.Popen[bytes]
    log: Path
    began_s: float  # time.perf_counter() at its exec


@contextmanager
def vllm_server(
    arguments: Mapping[str, object], environment: Mapping[str, str], log: Path, *, key: str | None = None
) -> Iterator[Server]:
    """Started with engine arguments by their names; it is loading still. All its processes are gone at the end."""
    port, key = free_port(), key or secrets.token_urlsafe(24)
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags(arguments)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    began_s = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "VLLM_API_KEY": key},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield Server(f"http://127.0.0.1:{port}", key, process, log, began_s)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def flags(arguments: Mapping[str, object]) -> list[str]:
    """vLLM's engine arguments as its command line spells them."""
    spelled: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            if name != "disable_log_stats" or value:
                spelled.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            spelled += [f"--{flag}", *map(str, value)]
        elif isinstance(value, dict):
            spelled += [f"--{flag}", json.dumps(value)]
        elif value is not None:
            spelled += [f"--{flag}", str(value)]
    return spelled
