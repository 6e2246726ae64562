"""The catalog as its files say now, for a process that lives longer than they stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from zenray.catalog.catalog import Catalog
from zenray.spec.clock import Clock, SystemClock
from zenray.spec.errors import ZenrayError

log = logging.getLogger(__name__)

_File = tuple[Path, int, int, int]


GONE_FOR_S = 5.0  # an editor or a checkout that puts a file back takes less


class LiveCatalog:
    """`now` gives the catalog, read anew when a file of the user's folders has come, gone or changed.

    While they are broken the last sound catalog stays; why is logged once for each change. Created, it raises what
    Catalog.load raises.

    A file that is gone takes its model off the gateways: nothing is read anew before it has been gone for GONE_FOR_S.
    """

    def __init__(self, user_dirs: Iterable[Path], clock: Clock = SystemClock()) -> None:
        self._user_dirs = tuple(user_dirs)
        self._clock = clock
        self._gone_since_s: float | None = None
        self._seen = self._files()  # before they are read: what changes meanwhile is seen as a change
        self._catalog = Catalog.load(self._user_dirs)

    def now(self) -> Catalog:
        """Looks at the folders, and reads files only if they are others. Threads may call it at once."""
        files = self._files()
        if files != self._seen and not self._may_come_back(files):
            self._seen = files
            try:
                self._catalog = Catalog.load(self._user_dirs)
            except ZenrayError as error:
                log.error("the catalog stays as it was: %s", error)
        return self._catalog

    def _may_come_back(self, files: set[_File]) -> bool:
        """Whether a file is missing that was there, and has not been for long."""
        if {file[0] for file in self._seen} <= {file[0] for file in files}:
            self._gone_since_s = None
            return False
        now_s = self._clock.monotonic()
        if self._gone_since_s is None:
            self._gone_since_s = now_s
        return now_s - self._gone_since_s < GONE_FOR_S

    def _files(self) -> set[_File]:
        """Each file with what tells whether it is another one now."""
        found = set()
        for folder in self._user_dirs:
            for path in folder.glob("*.yaml"):
                try:
                    about = path.stat()
                except OSError:  # taken away just now
                    continue
                found.add((path, about.st_ino, about.st_mtime_ns, about.st_size))
        return found
