"""The platform's folder (`$ZENRAY_HOME`, default `.zenray/`): what lies where, and what runs now."""

from __future__ import annotations

import json
import os
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
    url: str | None = None
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
    parts: list[RunningPart]


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
        if platform is None:
            raise Unavailable(
                f"No platform runs from {self.root}.",
                hint="Start one with `zenray up`, or point ZENRAY_HOME at the folder of one that runs.",
            )
        return platform

    def running_or_none(self) -> RunningPlatform | None:
        try:
            platform = RunningPlatform.model_validate(json.loads(self.platform_file.read_text()))
        except (FileNotFoundError, ValueError):
            return None
        return platform if _is_alive(platform.supervisor_pid) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
