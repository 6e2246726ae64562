"""What control is started with: one file, written by `zenray up` or by a chart."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from zenray.spec.platform import ControlSettings, Nodes, StorageSettings


class ControlConfig(ControlSettings):
    """The platform's `control` settings, and what control must know of its surroundings. Paths are absolute."""

    storage: StorageSettings = StorageSettings()
    state_dir: Path = Field(description="Control's own folder: SQLite, tokens. A relative storage path belongs to it.")
    admin_token_file: Path | None = Field(None, description="Made at the first start; None: admin.token in state_dir.")
    edge_token_file: Path | None = Field(None, description="Made at the first start; None: edge.token in state_dir.")
    backend: Literal["local", "fake"] = Field("local", description="'fake' runs nothing: for tests of what is around.")
    ray_dashboard_url: str = "http://127.0.0.1:8265"
    ray_token_file: Path | None = Field(None, description="The token of Ray's dashboard; None: ray.token in state_dir.")
    serve_port: int = Field(8000, ge=1, le=65535, description="Where Ray Serve's proxy listens.")
    catalog_dirs: tuple[Path, ...] = ()
    key_prefix: str = Field("sk-zen-", pattern=r"^[a-z0-9-]{2,20}$")
    nodes: Nodes | None = Field(None, description="The cluster's machines, where the platform file says them.")
    cache_dir: Path | None = Field(None, description="Where nodes keep verified weights; None: cache in state_dir.")

    jobs_dir: Path | None = Field(None, description="Where jobs keep what they download and make; None: in state_dir.")

    def path(self, given: Path | None, default: str) -> Path:
        """`given`, or the file of that name in `state_dir`; absolute."""
        return (given or self.state_dir / default).absolute()

    def sqlalchemy_url(self) -> str:
        return self.database_url or f"sqlite:///{self.path(None, 'control.db')}"
