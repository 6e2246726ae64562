"""The snapshot for gateways, and the wait for its next change."""

from __future__ import annotations

import asyncio
import contextlib
import logging

import orjson
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from zenray.control.db.engine import Database
from zenray.control.db.published import Kind, current_version, read_published

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2
_FIELDS = {Kind.KEY: "keys", Kind.ORG: "orgs", Kind.ROUTE: "routes"}


def render_snapshot(session: Session, since: int, *, now: float) -> bytes:
    """A `spec.edge.Snapshot` as JSON: what changed after `since`, or everything. Entries are not parsed again."""
    version, full, entries = read_published(session, since)
    fields: dict[str, dict[str, orjson.Fragment | None]] = {name: {} for name in _FIELDS.values()}
    for entry in entries:
        payload = None if entry.payload is None else orjson.Fragment(entry.payload)
        fields[_FIELDS[Kind(entry.kind)]][entry.name] = payload
    return orjson.dumps({"version": version, "full": full, "issued_at": now, **fields})


class SnapshotFeed:
    """Watches the published version on behalf of all gateways that wait, with one query for all of them.

    It asks the database rather than listen to this process: another control process may have made the change.
    """

    def __init__(self, database: Database, *, interval_s: float = WATCH_INTERVAL_S) -> None:
        self._database = database
        self._interval_s = interval_s
        self._version = 0
        self._changed = asyncio.Event()
        self._waiting = 0
        self._watcher: asyncio.Task[None] | None = None
        self._closed = False

    async def wait(self, since: int, timeout_s: float) -> None:
        """Returns when the version is no longer `since`, after `timeout_s`, or when control stops."""
        if self._watcher is None or self._watcher.done():
            self._version = since
            self._watcher = asyncio.create_task(self._watch())
        self._waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                while self._version == since and not self._closed:
                    await self._changed.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting -= 1

    def close(self) -> None:
        """Answers everybody who waits, at once. Call it in the event loop."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch(self) -> None:
        # It starts before its first waiter counts itself, so it looks at the count only after a round.
        while not self._closed:
            with contextlib.suppress(SQLAlchemyError):  # the database is away: the waiters' time runs out instead
                version = await run_in_threadpool(self._read_version)
                if version != self._version:
                    self._version = version
                    self._wake()
            if self._waiting == 0:
                return
            await asyncio.sleep(self._interval_s)

    def _read_version(self) -> int:
        with self._database.read() as session:
            return current_version(session)
