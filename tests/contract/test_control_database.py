"""The same cases as `tests/control/test_database.py`, on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.contract.postgres import PostgresServer, running_postgres
from tests.control.cases.accounts import *  # noqa: F403
from tests.control.cases.leases import *  # noqa: F403
from tests.control.cases.ledger import *  # noqa: F403
from tests.control.cases.published import *  # noqa: F403
from tests.control.cases.schema import *  # noqa: F403
from zenray.control.db.engine import Database, open_database
from zenray.control.db.migrate import migrate

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
