"""What the supervisor watches: a part that can be started, asked whether it lives and is ready, and stopped."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import httpx

PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl  # looked up before any fork: the child may only make the call


class Part(Protocol):
    """One part. `start` returns at once, or raises what keeps it from starting; the others never block for long."""

    name: str
    log_file: Path
    start_timeout_s: float

    def start(self) -> None: ...

    def alive(self) -> bool: ...

    def ready(self) -> bool: ...

    def stop(self) -> None:
        """Ask it to end, wait, and end it by force if it does not. Nothing of it is left afterwards."""

    @property
    def pid(self) -> int | None: ...


def die_with_parent() -> None:
    """For `preexec_fn`: the child gets SIGTERM when its parent dies, however that happens."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class ProcessPart:
    """A part that is one child process (with children of its own) and answers `ready_url` with 200 when it is ready."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_file: Path,
        ready_url: str,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 60.0,
        stop_timeout_s: float = 15.0,
    ) -> None:
        self.name = name
        self.log_file = log_file
        self.start_timeout_s = start_timeout_s
        self._command = list(command)
        self._environment = dict(environment or {})
        self._ready_url = ready_url
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._environment},
                start_new_session=True,  # Ctrl-C is for the supervisor, which then stops the parts in order
                preexec_fn=die_with_parent,  # and if the supervisor is killed, its parts end too
            )

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def ready(self) -> bool:
        try:
            return httpx.get(self._ready_url, timeout=2.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        if self._process is None:
            return
        if self.alive():
            self._process.terminate()
            try:
                self._process.wait(self._stop_timeout_s)
            except subprocess.TimeoutExpired:
                pass
        self._end_group(self._process.pid)
        self._process.wait()

    @staticmethod
    def _end_group(group: int) -> None:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass


def last_lines(path: Path, count: int = 15) -> list[str]:
    """The end of a log, for an error message."""
    try:
        with path.open("rb") as log:
            log.seek(max(0, path.stat().st_size - 16_384))
            return log.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
