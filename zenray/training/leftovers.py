"""Where a run's checkpoints lie in the store, and their end."""

from __future__ import annotations

import logging

import pyarrow.fs

from zenray.spec.platform import StorageSettings
from zenray.storage.arrow import arrow_filesystem
from zenray.storage.opening import open_store

log = logging.getLogger(__name__)


def checkpoint_place(storage: StorageSettings) -> tuple[pyarrow.fs.FileSystem, str]:
    """Where Ray Train keeps checkpoints in the store."""
    filesystem, path = arrow_filesystem(open_store(storage).uri, storage.endpoint_url)
    return filesystem, f"{path}/training"


def drop_checkpoints(storage: StorageSettings, name: str) -> None:
    """Those of a run that is published, and so is never taken up again: weights and moments, many times the version.

    Idempotent; what cannot be deleted now is left, and said.
    """
    filesystem, folder = checkpoint_place(storage)
    try:
        if filesystem.get_file_info(f"{folder}/{name}").type == pyarrow.fs.FileType.Directory:
            filesystem.delete_dir(f"{folder}/{name}")
    except OSError as error:
        log.warning("The checkpoints of %s are left in %s/%s: %s", name, folder, name, error)
