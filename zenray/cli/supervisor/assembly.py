"""From a platform file to the parts that make it up on one machine, in the order in which they start."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zenray.cli.home import Home
from zenray.cli.supervisor.parts import Part, ProcessPart
from zenray.cluster.head import LocalRay
from zenray.cluster.session import SessionRecord
from zenray.control.config import ControlConfig
from zenray.gateway.config import GatewayConfig
from zenray.spec.documents import Document
from zenray.spec.errors import ZenrayError
from zenray.spec.platform import Platform, StorageSettings
from zenray.storage.opening import absolute

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assembly:
    """The parts, and where the platform is reached once they run."""

    parts: list[Part]
    gateway_url: str
    control_url: str
    dashboard_url: str
    storage: StorageSettings
    stop_timeout_s: float  # all parts have ended before, one after another


class RayPart:
    """The local Ray head. It starts in steps, one each time that somebody asks whether it lives."""

    name = "Ray"
    start_timeout_s = 180.0  # a head that dies while it starts is tried once more

    def __init__(self, ray: LocalRay, home: Path) -> None:
        self._ray = ray
        self._home = home
        self._steps: Iterator[None] | None = None  # what is left of a start
        self.log_file = home / "ray.log"

    @property
    def pid(self) -> int | None:
        record = SessionRecord.read(self._home / "ray.json")
        return record.sid if record else None

    def start(self) -> None:
        self._steps = self._ray.starting()
        self._go_on()

    def alive(self) -> bool:
        is_starting = self._steps is not None
        try:
            if is_starting:
                self._go_on()
            else:
                self._ray.check()
        except (ZenrayError, OSError) as error:
            if is_starting:
                log.warning("Ray did not start: %s", error)
            return False
        return True

    def ready(self) -> bool:
        return self.alive() and self._steps is None

    def stop(self) -> None:
        self._steps = None
        self._ray.stop()

    def _go_on(self) -> None:
        """One step of the start. One that raises was the last."""
        steps, self._steps = self._steps, None
        if steps is not None and next(steps, "over") is None:
            self._steps = steps


def assemble(platform: Platform, home: Home) -> Assembly:
    """Write each part's configuration below the home; nothing is started. All ports in `platform` are known."""
    home.run.mkdir(parents=True, exist_ok=True)
    home.user_catalog.mkdir(parents=True, exist_ok=True)
    storage = absolute(platform.storage, home.root)
    control_url = f"http://{_reachable(platform.control.host)}:{platform.control.port}"
    gateway_url = f"http://{_reachable(platform.gateway.host)}:{platform.gateway.port}"
    dashboard_url = f"http://127.0.0.1:{platform.ray.dashboard_port}"
    control = ControlConfig(
        **platform.control.model_dump(),
        storage=storage,
        state_dir=home.root / "control",
        admin_token_file=home.admin_token_file,
        edge_token_file=home.edge_token_file,
        ray_dashboard_url=dashboard_url,
        ray_token_file=home.ray / "ray.token",
        serve_port=platform.ray.serve_port,
        catalog_dirs=(home.user_catalog,),
        key_prefix=platform.key_prefix,
        nodes=platform.nodes,
        cache_dir=home.cache / "weights",
        jobs_dir=home.cache / "jobs",
    )
    gateway = GatewayConfig(
        **platform.gateway.model_dump(),
        control_url=control_url,
        edge_token_file=home.edge_token_file,
        state_dir=home.root / "gateway",
        key_prefix=platform.key_prefix,
    )
    parts: list[Part] = [
        RayPart(LocalRay(home.ray, platform.ray), home.ray),
        _process("control", control, f"{control_url}/readyz", home),
        _process("gateway", gateway, f"{gateway_url}/readyz", home, stop_timeout_s=gateway.drain_timeout_s + 10),
    ]
    return Assembly(parts, gateway_url, control_url, dashboard_url, storage, gateway.drain_timeout_s + 60)


def _process(name: str, config: Document, ready_url: str, home: Home, *, stop_timeout_s: float = 15.0) -> ProcessPart:
    file = home.run / f"{name}.json"
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as out:
        out.write(config.model_dump_json(indent=2))
    return ProcessPart(
        name,
        [sys.executable, "-m", f"zenray.{name}", str(file)],
        log_file=home.logs / f"{name}.log",
        ready_url=ready_url,
        stop_timeout_s=stop_timeout_s,
    )


def _reachable(host: str) -> str:
    """The address at which this machine reaches a server bound to `host`."""
    return "127.0.0.1" if host in ("0.0.0.0", "") else host
