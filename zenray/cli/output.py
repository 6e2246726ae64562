"""How answers look: a rich table for people, JSON for programs, one line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from zenray.spec.errors import ZenrayError

_WIDE = None if sys.stdout.isatty() else 200  # a file or a pipe has no width: do not fold for its sake
console = Console(highlight=False, soft_wrap=True, width=_WIDE)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], *, title: str | None = None) -> None:
    """A table; columns whose name begins with `#` are numbers, set to the right (the mark is not shown).

    Cells are shown as they are, brackets too, unless they are rich's own `Text`.
    """
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column.removeprefix("#"), justify="right" if column.startswith("#") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else escape("" if cell is None else str(cell)) for cell in row))
    console.print(table)


def show_json(value: Any) -> None:
    """One JSON document on standard output, whatever the terminal is."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def show_facts(facts: Mapping[str, Any]) -> None:
    """Names and values, one a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        console.print(f"[bold]{name.ljust(width)}[/bold]  {escape(str(value))}")


def show_error(error: ZenrayError | OSError) -> None:
    """What is wrong and what to do about it, on standard error. What the system refused (a full disk, a folder that
    may not be written) is told in its words, with the path."""
    if isinstance(error, ZenrayError):
        message, hint = error.message, error.hint
    else:
        message, hint = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", None
    errors.print(f"[bold red]error:[/bold red] {escape(message)}")
    if hint:
        errors.print(f"       {escape(hint)}")
