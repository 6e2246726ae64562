"""Everything that touches the database, on SQLite. `tests/contract/test_control_database.py` runs it on PostgreSQL."""

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
