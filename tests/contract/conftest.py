"""Servers that contract tests share, and which tests run beside each other."""

from __future__ import annotations

import pytest

from tests.cluster.ray_session import ray_session as ray_session


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n 2`: tests of one file stay together, and so do all that need Ray, which is started once."""
    for item in items:
        if "contract" in item.path.parts:
            group = "ray" if "ray_session" in getattr(item, "fixturenames", ()) else item.path.stem
            item.add_marker(pytest.mark.xdist_group(group))
