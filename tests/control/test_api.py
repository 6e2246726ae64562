"""The admin API and the edge over HTTP, in process."""

from __future__ import annotations

import asyncio
import shutil
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy

from tests.control.events import event
from zenray.catalog.catalog import Catalog
from zenray.cluster.fake import FakeCluster
from zenray.control.api.limits import BodyLimit
from zenray.control.app import Control, build_control
from zenray.control.config import ControlConfig
from zenray.spec.edge import Snapshot, UsageBatch
from zenray.spec.platform import Nodes
from zenray.spec.versions import VersionRef
from zenray.storage.fake import FakeStore
from zenray.storage.versions import publish

MODEL = "smollm2-135m"


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


@pytest.fixture
def store(tmp_path: Path) -> FakeStore:
    return FakeStore()


@pytest.fixture
def control(tmp_path: Path, migrated_sqlite: Path, catalog: Catalog, store: FakeStore) -> Control:
    return control_of(ControlConfig(state_dir=tmp_path / "state"), migrated_sqlite, catalog, store)


def control_of(config: ControlConfig, migrated_sqlite: Path, catalog: Catalog, store: FakeStore) -> Control:
    config.state_dir.mkdir()
    shutil.copy(migrated_sqlite, config.state_dir / "control.db")
    return build_control(config, backend=FakeCluster(start_s=0.0), store=store, catalog=catalog, reconcile=False)


