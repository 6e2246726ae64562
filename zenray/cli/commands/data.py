"""Build the small real corpus that every machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.progress import BarColumn, Progress, TextColumn

from zenray.cli.output import console, show_json, show_table
from zenray.spec.training import BuiltinCorpus, DataSource
from zenray.training.data.documents import write_corpus


def data(
    folder: Annotated[Path, typer.Argument(help="Is made; files of the corpus in it are replaced.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write code, prose and mathematics out of installed packages: a jsonl file for each domain, lines with labels."""
    sources = [DataSource(domain=name, builtin=name) for name in get_args(BuiltinCorpus)]
    with Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[documents]:,} documents"),
        console=console,
        transient=True,
        disable=not console.is_terminal or as_json,
    ) as bar:
        # How many documents a domain has is known when they are read: until then its bar only moves.
        tasks = {source.domain: bar.add_task(source.domain, total=None, documents=0) for source in sources}
        counts = write_corpus(folder, sources, lambda domain, done: bar.update(tasks[domain], documents=done))
    rows: list[dict[str, str | int]] = []
    for domain, documents in counts.items():
        path = folder / f"{domain}.jsonl"
        rows.append({"domain": domain, "path": str(path), "documents": documents, "bytes": path.stat().st_size})
    if as_json:
        show_json(rows)
        return
    show_table(
        ["domain", "file", "#documents", "#MB"],
        [[r["domain"], r["path"], f"{r['documents']:,}", f"{int(r['bytes']) / 1e6:,.1f}"] for r in rows],
    )
