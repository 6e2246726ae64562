"""The command line against the real control, in process: what it prints, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.control.events import event
from zenray.catalog.catalog import Catalog
from zenray.cli import main as command_line
from zenray.cli.client import ControlClient
from zenray.cluster.fake import FakeCluster
from zenray.control.app import build_control
from zenray.control.config import ControlConfig
from zenray.spec.edge import UsageBatch
from zenray.spec.platform import StorageSettings
from zenray.spec.versions import VersionRef
from zenray.storage.opening import open_store
from zenray.storage.versions import publish

MODEL = "smollm2-135m"
Zenray = Callable[..., str]


@pytest.fixture
def control(tmp_path: Path, migrated_sqlite: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Control with a fake cluster, on the store of the home that the commands use."""
    monkeypatch.setenv("ZENRAY_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)  # no clusters/local.yaml here
    storage = StorageSettings(uri=f"file:{tmp_path / 'home' / 'store'}")
    config = ControlConfig(state_dir=tmp_path / "state", storage=storage)
    config.state_dir.mkdir()
    shutil.copy(migrated_sqlite, config.state_dir / "control.db")
    built = build_control(config, backend=FakeCluster(start_s=0), catalog=catalog, reconcile=False)
    token = (tmp_path / "state" / "admin.token").read_text().strip()
    http = TestClient(built.app, headers={"authorization": f"Bearer {token}"})
    client = ControlClient("http://control", token)
    client._http = http
    monkeypatch.setattr(ControlClient, "connect", lambda home: client)
    http.built = built  # type: ignore[attr-defined]  # for tests that carry out the reconcilers' rounds
    return http


@pytest.fixture
def zenray(control: TestClient, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Zenray:
    """Run a command as `main` does; its output, both streams, without the exit code."""

    def run(*words: str, fails: bool = False) -> str:
        monkeypatch.setattr(sys, "argv", ["zenray", *words])
        with pytest.raises(SystemExit) as exited:
            command_line.main()
            raise SystemExit(0)
        shown = capsys.readouterr()
        assert bool(exited.value.code) is fails, shown.out + shown.err
        return shown.out + shown.err

    return run


def test_an_organisation_its_credit_and_its_keys(zenray: Zenray) -> None:
    assert "zenray keys create acme" in zenray("orgs", "create", "acme")
    assert zenray("credits", "add", "acme", "12.50").strip() == "acme has $12.50."
    key = zenray("keys", "create", "acme", "--scope", "smollm2-*", "--name", "laptop").strip()
    assert key.startswith("sk-zen-") and "\n" not in key
    (row,) = json.loads(zenray("keys", "list", "--json"))
    assert row["scopes"] == ["smollm2-*"] and key not in json.dumps(row), "a key is shown once"
    assert "active" in zenray("keys", "list", "acme")
    zenray("keys", "revoke", row["id"])
    assert "revoked" in zenray("keys", "list")
    assert json.loads(zenray("orgs", "list", "--json"))[0]["balance_nano_usd"] == 12_500_000_000


def test_a_key_expires_when_its_maker_says(zenray: Zenray) -> None:
    zenray("orgs", "create", "acme")
    began = time.time()
    zenray("keys", "create", "acme", "--expires", "30d")
    (row,) = json.loads(zenray("keys", "list", "--json"))
    assert 0 <= row["expires_at"] - began - 30 * 86400 < 60
    assert time.strftime("%Y-%m-%d", time.gmtime(row["expires_at"])) in zenray("keys", "list")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("credits", "add", "acne", "1"), "acme"),  # the nearest name
        (("credits", "add", "acme", "1.0000000001"), "nano-dollar"),
        (("credits", "add", "acme", "ten"), "0.50"),
        (("keys", "create", "acne"), "acme"),
        (("keys", "create", "acme", "--expires", "soon"), "30d"),
        (("keys", "create", "acme", "--expires", "0d"), "30d"),
        (("keys", "create", "acme", "--expires", "-1d"), "30d"),
        (("orgs", "create", "acme"), "acme"),  # there already
        (("orgs", "create", "No Name"), "name"),
        (("keys", "revoke", "key_x"), "key_x"),
        (("usage", "acme", "--by", "hour"), "group_by"),
        (("undeploy", MODEL), MODEL),
        (("deploy", "smollm2-135"), MODEL),
        (("models", "show", "smollm2-135"), MODEL),
        (("models", "versions", "smollm2-135"), MODEL),
        (("models", "verify", MODEL), f"zenray models pull {MODEL}"),
        (("models", "verify", "smollm2-135"), f"Did you mean '{MODEL}'?"),
        (("models", "verify", "smollm2-135@v1"), f"Did you mean '{MODEL}'?"),
        (("models", "verify", f"{MODEL}@v1"), "v1"),
        (("models", "pull", MODEL, "--source", "/no/such/folder"), "/no/such/folder"),
        (("deploy", "missing.yaml"), "missing.yaml"),
        (("run", "missing.yaml"), "missing.yaml"),
        (("up", "-f", "missing.yaml"), "missing.yaml"),
        (("status",), "zenray up"),
        (("chat", MODEL), "ZENRAY_API_KEY"),
    ],
)
def test_what_cannot_be_done_is_said_with_a_way_out(zenray: Zenray, words: tuple[str, ...], said: str) -> None:
    zenray("orgs", "create", "acme")
    shown = zenray(*words, fails=True)
    assert said in shown and "Traceback" not in shown, shown


