"""The benchmark measures what it says, and its last line is JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.metering import BATCH_EVENTS, measure
from benchmarks.report import format_cell, print_report


def test_metering_costs_something_and_leaves_no_log(tmp_path: Path) -> None:
    result = measure(tmp_path, counts=2, requests=BATCH_EVENTS, rounds=1)
    assert 0 < result["bare_us"] < result["metered_us"]
    assert result["added_cpu_us"] > 1
    assert result["shipping_us"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["owner.json"]


def test_a_report_is_a_table_then_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_report("Speed", ["who", "requests", "ms"], [["us", 12345, 0.01234]], {"ratio": 1.5}, notes=["A note."])
    *table, note, last = capsys.readouterr().out.splitlines()
    assert json.loads(last) == {"ratio": 1.5}
    assert note == "A note."
    assert "12,345" in "".join(table)
    assert "0.0123" in "".join(table)


def test_cells_are_rounded_for_reading() -> None:
    assert [format_cell(cell) for cell in ("a", 1234, 1234.5, 99.94, 0.00012345)] == [
        "a", "1,234", "1,234", "99.9", "0.000123",
    ]  # fmt: skip
