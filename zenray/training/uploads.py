"""Checkpoints through Ray Train: written and sent in the background, tried again while the store is away."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray.train
import torch.distributed as dist
from ray.train import Checkpoint as RayCheckpoint
from ray.train import CheckpointUploadMode
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from zenray.spec.errors import StorageUnavailable
from zenray.spec.training import Checkpoints
from zenray.training.reading import StoredCheckpoint

_LONGEST_WAIT_S = 15
_CHUNK_BYTES = 16 << 20
log = logging.getLogger(__name__)


class RayRecorder:
    """Checkpoints through `ray.train.report`: merged from all workers, kept by policy, found again at a restart.

    At most `policy.most_waiting` lie on this worker's disk unsent; then `record` waits.
    """

    def __init__(self, scratch: Path, policy: Checkpoints) -> None:
        self._scratch, self._policy = scratch, policy
        self._room = threading.BoundedSemaphore(policy.most_waiting)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-writer")
        self._sent: list[Future[RayCheckpoint]] = []
        shutil.rmtree(scratch, ignore_errors=True)  # of a worker of this place that died
        scratch.mkdir(parents=True, exist_ok=True)

    def latest(self) -> StoredCheckpoint | None:
        self.settle()
        found = self._sent[-1].result() if self._sent else ray.train.get_checkpoint()
        return None if found is None else StoredCheckpoint(found.filesystem, found.path)

    def record(self, name: str, metrics: dict[str, Any], write: Callable[[Path], None]) -> None:
        self._room.acquire()
        folder = Path(tempfile.mkdtemp(dir=self._scratch, prefix=f"{name}-"))
        written = self._writer.submit(write, folder)
        sent: Future[RayCheckpoint] = Future()
        self._sent = [*self._sent[-1:], sent]
        ray.train.report(
            metrics,
            checkpoint=RayCheckpoint.from_directory(folder),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=partial(self._send, written, sent),
        )

    def settle(self) -> None:
        for sent in self._sent:
            sent.result()
        if dist.is_initialized():
            dist.barrier()  # the other workers' parts too

    def _send(
        self, written: Future[None], sent: Future[RayCheckpoint], checkpoint: RayCheckpoint, name: str
    ) -> RayCheckpoint:
        """In Ray's upload thread, one after the other. `sent` is told last, when nothing is left on the disk."""
        folder = Path(checkpoint.path)
        try:
            written.result()
            storage = ray.train.get_context().get_storage()
            filesystem, target = storage.storage_filesystem, f"{storage.experiment_fs_path}/{name}"
            upload(folder, filesystem, target, patience_s=self._policy.upload_patience_s)
            done = RayCheckpoint(target, filesystem)
            tell = partial(sent.set_result, done)
            return done
        except BaseException as error:
            tell = partial(sent.set_exception, error)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            self._room.release()
            tell()


def upload(
    folder: Path,
    filesystem: pyarrow.fs.FileSystem,
    target: str,
    *,
    patience_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Copy the files of `folder` to `target`, which other workers may fill at the same time. Blocks; idempotent.

    A store that fails is tried again, at growing intervals of at most 15 s, for `patience_s`; then StorageUnavailable.
    """

    def tell(state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s cannot be written (attempt %d); trying again: %s", target, state.attempt_number, error)

    attempts = Retrying(
        retry=retry_if_exception_type(OSError),
        wait=wait_exponential_jitter(multiplier=0.5, max=_LONGEST_WAIT_S, jitter=0.5),
        stop=stop_after_delay(patience_s),
        before_sleep=tell,
        reraise=True,
        sleep=sleep,
    )
    try:
        attempts(_copy, folder, filesystem, target)
    except OSError as error:
        raise StorageUnavailable(
            f"The checkpoint could not be written to {target} in {patience_s:,.0f} s: {error}",
            hint="Run the job again when the store is back: it goes on from the checkpoint before.",
        ) from error


def _copy(folder: Path, filesystem: pyarrow.fs.FileSystem, target: str) -> None:
    filesystem.create_dir(target, recursive=True)
    for path in sorted(folder.iterdir()):
        with path.open("rb") as source, filesystem.open_output_stream(f"{target}/{path.name}") as sink:
            while chunk := source.read(_CHUNK_BYTES):
                sink.write(chunk)
