"""What can be known to go wrong before anything is started: one clear line each."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import psutil

from zenray.spec.errors import Unavailable
from zenray.spec.platform import Platform

LEAST_DISK_BYTES = 2 << 30
LEAST_MEMORY_BYTES = 3 << 30


def check_machine(platform: Platform, home: Path) -> None:
    """Raise Unavailable with what to do when a port is taken, or disk or memory are too small."""
    ports = {
        "gateway.port": (platform.gateway.host, platform.gateway.port),
        "control.port": (platform.control.host, platform.control.port),
    }
    if platform.backend == "local":
        ports["ray.gcs_port"] = ("127.0.0.1", platform.ray.gcs_port)
        ports["ray.dashboard_port"] = ("127.0.0.1", platform.ray.dashboard_port)
        ports["ray.serve_port"] = ("127.0.0.1", platform.ray.serve_port)
    for key, (host, port) in ports.items():
        if port:
            _check_port(key, host, port)
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < LEAST_DISK_BYTES:
        raise Unavailable(
            f"Only {free / 2**30:.1f} GiB are free below {home}; {LEAST_DISK_BYTES / 2**30:.0f} GiB are needed.",
            hint="Free some, or point ZENRAY_HOME at a larger disk.",
        )
    available = psutil.virtual_memory().available
    if platform.backend == "local" and available < LEAST_MEMORY_BYTES:
        raise Unavailable(
            f"Only {available / 2**30:.1f} GiB of memory are free; Ray and the smallest model need "
            f"{LEAST_MEMORY_BYTES / 2**30:.0f} GiB.",
            hint="Close something, or use a larger machine.",
        )


def _check_port(key: str, host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            holder = _holder(port)
            raise Unavailable(
                f"Port {port} on {host} cannot be used ({error.strerror}){f': {holder} has it' if holder else ''}.",
                hint=f"Stop that, or set `{key}` in the platform file (0 takes any free port).",
            ) from None


def _holder(port: int) -> str | None:
    """`"nginx (pid 123)"`, where the system tells."""
    try:
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (pid {connection.pid})"
    except psutil.Error:
        return None
    return None


def choose_ports(platform: Platform) -> Platform:
    """`platform` with every port 0 replaced by one that is free now, so that all parts can be told."""
    wanted = {
        "ray": [name for name in ("gcs_port", "dashboard_port", "serve_port") if not getattr(platform.ray, name)],
        "control": [name for name in ("port",) if not platform.control.port],
        "gateway": [name for name in ("port",) if not platform.gateway.port],
    }
    probes = []  # kept open until all are chosen, so that no port is chosen twice
    changes: dict[str, dict[str, int]] = {}
    for section, names in wanted.items():
        for name in names:
            probe = socket.socket()
            probe.bind(("127.0.0.1", 0))
            probes.append(probe)
            changes.setdefault(section, {})[name] = int(probe.getsockname()[1])
    for probe in probes:
        probe.close()
    return platform.model_copy(
        update={section: getattr(platform, section).model_copy(update=ports) for section, ports in changes.items()}
    )
