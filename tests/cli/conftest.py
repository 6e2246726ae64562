"""What control opens in each test, made once: a migrated database to copy, and the packaged catalog."""

from __future__ import annotations

import pytest

from tests.control.conftest import migrated_sqlite as migrated_sqlite
from zenray.catalog.catalog import Catalog


@pytest.fixture(scope="session")
def catalog() -> Catalog:
    return Catalog.load()
