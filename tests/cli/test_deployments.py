"""Deployments from the command line: what is sent, and what `zenray status` says when a new revision is broken."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.cli.test_commands import MODEL, Zenray, control, zenray  # noqa: F401
from tests.cli.test_platform import announce
from zenray.cli.client import ControlClient
from zenray.cli.commands.deployments import wait_until_ready
from zenray.cli.home import Home
from zenray.cluster.fake import FakeCluster
from zenray.control.app import Control
from zenray.spec.errors import Unavailable
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.opening import open_store
from zenray.storage.versions import publish


@pytest.fixture
def versions(tmp_path: Path, control: TestClient) -> None:  # noqa: F811
    store = open_store(StorageSettings(uri=f"file:{tmp_path / 'home' / 'store'}"))
    for version in ("v1", "v2"):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "weights.bin").write_text(version)
        publish(store, VersionRef(model=MODEL, version=version), folder)


def deploy(zenray: Zenray, folder: Path, version: str) -> None:  # noqa: F811
    file = folder / f"{version}.yaml"
    file.write_text(f"model: {MODEL}\nversion: {version}\n")
    zenray("deploy", str(file), "--no-wait")


@pytest.mark.usefixtures("versions")
def test_a_broken_revision_is_in_the_status_with_its_reason(
    zenray: Zenray,  # noqa: F811
    control: TestClient,  # noqa: F811
    tmp_path: Path,
) -> None:
    built: Control = control.built  # type: ignore[attr-defined]
    cluster = built.reconciler._backend
    assert isinstance(cluster, FakeCluster)
    deploy(zenray, tmp_path, "v1")
    for _ in range(3):
        built.reconciler.step()
    old = control.get(f"/admin/deployments/{MODEL}").json()["revision"]
    deploy(zenray, tmp_path, "v2")
    broken = control.get(f"/admin/deployments/{MODEL}").json()["wanted_revision"]
    cluster.fail(broken, "weights.bin: its sha256 differs")
    for _ in range(3):
        built.reconciler.step()
    home = Home.from_environment()
    with home.held():
        announce(home, os.getpid())
        (row,) = [line for line in zenray("status").splitlines() if line.startswith(MODEL)]
    assert "ready" in row and old in row
    assert f"{broken} failed, {old} goes on serving: weights.bin: its sha256 differs" in row


def test_what_a_file_leaves_out_is_left_to_control(
    zenray: Zenray,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sent with every default filled in, a deployment would leave nothing for the catalog's layout."""
    sent: list[Any] = []
    monkeypatch.setattr(ControlClient, "put", lambda _client, _path, body: sent.append(body))
    zenray("deploy", MODEL, "--no-wait")
    assert sent == [{"model": MODEL}]


def test_waiting_for_a_deployment_outlives_a_control_that_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"state": "starting", "message": None, "revision": None, "wanted_revision": "r1", "wanted_phase": "starting"}
    ready = row | {"state": "ready", "revision": "r1"}
    answers: list[Any] = [ready, Unavailable("restarting"), row, Unavailable("restarting"), Unavailable("restarting")]

    def get(_client: ControlClient, _path: str) -> Any:
        answer = answers.pop()
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ControlClient, "get", get)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    wait_until_ready(ControlClient("http://127.0.0.1:1", "token"), MODEL)
    assert not answers