def test_usage_is_shown_by_model(zenray: Zenray, control: TestClient, tmp_path: Path) -> None:
    zenray("orgs", "create", "acme")
    zenray("credits", "add", "acme", "1")
    batch = UsageBatch(gateway_id="gw-0", boot_id="b1", events=(event(1, org="acme"),))
    edge = {"authorization": f"Bearer {(tmp_path / 'state' / 'edge.token').read_text().strip()}"}
    assert control.post("/edge/usage", content=batch.model_dump_json(), headers=edge).status_code == 200
    (row,) = json.loads(zenray("usage", "acme", "--by", "model", "--json"))
    assert row["requests"] == 1 and row["cost_nano_usd"] == event(1, org="acme").cost_nano_usd()
    assert row["group"] in zenray("usage", "--by", "model")


def test_a_version_is_verified_byte_by_byte(zenray: Zenray, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(b"w" * 1000)
    ref = VersionRef(model=MODEL, version="v1")
    publish(open_store(StorageSettings(uri=f"file:{tmp_path / 'home' / 'store'}")), ref, folder)
    assert "is sound" in zenray("models", "verify", MODEL)
    assert json.loads(zenray("models", "versions", MODEL, "--json"))[0]["ref"]["version"] == "v1"
    stored = tmp_path / "home" / "store" / ref.prefix / "weights.bin"
    stored.chmod(0o600)
    stored.write_bytes(b"w" * 999 + b"v")
    assert "weights.bin" in zenray("models", "verify", f"{MODEL}@v1", fails=True)


def test_the_catalog_marks_what_is_derived_and_what_is_published(zenray: Zenray) -> None:
    rows = {row["name"]: row for row in json.loads(zenray("models", "list", "--json"))}
    assert not rows["zen-72b"]["price_derived"] and rows["zen-14b"]["price_derived"]
    assert rows[MODEL]["published"] is False
    table = [line.split() for line in zenray("models", "list").splitlines()]
    assert ["zen-72b", "72B", "18B", "64", "131,072", "0.004", "0.008", "200"] in table
    assert ["zen-14b", "14B", "3.5B", "16", "32,768", "~0.000625", "~0.00125", "~730"] in table
    assert "515.4B" in zenray("models", "show", "zen-72b"), "the sum that shows which numbers cannot all be true"
