"""A progress bar for transfers: in a terminal, once one has taken longer than a second."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from zenray.storage.base import Progress

_QUIET_S = 1.0


class Counter:
    """Adds up the bytes of one phase from several threads and passes the sums on, at most every 50 ms."""

    def __init__(self, progress: Progress | None, phase: str, total_bytes: int) -> None:
        self._progress = progress
        self._phase = phase
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._told_at = float("-inf")
        self._lock = threading.Lock()

    def add(self, more_bytes: int) -> None:
        """Count bytes that were moved (or, below zero, that must be moved again)."""
        if self._progress is None:
            return
        with self._lock:
            self._done_bytes += more_bytes
            now = time.monotonic()
            if now - self._told_at >= 0.05 or self._done_bytes >= self._total_bytes:
                self._told_at = now
                self._progress(self._phase, self._done_bytes, self._total_bytes)


@contextmanager
def transfer_bar(console: Console | None = None, *, quiet_s: float = _QUIET_S) -> Iterator[Progress]:
    """A callback that draws one bar a phase on stderr; nothing before `quiet_s`, and nothing outside a terminal.

    A phase of unknown length (total 0) gets a bar that only moves.
    """
    console = console or Console(file=sys.stderr)
    bars = Bars(
        TextColumn("{task.description:>10}"),
        BarColumn(),
        DownloadColumn(binary_units=False),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    tasks: dict[str, TaskID] = {}
    started_at = time.monotonic()
    lock = threading.Lock()

    def show(phase: str, done_bytes: int, total_bytes: int) -> None:
        with lock:
            if not console.is_terminal or time.monotonic() - started_at < quiet_s:
                return
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=None)
                bars.start()
            bars.update(tasks[phase], completed=done_bytes, total=total_bytes or None)

    try:
        yield show
    finally:
        if tasks:
            bars.stop()
