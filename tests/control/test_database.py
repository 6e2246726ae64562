"""Everything that touches the database, on SQLite. `tests/contract/test_control_database.py` runs it on PostgreSQL."""

from tests.control.cases.accounts import *  # noqa: F403
from tests.control.cases.leases import *  # noqa: F403
from tests.control.cases.ledger import *  # noqa: F403
from tests.control.cases.published import *  # noqa: F403
from tests.control.cases.schema import *  # noqa: F403
