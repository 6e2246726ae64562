"""The loop that carries the restart policy out, and the order in which parts come and go."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from zenray.cli.supervisor.parts import Part, last_lines
from zenray.cli.supervisor.policy import GiveUp, after_death
from zenray.spec.errors import Unavailable, ZenrayError

log = logging.getLogger(__name__)
POLL_S = 0.2


@dataclass
class Watched:
    """A part and what happened to it."""

    part: Part
    was_ready: bool = False
    deaths_s: list[float] = field(default_factory=list)
    restart_at_s: float | None = None


class Supervisor:
    """Starts parts in the order given and stops them in the reverse order; in between, restarts those that die."""

    def __init__(self, parts: Sequence[Part], *, on_change: Callable[[list[Watched]], None]) -> None:
        self.watched = [Watched(part) for part in parts]
        self._on_change = on_change
        self._stopping = threading.Event()

    def stop_on_signals(self) -> None:
        """SIGTERM and SIGINT make `run` return; a second one while stopping changes nothing."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: self._stopping.set())

    @property
    def stop_asked(self) -> bool:
        return self._stopping.is_set()

    def start(self, progress: Callable[[str], None] = lambda name: None) -> None:
        """Start every part and wait until it is ready. Unavailable, with the end of its log, if one is not."""
        for watched in self.watched:
            progress(watched.part.name)
            watched.part.start()
            self._wait_until_ready(watched)
            if self._stopping.is_set():
                return
        self._on_change(self.watched)

    def run(self) -> None:
        """Watch until a signal comes. Blocks."""
        while not self._stopping.wait(POLL_S):
            for watched in self.watched:
                self._look_after(watched)

    def stop(self) -> None:
        """Stop all parts, last one first."""
        for watched in reversed(self.watched):
            _stop(watched.part)

    def _wait_until_ready(self, watched: Watched) -> None:
        part = watched.part
        deadline_s = time.monotonic() + part.start_timeout_s
        while not self._stopping.is_set():
            if part.ready():
                watched.was_ready = True
                return
            if not part.alive():
                raise _did_not_start(part, "ended while starting")
            if time.monotonic() > deadline_s:
                raise _did_not_start(part, f"was not ready after {part.start_timeout_s:.0f} s")
            self._stopping.wait(POLL_S)

    def _look_after(self, watched: Watched) -> None:
        if watched.restart_at_s is None:
            if not watched.part.alive():
                self._died(watched, "died")
        elif time.monotonic() >= watched.restart_at_s:
            watched.restart_at_s = None
            try:
                watched.part.start()
            except (ZenrayError, OSError) as error:
                self._died(watched, f"could not be started ({error})")
            else:
                self._tell()

    def _died(self, watched: Watched, how: str) -> None:
        now_s = time.monotonic()
        watched.deaths_s.append(now_s)
        decision = after_death(watched.deaths_s, was_ready=watched.was_ready)
        if isinstance(decision, GiveUp):
            raise _did_not_start(watched.part, decision.reason)
        log.warning("%s %s; starting it again in %.1f s", watched.part.name, how, decision.delay_s)
        watched.restart_at_s = now_s + decision.delay_s
        self._tell()
        _stop(watched.part)  # what is left of it

    def _tell(self) -> None:
        """Whoever wants to know. A disk that takes no news is no reason to stop what runs."""
        try:
            self._on_change(self.watched)
        except OSError as error:
            log.warning("what runs now could not be written down: %s", error)


def _stop(part: Part) -> None:
    try:
        part.stop()
    except Exception:
        log.exception("%s did not stop cleanly", part.name)


def _did_not_start(part: Part, what: str) -> Unavailable:
    tail = "\n".join(f"    {line}" for line in last_lines(part.log_file))
    return Unavailable(
        f"{part.name} {what}. The end of {part.log_file}:\n{tail}", hint="\nThe lines above say why; fix that first."
    )
