"""The platform's folder (`$ZENRAY_HOME`, default `.zenray/`): what lies where, and what runs now."""

from __future__ import annotations

import fcntl
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from zenray.catalog.catalog import Catalog
from zenray.spec.documents import load_document
from zenray.spec.errors import Unavailable
from zenray.spec.platform import Platform, StorageSettings
from zenray.storage.opening import absolute


class RunningPart(BaseModel):
    """One part that the supervisor watches."""

    model_config = ConfigDict(extra="ignore")

    name: str
    pid: int | None
    restarts: int = 0
    is_running: bool = True
    log: str


class RunningPlatform(BaseModel):
    """`run/platform.json`: written by the supervisor when all parts answer, removed when it ends."""

    model_config = ConfigDict(extra="ignore")

    name: str
    supervisor_pid: int
    gateway_url: str
    control_url: str
    dashboard_url: str
    storage: StorageSettings
    key_prefix: str
    stop_timeout_s: float
    parts: list[RunningPart]
    refused: dict[str, str] | None = (
        None  # listed deployments that could not be asked for, and why; None: not yet asked
    )


@dataclass(frozen=True)
class Home:
    """Paths below the platform's folder. Nothing is created before it is needed."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        return cls(Path(os.environ.get("ZENRAY_HOME", ".zenray")).absolute())

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    @property
    def ray(self) -> Path:
        return self.root / "ray"

    @property
    def user_catalog(self) -> Path:
        return self.root / "catalog"

    @property
    def lock_file(self) -> Path:
        return self.run / "supervisor.lock"

    @property
    def platform_file(self) -> Path:
        return self.run / "platform.json"

    @property
    def admin_token_file(self) -> Path:
        return self.root / "secrets" / "admin.token"

    @property
    def edge_token_file(self) -> Path:
        return self.root / "secrets" / "edge.token"

    def storage(self) -> StorageSettings:
        """Where versions lie: as the running platform has it, else as the platform file says."""
        running = self.running_or_none()
        if running is not None:
            return running.storage
        file = Path(os.environ.get("ZENRAY_PLATFORM_FILE", "clusters/local.yaml"))
        settings = load_document(file, Platform).storage if file.exists() else StorageSettings()
        return absolute(settings, self.root)

    def catalog(self) -> Catalog:
        """The packaged models, and the user's own in `catalog/` of the platform's folder."""
        return Catalog.load([self.user_catalog] if self.user_catalog.is_dir() else [])

    def running(self) -> RunningPlatform:
        """What runs now. Unavailable, with the way out, when nothing does."""
        platform = self.running_or_none()
        if platform is not None:
            return platform
        supervisor_pid = self.supervisor_pid()
        if supervisor_pid is not None:
            raise Unavailable(
                f"The platform in {self.root} is starting or stopping (process {supervisor_pid}).",
                hint="Try again in a moment; `zenray down` ends it.",
            )
        raise Unavailable(
            f"No platform runs from {self.root}.",
            hint="Start one with `zenray up`, or point ZENRAY_HOME at the folder of one that runs.",
        )

    def running_or_none(self) -> RunningPlatform | None:
        """What runs now; None when nothing does, or when it has not come up yet."""
        try:
            platform = RunningPlatform.model_validate(json.loads(self.platform_file.read_text()))
        except (FileNotFoundError, ValueError):
            return None
        return platform if self.supervisor_pid() == platform.supervisor_pid else None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the only one that starts or stops things here. Unavailable when somebody else is.

        The kernel gives the lock back however this process ends, and whoever asks is told this process's number.
        """
        self.run.mkdir(parents=True, exist_ok=True)
        with self.lock_file.open("wb") as lock:
            try:
                fcntl.fcntl(lock, fcntl.F_OFD_SETLK, _lock_of(os.getpid()))
            except BlockingIOError:
                raise Unavailable(
                    f"A platform already runs from {self.root}.",
                    hint="`zenray status` shows it; `zenray down` stops it.",
                ) from None
            self.platform_file.unlink(missing_ok=True)  # of one that was killed
            yield

    def supervisor_pid(self) -> int | None:
        """The process that holds this folder, from before its first part starts until its last one is gone."""
        try:
            with self.lock_file.open("rb") as lock:
                answer = fcntl.fcntl(lock, fcntl.F_OFD_GETLK, _lock_of(0))
        except FileNotFoundError:
            return None
        kind, _, _, length, _ = _LOCK.unpack(answer)
        return None if kind == fcntl.F_UNLCK else int(length)


_LOCK = struct.Struct("hhqqi4x")  # Linux's `struct flock`: type, whence, start, length, process


def _lock_of(length: int) -> bytes:
    """A write lock on so many bytes from the first one on; 0: on all.

    Its length is the holder's process id. So both are taken and lost together, and a number can never be read that a
    dead supervisor left in a file and that has since been given to somebody else. Asking for it takes nothing.
    """
    return _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, length, 0)
