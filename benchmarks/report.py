"""What every benchmark prints: a table for a person, then one line of JSON for a machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

Cell = str | int | float


def print_report(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    result: Mapping[str, object],
    *,
    notes: Sequence[str] = (),
) -> None:
    """Print the table, the notes under it, and `result` as the last line of standard output.

    Numbers are set right and rounded for reading; `result` keeps them as they are.
    """
    table = Table(title=title, title_justify="left", pad_edge=False)
    for position, column in enumerate(columns):
        is_number = bool(rows) and all(not isinstance(row[position], str) for row in rows)
        table.add_column(column, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(format_cell(cell) for cell in row))
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)
    print(json.dumps(result), flush=True)


def format_cell(cell: Cell) -> str:
    """Thousands with commas, fractions with three significant digits."""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else cell
