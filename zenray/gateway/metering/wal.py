"""The usage log on disk: numbered segments, appended with one write(2) a record, synced in groups, deleted in order."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from zenray.gateway.metering.records import Damage, frame, read_records
from zenray.spec.errors import CorruptData, Unavailable
from zenray.spec.usage import UsageEvent

SEGMENT_NAME = re.compile(r"(?P<number>\d{10})-(?P<boot_id>[0-9a-f]+)\.wal")


class MeterFull(Unavailable):
    """No room to record a request, so none may be answered: 503, and nothing already recorded is dropped."""


@dataclass
class Segment:
    """One file of the log, and what it still has to be kept for."""

    path: Path
    number: int
    boot_id: str
    size_bytes: int = 0
    closed_events: int = 0  # of the running boot
    unshipped_events: int = 0
    # With their costs, by billing key. None: on the disk only, until it is this segment's turn to be shipped.
    events: dict[str, tuple[UsageEvent, int]] | None = field(default_factory=dict)

    def read_events(self) -> dict[str, tuple[UsageEvent, int]]:
        """The events of the file's close records with their costs, by billing key, in order."""
        records = [record for record in read_records(self.path) if not isinstance(record, Damage)]
        events = [closed_event(record, self.path) for record in records if record["t"] == "close"]
        return {event.billing_key: (event, event.cost_nano_usd()) for event in events}


def closed_event(record: dict[str, Any], path: Path) -> UsageEvent:
    """The event of a close record; CorruptData if this zenray cannot read it (a younger one wrote it)."""
    try:
        return UsageEvent.model_validate(record["event"])
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise CorruptData(
            f"The usage log {path} has an event with an unknown shape: {first['loc']}: {first['msg']}.",
            hint="Start the version of zenray that wrote it, let it ship its log, and then start this one.",
        ) from None


def find_segments(folder: Path) -> list[Segment]:
    """The segments in a folder, oldest first, their events left on disk. Other files are ignored."""
    segments = []
    for path in folder.iterdir():
        if match := SEGMENT_NAME.fullmatch(path.name):
            segments.append(
                Segment(path, int(match["number"]), match["boot_id"], size_bytes=path.stat().st_size, events=None)
            )
    return sorted(segments, key=lambda segment: segment.number)


class Wal:
    """The log of one boot, behind the segments of earlier ones. Not locked: the meter's lock covers all but `sync`."""

    def __init__(self, folder: Path, boot_id: str, earlier: list[Segment], *, max_bytes: int) -> None:
        self.segments = earlier
        self.total_bytes = sum(segment.size_bytes for segment in earlier)
        self._folder = folder
        self._boot_id = boot_id
        self._max_bytes = max_bytes
        # Small, because what is acknowledged in a segment that is not finished is shipped again after a kill.
        self._segment_bytes = max(4096, min(1 << 20, max_bytes // 16))
        self._retired_fds: list[int] = []
        self._fd = -1
        self._names_changed = True
        self._rotate()

    @property
    def active(self) -> Segment:
        return self.segments[-1]

    def has_room(self, extra_bytes: int) -> bool:
        return self.total_bytes + extra_bytes <= self._max_bytes

    def append(self, payload: bytes) -> Segment:
        """Write one record with one write(2) and return its segment; MeterFull if the disk takes it not or in part.

        What was half written is cut off again, so that the log never has a gap.
        """
        record = frame(payload)
        if self.active.size_bytes >= self._segment_bytes:
            self._rotate()
        segment = self.active
        try:
            written = os.write(self._fd, record)
            if written != len(record):
                os.ftruncate(self._fd, segment.size_bytes)
                raise OSError(errno.ENOSPC, f"only {written} of {len(record)} bytes were taken")
        except OSError as error:
            raise MeterFull(f"The usage log {segment.path} cannot be written: {error.strerror}.", hint=_ROOM) from error
        segment.size_bytes += len(record)
        self.total_bytes += len(record)
        return segment

    def _rotate(self) -> None:
        number = self.active.number + 1 if self.segments else 1
        path = self._folder / f"{number:010d}-{self._boot_id}.wal"
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise MeterFull(f"No new usage log {path}: {error.strerror}.", hint=_ROOM) from error
        if self._fd != -1:
            self._retired_fds.append(self._fd)
        self._fd = fd
        self._names_changed = True
        self.segments.append(Segment(path, number, self._boot_id))

    def sync_work(self) -> Callable[[], None]:
        """What must reach the disk for all that was appended until now, as work to be done without the lock.

        Only one such work may be outstanding at a time: it closes the files that rotation has left.
        """
        active, retired, names_changed = self._fd, self._retired_fds, self._names_changed
        self._retired_fds, self._names_changed = [], False

        def work() -> None:
            for fd in retired:
                os.fdatasync(fd)
                os.close(fd)
            os.fdatasync(active)
            if names_changed:
                sync_folder(self._folder)

        return work

    def drop_oldest(self) -> Path:
        """Forget the oldest segment; its file is the caller's to delete."""
        segment = self.segments.pop(0)
        self.total_bytes -= segment.size_bytes
        return segment.path

    def close(self) -> None:
        for fd in (*self._retired_fds, self._fd):
            os.close(fd)
        self._retired_fds, self._fd = [], -1


_ROOM = "Free space on the gateway's disk; requests are answered again as soon as the log can be written."


def sync_folder(folder: Path) -> None:
    """Make names that were created or deleted in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
