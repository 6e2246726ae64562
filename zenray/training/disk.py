"""A full disk of a worker, named with the numbers: what takes how much, and how much is free where."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from zenray.spec.errors import StorageUnavailable


def raise_if_full(error: BaseException, folder: Path, takes: str, hint: str) -> None:
    """StorageUnavailable, if `error`, or what it says of another worker, is a full disk. `takes`: what did not fit, and
    how much that is. `folder`: somewhere on the disk."""
    causes = [error, *(found[0] for found in getattr(error, "failures", {}).values())]
    if not any(isinstance(one, OSError) and one.errno in (errno.ENOSPC, errno.EDQUOT) for one in causes):
        return
    free_bytes = shutil.disk_usage(folder).free
    raise StorageUnavailable(
        f"The disk is full: {takes}, and {free_bytes / 1e6:,.0f} MB are free beside {folder}.", hint=hint
    ) from error
