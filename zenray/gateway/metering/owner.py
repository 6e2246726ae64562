"""One process owns a log folder at a time, and one gateway id for ever."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from zenray.spec.errors import Conflict, StorageUnavailable


def own_folder(folder: Path, gateway_id: str) -> int:
    """Take the folder for this process until it ends; the lock file says who has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(folder / "owner.json", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StorageUnavailable(
            f"The folder of the usage log, {folder}, cannot be used: {error.strerror}.",
            hint="Give the gateway a folder on a local disk that it may write to.",
        ) from error
    try:
        owner = _read_owner(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"The usage log in {folder} belongs to the running process {owner.get('pid')}.",
                hint="Stop that gateway, or give this one a folder of its own.",
            ) from None
        if owner.get("gateway_id", gateway_id) != gateway_id:
            raise Conflict(
                f"The usage log in {folder} belongs to the gateway {owner['gateway_id']!r}, not to {gateway_id!r}.",
                hint="Start it with its own gateway id, so that what it recorded is billed under the right leases.",
            )
        text = json.dumps({"gateway_id": gateway_id, "pid": os.getpid()}).encode()
        os.pwrite(fd, text, 0)
        os.ftruncate(fd, len(text))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _read_owner(fd: int) -> dict[str, Any]:
    """Who has, or had, the folder; nothing if nobody has, or if a power cut left no JSON."""
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
