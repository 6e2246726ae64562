"""What a job says while it runs: into its journal in the store, which control and the command line read."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import BaseModel

from zenray.spec.job_events import Progress, in_words, parse_event
from zenray.storage.base import ObjectStore
from zenray.storage.job_record import job_journal
from zenray.storage.journal import Journal, JournalWriter

_log = logging.getLogger(__name__)
_PROGRESS_INTERVAL_S = 1.0
_NARRATION_INTERVAL_S = 0.3


@dataclass(frozen=True)
class EventPlace:
    """Whose events they are: of a job, in a phase of it. Crosses to workers as a dictionary."""

    job: str
    phase: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class EventStream:
    """Takes events and never waits for the store: a thread writes them there. Leaving it waits until they are written.

    `keep`: a file on this machine that has each event at once, for whoever asks why a process died while the store was
    away; until it cannot be written.
    """

    def __init__(
        self, store: ObjectStore, place: EventPlace, *, keep: Path | None = None, is_silent: bool = False
    ) -> None:
        self.place = place
        self._is_silent = is_silent
        self._keep = keep
        self._file: TextIO | None = None
        self._writer = JournalWriter(job_journal(store, place.job))

    def __enter__(self) -> EventStream:
        if not self._is_silent:
            self._writer.__enter__()
            if self._keep is not None:
                with self._kept_if_possible(self._keep):
                    self._keep.parent.mkdir(parents=True, exist_ok=True)
                    self._file = self._keep.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(self, *_: object) -> None:
        if not self._is_silent:
            self._writer.close()
            if self._file is not None:
                self._file.close()

    def __call__(self, event: dict[str, Any] | BaseModel) -> None:
        """An event of `zenray.spec.job_events`, or a dictionary that reads as one."""
        if self._is_silent:
            return
        said = event.model_dump(mode="json", exclude={"at", "phase"}) if isinstance(event, BaseModel) else event
        record = {"at": time.time(), "phase": self.place.phase, **said}
        self._writer(record)
        if self._file is not None and self._keep is not None:
            with self._kept_if_possible(self._keep):
                self._file.write(json.dumps(record) + "\n")

    @contextmanager
    def _kept_if_possible(self, path: Path) -> Iterator[None]:
        """A disk that takes no more ends the file, and nothing else: the run needs the disk for what matters."""
        try:
            yield
        except OSError as error:
            _log.error("%s is not written any more: %s", path, error)
            file, self._file = self._file, None
            if file is not None:
                with suppress(OSError):  # it would write what is left
                    file.close()

    def in_phase(self, phase: str) -> EventStream:
        """The same stream, speaking for a phase. Needs no context of its own."""
        other = copy(self)
        other.place = EventPlace(self.place.job, phase)
        return other


class ProgressEvents:
    """A `storage.base.Progress` that tells a stream, once a second for each kind of work and at its end."""

    def __init__(self, tell: EventStream) -> None:
        self._tell = tell
        self._told: dict[str, float] = {}

    def __call__(self, phase: str, done_bytes: int, total_bytes: int) -> None:
        now = time.monotonic()
        if now - self._told.get(phase, 0.0) >= _PROGRESS_INTERVAL_S or done_bytes >= total_bytes:
            self._told[phase] = now
            self._tell(Progress(what=phase, done=done_bytes, total=total_bytes))


@contextmanager
def narrated(store: ObjectStore, job: str) -> Iterator[None]:
    """Within: print what the job says from now on, whichever of its processes says it, one line each."""
    journal, stop = job_journal(store, job), threading.Event()
    thread = threading.Thread(target=_narrate, args=(journal, journal.end(), stop), name="narrator", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _narrate(journal: Journal, place: int, stop: threading.Event) -> None:
    is_last = False
    while True:
        records, place = journal.look(place)
        for record in records:
            if record.get("event") != "progress":
                sys.stdout.write(in_words(parse_event(record)) + "\n")
        sys.stdout.flush()
        if is_last:
            return
        is_last = stop.wait(_NARRATION_INTERVAL_S)
