"""What a platform file says reaches the parts."""

from __future__ import annotations

from pathlib import Path

from zenray.cli.home import Home
from zenray.cli.supervisor.assembly import assemble
from zenray.gateway.config import GatewayConfig
from zenray.spec.documents import load_document
from zenray.spec.platform import Platform

FILE = """
name: patient
gateway: {port: 8080, processes: 3, drain_timeout_s: 600, wake_timeout_s: 1800}
"""


def test_the_gateway_waits_as_the_file_says_and_the_supervisor_longer(tmp_path: Path) -> None:
    file = tmp_path / "platform.yaml"
    file.write_text(FILE)
    home = Home(tmp_path / "home")
    home.run.mkdir(parents=True)
    assembly = assemble(load_document(file, Platform), home)
    config = load_document(home.run / "gateway.json", GatewayConfig)
    assert (config.processes, config.drain_timeout_s, config.wake_timeout_s) == (3, 600, 1800)
    (gateway,) = [part for part in assembly.parts if part.name == "gateway"]
    assert assembly.stop_timeout_s > vars(gateway)["_stop_timeout_s"] > 600
