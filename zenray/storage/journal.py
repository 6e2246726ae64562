"""A journal in an object store: appended to by several processes at once, read in order by any other.

Each append is one object `{prefix}{number:08}.jsonl`, put only if no object has that number: whoever loses a number
takes the next. So all readers see one order, nothing is ever rewritten, and the store is all that the two share.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Sequence
from typing import Any

from zenray.spec.errors import NotFound, StorageUnavailable
from zenray.storage.base import ObjectStore

_log = logging.getLogger(__name__)

Record = dict[str, Any]
FIRST_INTERVAL_S = 0.5
LONGEST_INTERVAL_S = 10.0


class Journal:
    """Records (JSON objects) below `prefix`, which ends in a slash. Calls block; safe from several threads."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix = store, prefix
        self._writer = secrets.token_hex(8)
        self._appended = 0
        self._next: int | None = None
        self._lock = threading.Lock()

    def append(self, records: Sequence[Record]) -> None:
        """Add records after all that are there. Whole or not at all; StorageUnavailable: may be tried again."""
        with self._lock:
            # The first line tells this append from any other, so that a write whose answer was lost is recognised.
            head = {"writer": self._writer, "append": self._appended}
            data = "".join(json.dumps(line) + "\n" for line in (head, *records)).encode()
            number = self._next if self._next is not None else self.end()
            while not self._store.put_if_absent(self._key(number), data, immutable=True):
                if self._store.get_bytes(self._key(number)) == data:
                    break
                number += 1
            self._next = number + 1
            self._appended += 1

    def read(self, start: int, *, most: int = 1000) -> tuple[list[Record], int]:
        """Records of appends `start` and later (at most so many appends), and the number to go on from."""
        records: list[Record] = []
        number = start
        while number < start + most:
            try:
                data = self._store.get_bytes(self._key(number))
            except NotFound:
                break
            records += [json.loads(line) for line in data.splitlines()[1:]]
            number += 1
        return records, number

    def look(self, start: int) -> tuple[list[Record], int]:
        """As `read`, for whoever will look again: nothing new while the store is away."""
        try:
            return self.read(start)
        except StorageUnavailable as error:
            _log.warning("The journal cannot be read now: %s", error)
            return [], start

    def end(self) -> int:
        """The number of appends so far."""
        last = 1
        while self._has(last - 1):
            last *= 2
        first = last // 2
        while first < last:
            middle = (first + last) // 2
            first, last = (middle + 1, last) if self._has(middle) else (first, middle)
        return first

    def _has(self, number: int) -> bool:
        return self._store.head(self._key(number)) is not None

    def _key(self, number: int) -> str:
        return f"{self._prefix}{number:08}.jsonl"


class JournalWriter:
    """Appends from a thread of its own, so that whoever writes never waits for the store.

    What is told within an interval becomes one append; intervals grow from half a second to ten, so that a run of days
    leaves thousands of objects and not millions. While the store is away, records wait in memory.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._waiting: list[Record] = []
        self._changed = threading.Condition()
        self._closing = False
        self._given_up = False
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def __enter__(self) -> JournalWriter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, record: Record) -> None:
        with self._changed:
            self._waiting.append(record)
            self._changed.notify()

    def close(self, patience_s: float = 30.0) -> None:
        """Append what waits, and end. What the store does not take within `patience_s` is lost, and said in the log."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(patience_s)
        self._given_up = True
        if self._waiting:
            _log.error("%d events were not written to the store.", len(self._waiting))

    def _run(self) -> None:
        interval_s = FIRST_INTERVAL_S
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting or self._given_up:
                    return
                taken = list(self._waiting)
            try:
                self._journal.append(taken)
            except StorageUnavailable as error:
                _log.warning("Events wait for the store: %s", error)
            else:
                with self._changed:
                    del self._waiting[: len(taken)]
            with self._changed:
                if not self._closing:
                    self._changed.wait_for(lambda: self._closing, interval_s)
                elif self._waiting:
                    self._changed.wait(0.2)  # the store is away: do not spin
            interval_s = min(LONGEST_INTERVAL_S, interval_s * 1.02)
