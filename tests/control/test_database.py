"""Everything that touches the database, on SQLite. `tests/contract/test_control_database.py` runs it on PostgreSQL."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import text

from tests.control.cases.accounts import *  # noqa: F403
from tests.control.cases.leases import *  # noqa: F403
from tests.control.cases.ledger import *  # noqa: F403
from tests.control.cases.ledger import balance, credit, in_parallel
from tests.control.cases.published import *  # noqa: F403
from tests.control.cases.schema import *  # noqa: F403
from zenray.control.db.engine import Database, open_database


def test_two_processes_may_write_one_sqlite_file(database: Database) -> None:
    """The lock inside a process does not help here: each must begin as a writer, or what it read is stale."""
    others = [open_database(str(database.engine.url)) for _ in range(3)]
    in_parallel([lambda n=n: credits_one_by_one(others[n], f"process-{n}") for n in range(3)])  # type: ignore[misc]
    for each in others:
        each.close()
    assert balance(database) == 3 * 20


def credits_one_by_one(database: Database, name: str) -> None:
    for number in range(20):
        assert credit(database, 1, f"{name}-{number}")


@pytest.mark.parametrize("is_there", [False, True])
def test_only_its_owner_reads_the_file_and_its_log(tmp_path: Path, is_there: bool) -> None:
    """It holds every engine's key and every organisation's cache salt."""
    file = tmp_path / "state" / "control.db"
    if is_there:
        file.parent.mkdir()
        for name in ("control.db", "control.db-wal", "control.db-shm"):
            (file.parent / name).touch(mode=0o666)
    usual = os.umask(0o022)
    try:
        opened = open_database(f"sqlite:///{file}")
        with opened.engine.begin() as connection:
            connection.execute(text("CREATE TABLE secrets (salt TEXT)"))
            modes = {each.name: each.stat().st_mode & 0o777 for each in file.parent.iterdir()}
        opened.close()
    finally:
        os.umask(usual)
    assert modes == {"control.db": 0o600, "control.db-wal": 0o600, "control.db-shm": 0o600}
    assert is_there or file.parent.stat().st_mode & 0o777 == 0o700