class Client:
    """Asks as an operator, as a gateway, or as nobody."""

    def __init__(self, control: Control, state: Path) -> None:
        transport = httpx.ASGITransport(app=control.app, raise_app_exceptions=False)
        self._http = httpx.AsyncClient(transport=transport, base_url="http://control")
        self._tokens = {who: (state / f"{who}.token").read_text().strip() for who in ("admin", "edge")}

    async def ask(
        self, method: str, path: str, body: Any = None, *, who: str | None = "admin", **more: Any
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {self._tokens[who]}"} if who else {}
        if body is not None:
            more["json"] = body
        return await self._http.request(method, path, headers=headers, **more)

    def token(self, who: str) -> str:
        return self._tokens[who]

    async def close(self) -> None:
        await self._http.aclose()


@pytest.fixture
async def client(control: Control, tmp_path: Path) -> AsyncIterator[Client]:
    client = Client(control, tmp_path / "state")
    yield client
    await client.close()
    control.database.close()


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert body.keys() == {"error"} and body["error"].keys() == {"message", "type", "param", "code"}
    return dict(body["error"])


async def test_from_an_organisation_to_a_paid_answer(client: Client) -> None:
    made = await client.ask("POST", "/admin/orgs", {"name": "acme"})
    assert made.status_code == 201
    credit = {"amount_usd": "12.50", "note": "welcome", "idempotency_key": "k"}
    for new in (True, False):
        row = (await client.ask("POST", "/admin/orgs/acme/credits", credit)).json()
        assert (row["new"], row["balance_nano_usd"]) == (new, 12_500_000_000)
    key = (await client.ask("POST", "/admin/keys", {"org": "acme", "scopes": ["zen-*"], "name": "ci"})).json()
    assert key["key"].startswith("sk-zen-") and key["id"].startswith("key_")
    lease = {"gateway_id": "g1", "boot_id": "b1", "org": "acme", "wanted_nano_usd": 500_000}
    granted = (await client.ask("POST", "/edge/leases", lease, who="edge")).json()
    assert granted == {"org": "acme", "granted_nano_usd": 500_000, "balance_nano_usd": 12_500_000_000}
    batch = UsageBatch(gateway_id="g1", boot_id="b1", events=(event(1, key_id=key["id"]),)).model_dump(mode="json")
    for new in (1, 0):
        ack = (await client.ask("POST", "/edge/usage", batch, who="edge")).json()
        assert ack == {"received": 1, "new": new}
    balance = (await client.ask("GET", "/admin/orgs/acme/balance")).json()
    assert balance == {
        "org": "acme",
        "balance_nano_usd": 12_499_980_000,
        "held_nano_usd": 480_000,
        "available_nano_usd": 12_499_500_000,
        "balance_usd": "$12.49998",
    }
    (line,) = (await client.ask("GET", "/admin/usage?org=acme&group_by=key")).json()["data"]
    assert (line["group"], line["requests"], line["cost_nano_usd"]) == (key["id"], 1, 20_000)
    (org,) = (await client.ask("GET", "/admin/orgs")).json()["data"]
    assert (org["name"], org["balance_nano_usd"]) == ("acme", 12_499_980_000)
    status = (await client.ask("GET", "/admin/status")).json()
    assert status["ledger"]["ok"] and status["ledger"]["differences"] == []
    assert [(g["gateway_id"], g["held_nano_usd"]) for g in status["gateways"]] == [("g1", 480_000)]
    lost = await client.ask("POST", "/admin/gateways/g1/lost")
    assert lost.json() == {"gateway_id": "g1", "released_nano_usd": 480_000}


async def test_a_key_is_shown_once_and_can_be_revoked(client: Client) -> None:
    await client.ask("POST", "/admin/orgs", {"name": "acme"})
    made = (await client.ask("POST", "/admin/keys", {"org": "acme", "user_id": "u1"})).json()
    listed = await client.ask("GET", "/admin/keys?org=acme")
    assert made["key"] not in listed.text and made["key"][-4:] in listed.text
    before = Snapshot.model_validate_json((await client.ask("GET", "/edge/snapshot?gateway_id=g1", who="edge")).content)
    revoked = (await client.ask("DELETE", f"/admin/keys/{made['id']}")).json()
    assert revoked["revoked_at"] is not None
    after = Snapshot.model_validate_json(
        (await client.ask("GET", f"/edge/snapshot?gateway_id=g1&since={before.version}", who="edge")).content
    )
    (entry,) = after.keys.values()
    assert not after.full and entry is not None and entry.revoked


async def test_the_catalogs_format_is_taken_where_the_version_is_there_in_it(
    tmp_path: Path, migrated_sqlite: Path, catalog: Catalog, store: FakeStore
) -> None:
    """`pull` publishes safetensors, whatever the catalog would rather serve."""
    config = ControlConfig(state_dir=tmp_path / "state", nodes=Nodes(gpu="A100 80GB"))
    control = control_of(config, migrated_sqlite, catalog, store)
    client = Client(control, config.state_dir)
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    async def chosen(**more: str) -> tuple[str, str]:
        row = (await client.ask("PUT", "/admin/deployments/zen-7b", {"model": "zen-7b"} | more)).json()
        return row["version"], row["format"]

    publish(store, VersionRef(model="zen-7b", version="1"), folder)
    assert await chosen() == ("1", "safetensors")
    publish(store, VersionRef(model="zen-7b", version="1", format="gptq-int8"), folder)
    assert await chosen() == ("1", "gptq-int8")
    assert await chosen(format="safetensors") == ("1", "safetensors")
    publish(store, VersionRef(model="zen-7b", version="2"), folder)
    assert await chosen() == await chosen(version="2") == ("2", "safetensors")
    assert await chosen(version="1") == ("1", "gptq-int8")
    await client.close()
    control.database.close()


async def test_a_deployment_is_asked_for_seen_and_taken_down(
    client: Client, control: Control, store: FakeStore, tmp_path: Path
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    missing = error_of(await client.ask("PUT", f"/admin/deployments/{MODEL}", {"model": MODEL}), 404)
    assert f"zenray models pull {MODEL}" in missing["message"]
    for version in ("1", "2"):
        publish(store, VersionRef(model=MODEL, version=version), folder)
    row = (await client.ask("PUT", f"/admin/deployments/{MODEL}", {"model": MODEL})).json()
    assert (row["state"], row["version"], row["revision"], row["route"]) == ("pending", "2", None, None)
    error_of(await client.ask("PUT", f"/admin/deployments/{MODEL}", {"model": MODEL, "version": "3"}), 404)
    for _ in range(3):
        await asyncio.to_thread(control.reconciler.step)
    detail = (await client.ask("GET", f"/admin/deployments/{MODEL}")).json()
    assert (detail["state"], detail["revision"], detail["replicas"], detail["route"]) == (
        "ready",
        row["wanted_revision"],
        1,
        "ready",
    )
    assert {e["to_state"] for e in detail["events"]} >= {"pending", "ready"}
    assert "VLLM_API_KEY" not in (await client.ask("GET", "/admin/status")).text
    versions = (await client.ask("GET", f"/admin/models/{MODEL}/versions")).json()["data"]
    assert [v["version"] for v in versions] == ["1", "2"]
    models = (await client.ask("GET", "/admin/models")).json()["data"]
    assert [m["name"] for m in models if m["deployed"]] == [MODEL]
    stopped = (await client.ask("DELETE", f"/admin/deployments/{MODEL}")).json()
    assert (stopped["state"], stopped["route"]) == ("stopping", None)
    metrics = (await client.ask("GET", "/metrics", who=None)).text
    assert f'zenray_deployment_state{{model="{MODEL}",state="stopping"}} 1.0' in metrics


@pytest.mark.parametrize("path", ["/admin/orgs", "/admin/status", "/admin/keys", "/admin/deployments", "/admin/usage"])
async def test_admin_routes_are_closed_to_others(client: Client, path: str) -> None:
    for who in (None, "edge"):
        assert error_of(await client.ask("GET", path, who=who), 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/edge/snapshot?gateway_id=g"), ("POST", "/edge/leases"), ("POST", "/edge/usage")]
)
async def test_edge_routes_are_closed_to_others(client: Client, method: str, path: str) -> None:
    for who in (None, "admin"):
        assert error_of(await client.ask(method, path, who=who), 401)["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says", "param"),
    [
        ("POST", "/admin/orgs", {"nme": "acme"}, 400, "Unknown field 'nme'. Did you mean 'name'?", "nme"),
        ("POST", "/admin/orgs", {}, 400, "name is missing", "name"),
        ("POST", "/admin/orgs", [], 400, "not a JSON object", None),
        ("POST", "/admin/orgs", {"name": "No Such"}, 400, "1 to 63", "name"),
        ("POST", "/admin/orgs/none/credits", {"amount_usd": "1"}, 404, "no organisation", "org"),
        ("POST", "/admin/orgs/none/credits", {"amount_usd": "-1"}, 400, "amount_usd", "amount_usd"),
        ("POST", "/admin/orgs/none/credits", {"amount_usd": 1.5}, 400, "string", "amount_usd"),
        ("POST", "/admin/orgs/none/credits", {"amount_usd": "1", "note": "a\x00"}, 400, "note", "note"),
        ("POST", "/admin/keys", {"org": "x", "scope": ["*"]}, 400, "Did you mean 'scopes'?", "scope"),
        (
            "PUT",
            f"/admin/deployments/{MODEL}",
            {"model": MODEL, "autoscaling": {"max_replica": 2}},
            400,
            "Did you mean 'max_replicas'?",
            "autoscaling.max_replica",
        ),
        ("PUT", f"/admin/deployments/{MODEL}", {"model": "zen-7b"}, 400, "names 'zen-7b'", "model"),
        (
            "PUT",
            f"/admin/deployments/{MODEL}",
            {"model": MODEL, "engine": {"tensor_parallel": 4}, "gpus_per_replica": 4},
            400,
            "9 query heads",
            "tensor_parallel",
        ),
        ("PUT", f"/admin/deployments/{MODEL}", {"model": MODEL, "format": "gguf"}, 400, "does not load gguf", "format"),
        ("PUT", "/admin/deployments/zen-8b", {"model": "zen-8b"}, 404, "Did you mean", "model"),
        ("GET", "/admin/deployments/zen-7b", None, 404, "not deployed", "model"),
        ("DELETE", "/admin/deployments/zen-7b", None, 404, "not deployed", "model"),
        ("DELETE", "/admin/keys/key_1", None, 404, "no key 'key_1'", "key_id"),
        ("GET", "/admin/usage?group_by=week", None, 400, "'day', 'model' or 'key'", "group_by"),
        ("GET", "/admin/usage?org=none", None, 404, "no organisation", "org"),
        ("POST", "/admin/gateways/g9/lost", None, 404, "no gateway", "gateway_id"),
        ("GET", "/admin/nothing", None, 404, "/docs", None),
        ("PATCH", "/admin/orgs", None, 405, "PATCH", None),
    ],
)
async def test_bad_requests_say_what_to_do(
    client: Client, method: str, path: str, body: Any, status: int, says: str, param: str | None
) -> None:
    error = error_of(await client.ask(method, path, body), status)
    assert says in error["message"] and error["param"] == param


async def test_a_batch_that_is_no_batch_names_the_field(client: Client) -> None:
    body = {"gateway_id": "g", "boot_id": "b", "events": [{"billing_key": "x"}]}
    error = error_of(await client.ask("POST", "/edge/usage", body, who="edge"), 400)
    assert error["param"].startswith("events.0.")
    error_of(await client.ask("POST", "/edge/usage", who="edge", content=b"{"), 400)


async def test_health_and_docs_are_open(client: Client) -> None:
    assert (await client.ask("GET", "/healthz", who=None)).json() == {"status": "ok"}
    assert (await client.ask("GET", "/readyz", who=None)).json() == {"status": "ready"}
    assert "/admin/orgs/{org}/credits" in (await client.ask("GET", "/openapi.json", who=None)).json()["paths"]
    assert "zenray_database_up 1.0" in (await client.ask("GET", "/metrics", who=None)).text


async def test_a_poll_is_answered_soon_after_a_change_and_not_before(client: Client) -> None:
    await client.ask("POST", "/admin/orgs", {"name": "acme"})
    first = (await client.ask("GET", "/edge/snapshot?gateway_id=g1", who="edge")).json()
    path = f"/edge/snapshot?gateway_id=g1&since={first['version']}"
    polls = [asyncio.create_task(client.ask("GET", path, who="edge")) for _ in range(5)]
    done, _ = await asyncio.wait(polls, timeout=0.5)
    assert not done
    loop = asyncio.get_running_loop()
    changed_s = loop.time()
    await client.ask("POST", "/admin/orgs", {"name": "other"})
    answers = [(await poll).json() for poll in polls]
    assert loop.time() - changed_s < 2.0  # 0.2 s between two looks; the rest is a busy machine
    assert all(answer["orgs"].keys() == {"other"} and not answer["full"] for answer in answers)


async def test_a_stopping_control_answers_every_poll(client: Client, control: Control) -> None:
    first = (await client.ask("GET", "/edge/snapshot?gateway_id=g1", who="edge")).json()
    path = f"/edge/snapshot?gateway_id=g1&since={first['version']}"
    polls = [asyncio.create_task(client.ask("GET", path, who="edge")) for _ in range(5)]
    await asyncio.sleep(0.1)
    control.feed.close()
    answers = await asyncio.wait_for(asyncio.gather(*polls), timeout=2.0)
    assert [answer.json()["version"] for answer in answers] == [first["version"]] * 5


async def test_an_unexpected_failure_is_a_500_without_details(
    client: Client, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode() -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(control.database, "read", explode)
    error = error_of(await client.ask("GET", "/admin/orgs"), 500)
    assert error["code"] == "internal_error" and "secret" not in error["message"]


def test_tokens_are_made_once_and_only_their_owner_reads_them(tmp_path: Path, catalog: Catalog) -> None:
    config = ControlConfig(state_dir=tmp_path / "state")
    tokens = []
    for _ in range(2):
        built = build_control(config, backend=FakeCluster(), store=FakeStore(), catalog=catalog, reconcile=False)
        built.database.close()
        tokens.append([(config.state_dir / f"{who}.token").read_text() for who in ("admin", "edge")])
    assert tokens[0] == tokens[1] and tokens[0][0] != tokens[0][1] and len(tokens[0][0]) > 40
    for who in ("admin", "edge"):
        assert stat.S_IMODE((config.state_dir / f"{who}.token").stat().st_mode) == 0o600


async def test_a_body_that_is_too_large_is_refused_unread(client: Client, control: Control) -> None:
    transport = httpx.ASGITransport(app=BodyLimit(control.app, max_bytes=100))
    headers = {"authorization": "Bearer nobody"}

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b"x" * 10

    async with httpx.AsyncClient(transport=transport, base_url="http://control", headers=headers) as http:
        declared = await http.post("/edge/usage", content=b"x" * 101)
        assert "100 bytes" in error_of(declared, 413)["message"]
        error_of(await http.post("/edge/usage", content=pieces()), 401)  # nobody's body is not even read
        http.headers["authorization"] = f"Bearer {client.token('edge')}"
        assert error_of(await http.post("/edge/usage", content=pieces()), 413)["code"] == "request_too_large"


async def test_a_full_disk_is_a_clear_answer_and_does_no_harm(client: Client, control: Control) -> None:
    await client.ask("POST", "/admin/orgs", {"name": "acme"})
    await client.ask("POST", "/admin/orgs/acme/credits", {"amount_usd": "1"})
    engine = control.database.engine

    def no_more_pages(connection: Any, _record: Any) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # SQLite takes this as "what it has now"

    sqlalchemy.event.listen(engine, "connect", no_more_pages)
    engine.dispose()
    batch = UsageBatch(gateway_id="g1", boot_id="b1", events=tuple(event(n) for n in range(5000)))
    body = batch.model_dump(mode="json")
    full = await client.ask("POST", "/edge/usage", body, who="edge")
    assert error_of(full, 503)["code"] == "server_is_overloaded" and full.headers["retry-after"] == "1"
    sqlalchemy.event.remove(engine, "connect", no_more_pages)
    engine.dispose()
    ack = (await client.ask("POST", "/edge/usage", body, who="edge")).json()
    assert ack == {"received": 5000, "new": 5000}
    status = (await client.ask("GET", "/admin/status")).json()
    assert status["ledger"]["ok"]


async def test_what_was_measured_of_a_version_is_in_its_deployment(
    client: Client, control: Control, store: FakeStore, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w").write_text("w")
    ref = VersionRef(model=MODEL, version="1")
    publish(store, ref, tmp_path / "weights", metadata={"template_overhead_tokens": "171"})
    await client.ask("PUT", f"/admin/deployments/{MODEL}", {"model": MODEL})
    control.reconciler.step()
    snapshot = Snapshot.model_validate_json(
        (await client.ask("GET", "/edge/snapshot?gateway_id=g1", who="edge")).content
    )
    route = snapshot.routes[MODEL]
    assert route is not None and route.template_overhead_tokens == 171


async def test_what_the_database_did_not_take_is_not_in_the_log(
    client: Client, control: Control, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver's error quotes the row by itself, and an organisation's holds its cache salt."""
    monkeypatch.setattr("zenray.control.auth.service.secrets.token_hex", lambda _bytes: "the-salt-of-acme")
    with control.database.engine.begin() as connection:
        connection.execute(
            sqlalchemy.text("CREATE TRIGGER broken BEFORE INSERT ON orgs BEGIN SELECT no_such_function(); END")
        )
    error_of(await client.ask("POST", "/admin/orgs", {"name": "acme"}), 503)
    assert "no_such_function" in caplog.text and "INSERT INTO orgs" in caplog.text
    assert "the-salt-of-acme" not in caplog.text


async def test_a_model_that_a_user_adds_is_known_at_once(tmp_path: Path, migrated_sqlite: Path) -> None:
    folder = tmp_path / "catalog"
    folder.mkdir()
    config = ControlConfig(state_dir=tmp_path / "state", catalog_dirs=(folder,))
    config.state_dir.mkdir()
    shutil.copy(migrated_sqlite, config.state_dir / "control.db")
    built = build_control(config, backend=FakeCluster(), store=FakeStore(), reconcile=False)
    client = Client(built, config.state_dir)
    error_of(await client.ask("GET", "/admin/models/mine/versions"), 404)
    about = "name: mine\nfamily: mine\nsummary: Mine.\nparameters: {total: 1000, active: 1000}\ncontext_tokens: 8192\n"
    (folder / "mine.yaml").write_text(about)
    assert (await client.ask("GET", "/admin/models/mine/versions")).json()["data"] == []
    await client.close()
    built.database.close()
