"""One process owns a log folder at a time, and one gateway id for ever."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from zenray.spec.errors import Conflict


def own_folder(folder: Path, gateway_id: str) -> int:
    """Take the folder for this process until it ends; the lock file says who has it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "owner.json"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        text = os.pread(fd, 4096, 0)
        owner = json.loads(text) if text else {"gateway_id": gateway_id, "pid": None}
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"The usage log in {folder} belongs to the running process {owner['pid']}.",
                hint="Stop that gateway, or give this one a folder of its own.",
            ) from None
        if owner["gateway_id"] != gateway_id:
            raise Conflict(
                f"The usage log in {folder} belongs to the gateway {owner['gateway_id']!r}, not to {gateway_id!r}.",
                hint="Start it with its own gateway id, so that what it recorded is billed under the right leases.",
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"gateway_id": gateway_id, "pid": os.getpid()}).encode(), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd
