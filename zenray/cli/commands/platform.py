"""Up, down and status: the whole platform on one machine."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from zenray.cli.client import ControlClient
from zenray.cli.commands.deployments import wait_until_ready
from zenray.cli.commands.models import pull_missing
from zenray.cli.home import Home, RunningPart, RunningPlatform
from zenray.cli.output import console, show_facts, show_json, show_table
from zenray.cli.supervisor.assembly import Assembly, assemble
from zenray.cli.supervisor.parts import last_lines
from zenray.cli.supervisor.preflight import check_machine, choose_ports
from zenray.cli.supervisor.supervisor import Supervisor, Watched
from zenray.spec.documents import load_document
from zenray.spec.errors import Unavailable, ZenrayError
from zenray.spec.platform import Platform

DETACHED_START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0


def up(
    file: Annotated[Path, typer.Option("-f", "--file", help="The platform file.")] = Path("clusters/local.yaml"),
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when everything answers, and leave it running.")
    ] = False,
) -> None:
    """Start Ray, control and gateway on this machine, deploy what the file lists, and watch over all of it."""
    home = Home.from_environment()
    platform = load_document(file, Platform)
    if platform.backend != "local":
        raise Unavailable(
            f"{file} is for {platform.backend}: `zenray up` starts platforms on this machine only.",
            hint="Set `backend: local`.",
        )
    if detach:
        _up_detached(file, home)
        return
    with _only_one(home):
        platform = choose_ports(platform)
        check_machine(platform, home.root)
        pull_missing(home, platform)
        _supervise(platform, home)


def down() -> None:
    """Stop the platform: requests in flight are finished, usage is shipped, no process is left."""
    home = Home.from_environment()
    running = home.running_or_none()
    if running is None:
        console.print(f"Nothing runs from {home.root}.")
        return
    os.kill(running.supervisor_pid, signal.SIGTERM)
    deadline_s = time.monotonic() + STOP_TIMEOUT_S
    with console.status("stopping"):
        while time.monotonic() < deadline_s:
            if home.running_or_none() is None and not _is_locked(home):
                console.print("Stopped.")
                return
            time.sleep(0.1)
    raise Unavailable(
        f"The supervisor (pid {running.supervisor_pid}) has not ended after {STOP_TIMEOUT_S:.0f} s.",
        hint=f"Its log: {home.logs / 'supervisor.log'}.",
    )


def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what runs, where, and why something does not."""
    home = Home.from_environment()
    running = home.running()
    control: dict[str, Any] = ControlClient.connect(home).get("/admin/status")
    if as_json:
        show_json({"platform": running.model_dump(), "control": control})
        return
    show_facts(
        {
            "platform": f"{running.name}, supervised by process {running.supervisor_pid}",
            "gateway": f"{running.gateway_url}/v1",
            "API docs": f"{running.gateway_url}/docs",
            "control": running.control_url,
            "Ray dashboard": running.dashboard_url,
            "state": home.root,
            "ledger": "every balance is the sum of its entries" if control["ledger"]["ok"] else "DIFFERS, see below",
        }
    )
    show_table(
        ["part", "#pid", "#restarts", "log"],
        [[p.name, p.pid, p.restarts, p.log] for p in running.parts],
        title="\nParts",
    )
    show_table(
        ["model", "state", "#replicas", "revision", "message"],
        [
            [row["model"], row["state"], row.get("replicas", 0), row.get("revision"), row.get("message")]
            for row in control["deployments"]
        ],
        title="\nDeployments",
    )
    for difference in control["ledger"]["differences"]:
        console.print(f"[bold red]ledger:[/bold red] {difference}")


