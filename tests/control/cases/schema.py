"""The schema: from nothing to the newest, equal to the tables in the code, and append-only where money is."""

from __future__ import annotations

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import delete, text, update
from sqlalchemy.exc import DBAPIError

import zenray.control.auth.tables
import zenray.control.deployments.tables
import zenray.control.edge.tables
import zenray.control.jobs.tables  # noqa: F401
from tests.control.events import event
from zenray.control.billing.service import record_usage
from zenray.control.billing.tables import LedgerEntry, UsageRecord
from zenray.control.db.base import Base
from zenray.control.db.engine import Database
from zenray.control.db.migrate import migrate
from zenray.spec.errors import InvalidDocument


def test_migrations_from_nothing_give_the_tables_of_the_code(empty_database: Database) -> None:
    migrate(empty_database)
    migrate(empty_database)  # and a second start changes nothing
    with empty_database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
        assert "ledger_entries" in Base.metadata.tables  # so that the comparison was with something


def test_a_database_of_a_newer_zenray_is_refused(empty_database: Database) -> None:
    migrate(empty_database)
    with empty_database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(InvalidDocument, match="9999"):
        migrate(empty_database)


@pytest.mark.parametrize("table", [LedgerEntry, UsageRecord])
def test_what_was_booked_cannot_be_changed_or_deleted(
    database: Database, table: type[LedgerEntry | UsageRecord]
) -> None:
    with database.write() as session:
        record_usage(session, [event(1)])
    for statement in (delete(table), update(table).values(org="evil")):
        with pytest.raises(DBAPIError, match="append-only"), database.write() as session:
            session.execute(statement)
    with database.read() as session:
        assert session.query(table).one().org == "acme"


def test_a_failed_block_writes_nothing(database: Database) -> None:
    with pytest.raises(RuntimeError), database.write() as session:
        record_usage(session, [event(1)])
        raise RuntimeError
    with database.read() as session:
        assert session.query(LedgerEntry).count() == 0
