"""The sums in the entries' notes, done again: a note that shows which numbers cannot be true must be true itself."""

from __future__ import annotations

import re

import pytest

from zenray.catalog import Catalog, ModelEntry

CATALOG = Catalog.load()
# An expression of plain numbers and what it comes to: "(480 − 35) / (1 − 8/64) = 508.6B". One with words in it is not.
SUM = re.compile(
    r"(?<![\d.,×/−+²(] )(?<![\d.,(])([\d(][\d.,()×/−+² ]*[×/−+][\d.,()×/−+² ]*) = ([\d.,]*\d)( %|[MBT]\b)?"
)
REST = re.compile(r"\(([\d.]+) − [\d.]+\) / \(1 − \d+/\d+\) = ([\d.]+)B(?: routed)?, ([\d.]+)B for the rest")
UNITS = {None: (1.0,), " %": (0.01,), "M": (1e6,), "B": (1.0, 1e9), "T": (1.0, 1e12)}  # a sum may be in billions


def written_as(value: float, text: str) -> bool:
    """Whether `text` is `value`, rounded to the digits that it has."""
    return abs(value - float(text.replace(",", ""))) <= 0.5 * 10 ** -len(text.partition(".")[2]) + 1e-9


def sums(entry: ModelEntry) -> list[tuple[str, str, str | None]]:
    return [(m[1], m[2], m[3]) for note in entry.notes for m in SUM.finditer(note)]


@pytest.mark.parametrize("entry", [e for e in CATALOG if sums(e)], ids=lambda entry: entry.name)
def test_sums_come_to_what_the_notes_say(entry: ModelEntry) -> None:
    for expression, said, unit in sums(entry):
        python = expression.translate(str.maketrans({"×": "*", "−": "-", "²": "**2", ",": None}))
        value = eval(python, {"__builtins__": {}})  # noqa: S307 - numbers and operators of our own files
        assert any(written_as(value / one, said) for one in UNITS[unit]), f"{expression} is {value:,.6g}, not {said}"


def test_what_routed_experts_leave_is_the_difference() -> None:
    found = [m.groups() for entry in CATALOG for note in entry.notes for m in REST.finditer(note)]
    assert len(found) >= 7
    for total, routed, rest in found:
        assert written_as(float(total) - float(routed), rest), f"{total} − {routed} is not {rest}"


def test_the_pattern_finds_the_sums() -> None:
    assert sum(len(sums(entry)) for entry in CATALOG) >= 33
    assert sums(CATALOG.get("zen-235b")) == [("(235 − 37) / (1 − 8/96)", "216", "B")]
