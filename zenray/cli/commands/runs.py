"""Run a job file: make a model out of another, or train one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from zenray.cli.home import Home
from zenray.spec.documents import Document
from zenray.spec.jobs import UpcycleJob, load_job
from zenray.spec.training import DistillJob, PretrainJob

RUNNERS: dict[type[Document], str] = {
    UpcycleJob: "zenray.model.upcycling",
    PretrainJob: "zenray.training",
    DistillJob: "zenray.training",
}


def run(file: Annotated[Path, typer.Argument(help="A job file, such as jobs/upcycle-smollm2.yaml.")]) -> None:
    """Run a job on this machine and publish what it makes. Its base version must be in the store."""
    job = load_job(file)  # every error of the file is shown before a process is started
    home = Home.from_environment()
    storage = home.storage()
    command = [sys.executable, "-m", RUNNERS[type(job)], str(file), "--store", storage.uri]
    command += ["--work-dir", str(home.cache / "jobs")]
    if storage.endpoint_url:
        command += ["--endpoint-url", storage.endpoint_url]
    # A process of its own, because it needs torch, which nothing on the command line imports.
    raise typer.Exit(subprocess.run(command, check=False).returncode)
