"""Run a job file: make a model out of another, train one, measure one, or all of it in phases."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from zenray.cli.client import ControlClient
from zenray.cli.following import JobFailed, LiveView, follow
from zenray.cli.home import Home
from zenray.cli.output import console
from zenray.cli.supervisor.parts import die_with_parent, last_lines
from zenray.spec.job_events import Ended, JobEvent, parse_event
from zenray.spec.job_life import JobState
from zenray.spec.jobs import Job, job_id, load_job, with_absolute_paths
from zenray.storage.job_record import job_journal, launch_arguments, write_job
from zenray.storage.journal import Journal
from zenray.storage.opening import open_store
from zenray.storage.pinning import pin

POLL_S = 0.3


def run(
    file: Annotated[Path, typer.Argument(help="A job file, such as jobs/upcycle-smollm2.yaml.")],
    follow_it: Annotated[bool, typer.Option("--follow", help="Stay, and show how it goes until it is over.")] = False,
) -> None:
    """Run a job and publish what it makes: on the platform, or in the foreground where none runs.

    The same file again is the same job: it is followed, gone on with if it failed, or done.
    """
    job = with_absolute_paths(load_job(file))  # every error of the file is shown before anything is started
    home = Home.from_environment()
    if "ZENRAY_CONTROL_URL" not in os.environ and home.supervisor_pid() is None:
        console.print(f"No platform runs from {home.root}: the job runs here, in the foreground.")
        run_here(job, home)
        return
    client = ControlClient.connect(home)
    row = client.post("/admin/jobs", job.model_dump(mode="json"))
    console.print(f"{row['id']} is {row['state']}; `zenray jobs show {row['name']}` shows how far it is.")
    if follow_it and not JobState(row["state"]).is_final:
        follow(client, row["id"])


def run_here(job: Job, home: Home) -> None:
    """In a process of its own (it needs torch, which nothing here imports), followed by its journal. JobFailed."""
    storage = home.storage()
    store = open_store(storage)
    job = pin(job, store)
    id = job_id(job)
    write_job(store, id, job)
    journal = job_journal(store, id)
    place = journal.end()
    log_file = home.logs / "jobs" / f"{id}.log"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "zenray.training", *launch_arguments(id, storage, str(home.cache / "jobs"))]
    with log_file.open("wb") as log, LiveView() as view:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            preexec_fn=die_with_parent,
        )
        try:
            last = show_until_over(child, journal, place, view)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
    if child.returncode == 0:
        console.print(f"{job.name} succeeded.")
        return
    said = last.message if isinstance(last, Ended) and last.message else "\n".join(last_lines(log_file))
    raise JobFailed(
        f"{job.name} failed: {said or f'its process ended with {child.returncode}'}",
        hint=f"What it printed is in {log_file}. Run it again to go on from its last checkpoint.",
    )


def show_until_over(child: subprocess.Popen[bytes], journal: Journal, place: int, view: LiveView) -> JobEvent | None:
    """Show what the journal has from `place` on until the process ends; the last of it. A store that is away delays
    what is shown, and nothing else."""
    last: JobEvent | None = None
    is_over = False
    while not is_over:
        is_over = child.poll() is not None  # before the last look, which then sees all
        records, place = journal.look(place)
        for record in records:
            last = parse_event(record)
            view.show(last)
        time.sleep(0 if is_over else POLL_S)
    return last
