"""The processes of one local Ray session: remembered in a file, found again after a crash, and ended, they alone.

`ray start` is run as the leader of a POSIX session of its own. Its children stay in that session even when their
parents die, so the session's number finds all of them, and nobody else's Ray.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import orjson
import psutil

_CLOCK_SLACK_S = 2.0  # /proc gives start times in ticks counted from a boot time of whole seconds


@dataclass(frozen=True)
class SessionRecord:
    """What is written down when Ray is started. `sid` is also the process id of the leader."""

    sid: int
    started_at: float
    booted_at: float
    temp_dir: str
    gcs_port: int
    dashboard_port: int
    serve_port: int

    @staticmethod
    def read(path: Path) -> SessionRecord | None:
        """The record, or None when there is none that can be read: then nothing is known to be ours."""
        try:
            return SessionRecord(**orjson.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        temporary = path.with_suffix(".new")
        temporary.write_bytes(orjson.dumps(asdict(self)))
        os.replace(temporary, path)

    def processes(self) -> list[psutil.Process]:
        """The living processes of this session. Empty after a reboot, or when the number was given to someone else."""
        if abs(psutil.boot_time() - self.booted_at) > _CLOCK_SLACK_S:
            return []
        found = [process for process in psutil.process_iter() if self._is_member(process)]
        leader = next((process for process in found if process.pid == self.sid), None)
        if leader is not None and leader.create_time() > self.started_at + _CLOCK_SLACK_S:
            return []  # the number was given again, to a later session
        return found

    def _is_member(self, process: psutil.Process) -> bool:
        try:
            return (
                os.getsid(process.pid) == self.sid
                and process.status() != psutil.STATUS_ZOMBIE
                and process.uids().real == os.getuid()
                and process.create_time() >= self.started_at - _CLOCK_SLACK_S
            )
        except (ProcessLookupError, PermissionError, psutil.Error):
            return False

    def leader_lives(self) -> bool:
        return any(process.pid == self.sid for process in self.processes())

    def end(self, *, patience_s: float = 4.0) -> int:
        """End every process of the session; returns how many there were. Blocks for at most `patience_s` + 3 s.

        The leader is asked first: Ray then stops its parts in order. What is left is asked, then killed.
        """
        members = self.processes()
        count = len(members)
        leader = [process for process in members if process.pid == self.sid]
        _signal(leader, signal.SIGTERM)
        self._await_end(leader, patience_s / 2)
        _signal(self.processes(), signal.SIGTERM)
        self._await_end(self.processes(), patience_s / 2)
        _signal(self.processes(), signal.SIGKILL)
        deadline = time.monotonic() + 3
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return count

    def _await_end(self, processes: list[psutil.Process], patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while any(self._is_member(process) for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue
