"""The catalog as its files say now, for a process that lives longer than they stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from zenray.catalog.catalog import Catalog
from zenray.spec.errors import ZenrayError

log = logging.getLogger(__name__)


class LiveCatalog:
    """`now` gives the catalog, read anew when a file of the user's folders has come, gone or changed.

    While they are broken the last sound catalog stays; why is logged once for each change. Created, it raises what
    Catalog.load raises.
    """

    def __init__(self, user_dirs: Iterable[Path]) -> None:
        self._user_dirs = tuple(user_dirs)
        self._seen = self._files()  # before they are read: what changes meanwhile is seen as a change
        self._catalog = Catalog.load(self._user_dirs)

    def now(self) -> Catalog:
        """Looks at the folders, and reads files only if they are others. Threads may call it at once."""
        files = self._files()
        if files != self._seen:
            self._seen = files
            try:
                self._catalog = Catalog.load(self._user_dirs)
            except ZenrayError as error:
                log.error("the catalog stays as it was: %s", error)
        return self._catalog

    def _files(self) -> set[tuple[Path, int, int, int]]:
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
