"""Jobs that were submitted to the platform: list, show, logs, cancel, resume."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from zenray.cli.client import ControlClient
from zenray.cli.following import follow, show_result, step_in_words
from zenray.cli.home import Home
from zenray.cli.output import console, show_facts, show_json, show_table
from zenray.spec.evaluation import EvaluationResult
from zenray.spec.job_events import JobEvent, Step, in_words, parse_event

app = typer.Typer(help="Jobs: what was asked, how far it is, what came of it.", no_args_is_help=True)
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="A job's name (its newest) or its id.")]


@app.command("list")
def list_jobs(as_json: Json = False) -> None:
    """Show every job, the newest first."""
    rows: list[dict[str, Any]] = _client().get("/admin/jobs")["data"]
    if as_json:
        show_json(rows)
        return
    show_table(
        ["job", "kind", "state", "#attempt", "begun", "makes", "progress", "message"],
        [
            [
                row["id"],
                row["kind"],
                row["state"],
                row["attempt"],
                _ago(row["created_at"]),
                row["into"],
                _progress(row),
                (row["message"] or "").splitlines()[0] if row["message"] else None,
            ]
            for row in rows
        ],
    )


@app.command("show")
def show(job: Name, as_json: Json = False) -> None:
    """Show one job: its state and why, what happened, and what an evaluation found."""
    row: dict[str, Any] = _client().get(f"/admin/jobs/{job}")
    if as_json:
        show_json(row)
        return
    facts = {
        "job": row["id"],
        "kind": row["kind"],
        "state": row["state"],
        "message": row["message"],
        "makes": row["into"],
        "attempt": row["attempt"],
        "begun": _ago(row["created_at"]),
        "progress": _progress(row),
    }
    show_facts({name: value for name, value in facts.items() if value})
    console.print()
    for event in row["events"]:
        at = time.strftime("%H:%M:%S", time.localtime(event["at"]))
        console.print(f"[dim]{at}[/dim]  ", end="")
        console.print(in_words(parse_event(event)), markup=False)
    if row["result"]:
        console.print()
        show_result(EvaluationResult.model_validate(row["result"]))


@app.command("logs")
def logs(
    job: Name,
    follow_it: Annotated[bool, typer.Option("--follow", help="Show its events instead, until it is over.")] = False,
) -> None:
    """Print what the newest attempt's process has printed."""
    client = _client()
    if follow_it:
        follow(client, job)
        return
    console.print(client.get(f"/admin/jobs/{job}/logs")["logs"], markup=False, end="")


@app.command("cancel")
def cancel(job: Name) -> None:
    """End a job. Its checkpoints stay, and `zenray jobs resume` goes on from the last."""
    row = _client().post(f"/admin/jobs/{job}/cancel")
    console.print(f"{row['id']} is {row['state']}.")


@app.command("resume")
def resume(job: Name) -> None:
    """Go on with a job that failed or was cancelled, from its last checkpoint."""
    row = _client().post(f"/admin/jobs/{job}/resume")
    console.print(f"{row['id']} is {row['state']}.")


def _client() -> ControlClient:
    return ControlClient.connect(Home.from_environment())


def _progress(row: dict[str, Any]) -> str | None:
    if row["progress"] is None:
        return None
    event: JobEvent = parse_event(row["progress"])
    return f"step {event.step + 1}, {step_in_words(event)}" if isinstance(event, Step) else in_words(event)


def _ago(at: float) -> str:
    seconds = max(0, round(time.time() - at))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
