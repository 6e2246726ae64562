"""Axes that a job file may name for a plan, and that the trainer does not have, are refused before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training import tiny
from zenray.spec.errors import InvalidValue
from zenray.spec.platform import StorageSettings
from zenray.training.runner import run


@pytest.mark.parametrize("axis", ["pipeline_parallel", "context_parallel"])
def test_an_axis_that_is_only_planned_is_refused(tmp_path: Path, axis: str) -> None:
    asked = tiny.job(tiny.write_text(tmp_path / "text"), workers={"count": 2, axis: 2})
    with pytest.raises(InvalidValue, match=axis):
        run(asked, StorageSettings(uri=f"file:{tmp_path / 'store'}"), tmp_path / "work")
    assert not (tmp_path / "work").exists()
