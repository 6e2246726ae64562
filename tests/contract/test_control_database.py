"""The same cases as `tests/control/test_database.py`, on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.contract.postgres import PostgresServer, running_postgres
from tests.control.cases.accounts import *  # noqa: F403
from tests.control.cases.jobs import *  # noqa: F403
from tests.control.cases.leases import *  # noqa: F403
from tests.control.cases.ledger import *  # noqa: F403
from tests.control.cases.published import *  # noqa: F403
from tests.control.cases.schema import *  # noqa: F403
from zenray.cluster.fake import FakeCluster
from zenray.control.app import build_control
from zenray.control.config import ControlConfig
from zenray.control.db.engine import Database, open_database
from zenray.control.db.migrate import migrate
from zenray.storage.fake import FakeStore

pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def migrated(postgres: PostgresServer) -> str:
    name = postgres.new_database()
    database = open_database(postgres.url(name))
    migrate(database)
    database.close()
    return name


@pytest.fixture
def database(postgres: PostgresServer, migrated: str) -> Iterator[Database]:
    opened = open_database(postgres.url(postgres.new_database(migrated)))
    yield opened
    opened.close()


@pytest.fixture
def empty_database(postgres: PostgresServer) -> Iterator[Database]:
    opened = open_database(postgres.url(postgres.new_database()))
    yield opened
    opened.close()


def test_controls_that_start_at_once_migrate_once(empty_database: Database) -> None:
    others = [open_database(str(empty_database.engine.url)) for _ in range(4)]
    in_parallel([lambda each=each: migrate(each) for each in others])  # type: ignore[misc]  # noqa: F405
    for each in others:
        each.close()
    with empty_database.read() as session:
        assert current_version(session) == 1  # noqa: F405


async def test_an_outage_of_the_database_is_a_clear_answer_and_passes(
    postgres: PostgresServer, migrated: str, tmp_path: Path
) -> None:
    name = postgres.new_database(migrated)
    config = ControlConfig(state_dir=tmp_path, database_url=postgres.url(name))
    control = build_control(config, backend=FakeCluster(), store=FakeStore(), reconcile=False)
    headers = {"authorization": f"Bearer {(tmp_path / 'admin.token').read_text().strip()}"}
    transport = httpx.ASGITransport(app=control.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://control", headers=headers) as http:
        assert (await http.get("/readyz")).status_code == 200
        postgres.shut(name)
        for answer in (await http.post("/admin/orgs", json={"name": "acme"}), await http.get("/readyz")):
            assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            assert answer.json()["error"]["code"] == "server_is_overloaded"
        assert "zenray_database_up 0.0" in (await http.get("/metrics")).text
        postgres.shut(name, shut=False)
        assert (await http.post("/admin/orgs", json={"name": "acme"})).status_code == 201
        assert (await http.get("/readyz")).status_code == 200
    control.database.close()