def _supervise(platform: Platform, home: Home) -> None:
    """Everything from the first part's start to the last one's end, in the foreground."""
    assembly = assemble(platform, home)
    supervisor = Supervisor(assembly.parts, on_change=lambda watched: _write_running(platform, home, assembly, watched))
    supervisor.stop_on_signals()
    began_s = time.monotonic()
    try:
        supervisor.start(lambda name: console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/dim]  starting {name}"))
        if not supervisor.stop_asked:
            console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/dim]  up: {assembly.gateway_url}/v1")
            threading.Thread(target=_deploy_listed, args=(platform, home), daemon=True).start()
            supervisor.run()
    finally:
        console.print("stopping")
        supervisor.stop()
        home.platform_file.unlink(missing_ok=True)


def _deploy_listed(platform: Platform, home: Home) -> None:
    try:
        client = ControlClient.connect(home)
        for spec in platform.deployments:
            client.put(f"/admin/deployments/{spec.model}", spec.model_dump(mode="json"))
        for spec in platform.deployments:
            wait_until_ready(client, spec.model)
    except ZenrayError as error:
        console.print(f"[bold red]error:[/bold red] {error}", markup=True)


def _up_detached(file: Path, home: Home) -> None:
    """Start the supervisor as a process of its own; return when it and all listed deployments answer."""
    if home.running_or_none() or _is_locked(home):
        raise Unavailable(f"A platform already runs from {home.root}.", hint="`zenray status` shows it.")
    home.logs.mkdir(parents=True, exist_ok=True)
    log_file = home.logs / "supervisor.log"
    with log_file.open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "zenray.cli.main", "up", "-f", str(file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "ZENRAY_HOME": str(home.root)},
        )
    with console.status("starting") as spinner:
        deadline_s = time.monotonic() + DETACHED_START_TIMEOUT_S
        while home.running_or_none() is None:
            if child.poll() is not None:
                raise Unavailable("The platform did not start:\n" + "\n".join(last_lines(log_file, 25)))
            if time.monotonic() > deadline_s:
                child.terminate()
                raise Unavailable(f"The platform is not up after {DETACHED_START_TIMEOUT_S:.0f} s; see {log_file}.")
            lines = last_lines(log_file, 1)
            spinner.update(lines[0].strip() if lines else "starting")
            time.sleep(0.2)
    running = home.running()
    console.print(f"up: {running.gateway_url}/v1   (docs {running.gateway_url}/docs, Ray {running.dashboard_url})")
    client = ControlClient.connect(home)
    for spec in load_document(file, Platform).deployments:
        _wait_until_asked_for(client, spec.model)
        wait_until_ready(client, spec.model)


def _wait_until_asked_for(client: ControlClient, model: str, timeout_s: float = 10.0) -> None:
    """The supervisor asks for the listed deployments right after it is up; until then control does not know them."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if any(row["model"] == model for row in client.get("/admin/deployments")["data"]):
            return
        time.sleep(0.1)
    raise Unavailable(f"{model} was not asked for within {timeout_s:.0f} s.", hint="See the supervisor's log.")


def _write_running(platform: Platform, home: Home, assembly: Assembly, watched: list[Watched]) -> None:
    running = RunningPlatform(
        name=platform.name,
        supervisor_pid=os.getpid(),
        gateway_url=assembly.gateway_url,
        control_url=assembly.control_url,
        dashboard_url=assembly.dashboard_url,
        storage=assembly.storage,
        key_prefix=platform.key_prefix,
        parts=[
            RunningPart(name=w.part.name, pid=w.part.pid, restarts=len(w.deaths_s), log=str(w.part.log_file))
            for w in watched
        ],
    )
    whole = home.platform_file.with_suffix(".new")
    whole.write_text(running.model_dump_json(indent=2))
    whole.replace(home.platform_file)


@contextmanager
def _only_one(home: Home) -> Iterator[None]:
    """Hold the home's lock; the kernel gives it back however this process ends."""
    home.run.mkdir(parents=True, exist_ok=True)
    with home.lock_file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(
                f"A platform already runs from {home.root}.", hint="`zenray status` shows it; `zenray down` stops it."
            ) from None
        home.platform_file.unlink(missing_ok=True)  # of one that was killed
        yield


def _is_locked(home: Home) -> bool:
    try:
        with home.lock_file.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
