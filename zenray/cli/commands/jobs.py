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
        ["job", "kind", "state", "#attempt", "asked for", "#run time", "makes", "progress", "message"],
        [
            [
                row["id"],
                row["kind"],
                row["state"],
                row["attempt"],
                f"{_span(time.time() - row['created_at'])} ago",
                run_time(row, time.time()),
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
        "asked for": f"{_span(time.time() - row['created_at'])} ago",
        "run time": run_time(row, time.time()),
        "progress": _progress(row),
    }
    show_facts({name: value for name, value in facts.items() if value})
    console.print()
    for event in row["events"]:
        console.print(f"[dim]{_clock(event['at'])}[/dim]  ", end="")
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


def run_time(row: dict[str, Any], now: float) -> str | None:
    """How long a job has run, from its first start to its end or until now; None for one that never started."""
    if row["started_at"] is None:
        return None
    return _span((row["ended_at"] or now) - row["started_at"])


def _span(seconds: float) -> str:
    whole = max(0, round(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if whole >= 2 * size:
            return f"{whole // size} {unit}"
    return f"{whole} s"


def _clock(at: float) -> str:
    """The time of day; with the date where that is not today's."""
    then, now = time.localtime(at), time.localtime()
    return time.strftime("%H:%M:%S" if then[:3] == now[:3] else "%Y-%m-%d %H:%M:%S", then)
