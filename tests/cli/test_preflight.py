"""What can be known to go wrong before a platform is started is one clear line each, with a way out."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from zenray.cli.supervisor import preflight
from zenray.cli.supervisor.preflight import check_machine, choose_ports
from zenray.spec.errors import Unavailable
from zenray.spec.platform import ControlSettings, GatewaySettings, Platform, RaySettings

ANY_PORTS = Platform(
    name="test",
    ray=RaySettings(gcs_port=0, dashboard_port=0, serve_port=0),
    control=ControlSettings(port=0),
    gateway=GatewaySettings(port=0),
)


@pytest.fixture(autouse=True)
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with room for all, whatever this one has."""
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100 << 30))
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=100 << 30))


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_a_machine_with_room_is_taken(tmp_path: Path) -> None:
    check_machine(ANY_PORTS, tmp_path / "home")


@pytest.mark.parametrize(
    ("section", "name"),
    [("gateway", "port"), ("control", "port"), ("ray", "gcs_port"), ("ray", "dashboard_port"), ("ray", "serve_port")],
)
def test_a_port_in_use_names_its_holder_and_its_setting(section: str, name: str, taken: int, tmp_path: Path) -> None:
    settings = getattr(ANY_PORTS, section).model_copy(update={name: taken})
    with pytest.raises(Unavailable) as refused:
        check_machine(ANY_PORTS.model_copy(update={section: settings}), tmp_path)
    assert f"Port {taken} on 127.0.0.1" in refused.value.message and "(pid " in refused.value.message
    assert f"`{section}.{name}`" in str(refused.value.hint)


def test_a_full_disk_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 30))
    with pytest.raises(Unavailable, match=r"Only 1\.0 GiB are free .* 2 GiB are needed.*ZENRAY_HOME"):
        check_machine(ANY_PORTS, tmp_path)


def test_too_little_memory_is_said_with_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 30))
    with pytest.raises(Unavailable, match=r"Only 1\.0 GiB of memory are free.*3 GiB"):
        check_machine(ANY_PORTS, tmp_path)


def test_any_free_port_is_another_one_for_each_and_those_that_were_named_stay() -> None:
    platform = ANY_PORTS.model_copy(update={"gateway": GatewaySettings(port=4321)})
    chosen = choose_ports(platform)
    ports = [chosen.ray.gcs_port, chosen.ray.dashboard_port, chosen.ray.serve_port, chosen.control.port]
    assert len(set(ports)) == 4 and 0 not in ports
    assert chosen.gateway.port == 4321
