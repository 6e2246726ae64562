"""Jobs on SQLite. The same cases run on a real PostgreSQL in `tests/contract/test_control_database.py`."""

from __future__ import annotations

from tests.control.cases.jobs import *  # noqa: F403
