"""Up, down and status: the whole platform on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from zenray.cli.client import ControlClient
from zenray.cli.commands.deployments import wait_until_ready
from zenray.cli.commands.models import pull_missing
from zenray.cli.home import Home, RunningPart, RunningPlatform
from zenray.cli.output import console, show_error, show_facts, show_json, show_table
from zenray.cli.supervisor.assembly import Assembly, assemble
from zenray.cli.supervisor.parts import last_lines
from zenray.cli.supervisor.preflight import check_machine, choose_ports
from zenray.cli.supervisor.supervisor import Supervisor, Watched
from zenray.cluster.head import LocalRay
from zenray.spec.deployments import DeploymentSpec
from zenray.spec.documents import load_document
from zenray.spec.errors import Unavailable, ZenrayError
from zenray.spec.platform import Platform, RaySettings

DETACHED_START_TIMEOUT_S = 300.0
ASKING_TIMEOUT_S = 60.0
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
        _up_detached(file, platform, home)
        return
    with home.held():
        platform = choose_ports(platform)
        check_machine(platform, home.root)
        pull_missing(home, platform)
        _supervise(platform, home)


def down() -> None:
    """Stop the platform: requests in flight are finished, usage is shipped, no process is left."""
    home = Home.from_environment()
    has_stopped = _stop_supervisor(home)
    left = 0
    if home.lock_file.exists():
        with home.held():  # so that nobody starts a platform meanwhile
            left = LocalRay(home.ray, RaySettings()).end_remains()
    if has_stopped:
        console.print("Stopped.")
    elif left:
        console.print(f"The supervisor was gone already. {left} processes of Ray that it had left are ended.")
    else:
        console.print(f"Nothing runs from {home.root}.")


def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show what runs, where, and why something does not."""
    home = Home.from_environment()
    running = home.running()
    client = ControlClient.connect(home)
    control: dict[str, Any] | None = None
    away: ZenrayError | None = None
    try:
        control = client.get("/admin/status")
    except ZenrayError as error:
        away = error
    if as_json:
        show_json({"platform": running.model_dump(), "control": control})
    else:
        _show_platform(running, home)
        if control is not None:
            _show_control(control)
    if away is not None:
        log = next((part.log for part in running.parts if part.name == "control"), home.logs)
        raise Unavailable(away.message, hint=f"Without control nothing is known of deployments. Its log: {log}")


def _show_platform(running: RunningPlatform, home: Home) -> None:
    show_facts(
        {
            "platform": f"{running.name}, supervised by process {running.supervisor_pid}",
            "gateway": f"{running.gateway_url}/v1",
            "API docs": f"{running.gateway_url}/docs",
            "control": running.control_url,
            "Ray dashboard": running.dashboard_url,
            "state": home.root,
        }
    )
    show_table(
        ["part", "state", "#pid", "#restarts", "log"],
        [[p.name, "running" if p.is_running else "restarting", p.pid, p.restarts, p.log] for p in running.parts],
        title="\nParts",
    )


def _show_control(control: dict[str, Any]) -> None:
    rows = [
        [row["model"], row["state"], row["replicas"], row["revision"] or row["wanted_revision"], row["message"]]
        for row in control["deployments"]
    ]
    if rows:
        show_table(["model", "state", "#replicas", "revision", "message"], rows, title="\nDeployments")
    else:
        console.print("\nNothing is deployed yet: `zenray deploy MODEL`.")
    for difference in control["ledger"]["differences"]:
        console.print(f"[bold red]ledger:[/bold red] {difference}")
    if control["ledger"]["ok"]:
        console.print("\nEvery balance is the sum of its entries in the ledger.")


def _stop_supervisor(home: Home) -> bool:
    """Ask whoever holds the home to end, also one that is still starting, and wait. False when nobody does."""
    asked = None
    running = home.running_or_none()
    timeout_s = max(STOP_TIMEOUT_S, running.stop_timeout_s) if running else STOP_TIMEOUT_S
    deadline_s = time.monotonic() + timeout_s
    with console.status("stopping"):
        while (pid := home.supervisor_pid()) is not None:
            if pid != asked:
                with suppress(ProcessLookupError):  # it ended just now
                    os.kill(pid, signal.SIGTERM)
                asked = pid
            if time.monotonic() > deadline_s:
                raise Unavailable(
                    f"The supervisor (pid {pid}) has not ended after {timeout_s:.0f} s.",
                    hint=f"Its log: {home.logs / 'supervisor.log'}.",
                )
            time.sleep(0.05)
    return asked is not None


def _supervise(platform: Platform, home: Home) -> None:
    """Everything from the first part's start to the last one's end, in the foreground."""
    assembly = assemble(platform, home)
    notice = _Notice(platform, home, assembly)
    supervisor = Supervisor(assembly.parts, on_change=lambda watched: notice.write(parts=_parts(watched)))
    supervisor.stop_on_signals()
    began_s = time.monotonic()
    try:
        supervisor.start(lambda name: console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/dim]  starting {name}"))
        if not supervisor.stop_asked:
            console.print(f"[dim]{time.monotonic() - began_s:5.1f} s[/dim]  up: {assembly.gateway_url}/v1")
            threading.Thread(target=_deploy_listed, args=(platform, home, notice), daemon=True).start()
            supervisor.run()
    finally:
        console.print("stopping")
        supervisor.stop()
        home.platform_file.unlink(missing_ok=True)


class _Notice:
    """`run/platform.json` as it changes: by the supervisor's loop, and by the thread that asks for deployments."""

    def __init__(self, platform: Platform, home: Home, assembly: Assembly) -> None:
        self._file = home.platform_file
        self._lock = threading.Lock()
        self._running = RunningPlatform(
            name=platform.name,
            supervisor_pid=os.getpid(),
            gateway_url=assembly.gateway_url,
            control_url=assembly.control_url,
            dashboard_url=assembly.dashboard_url,
            storage=assembly.storage,
            key_prefix=platform.key_prefix,
            stop_timeout_s=assembly.stop_timeout_s,
            parts=[],
        )

    def write(self, **changes: Any) -> None:
        with self._lock:
            self._running = self._running.model_copy(update=changes)
            whole = self._file.with_suffix(".new")
            whole.write_text(self._running.model_dump_json(indent=2))
            whole.replace(self._file)


def _parts(watched: list[Watched]) -> list[RunningPart]:
    return [
        RunningPart(
            name=w.part.name,
            pid=w.part.pid,
            restarts=len(w.deaths_s),
            is_running=w.restart_at_s is None,
            log=str(w.part.log_file),
        )
        for w in watched
    ]


def _deploy_listed(platform: Platform, home: Home, notice: _Notice) -> None:
    """Ask for what the file lists, and say what came of each. One that is wrong does not hold up the others."""
    try:
        client = ControlClient.connect(home)
        refused = ask_for(client, platform.deployments)
        notice.write(refused=refused)
        failed = wait_for(client, [spec.model for spec in platform.deployments if spec.model not in refused])
    except (ZenrayError, OSError) as error:
        show_error(error)
        return
    for why in (refused | failed).values():
        show_error(Unavailable(why))


def ask_for(client: ControlClient, deployments: Sequence[DeploymentSpec]) -> dict[str, str]:
    """Ask control for each. Returns why not, by model, for those that it refused."""
    refused = {}
    for spec in deployments:
        try:
            client.put(f"/admin/deployments/{spec.model}", spec.model_dump(mode="json", exclude_unset=True))
        except ZenrayError as error:
            refused[spec.model] = f"{spec.model} was not deployed: {error}"
    return refused


def wait_for(client: ControlClient, models: Sequence[str]) -> dict[str, str]:
    """Wait until each of these takes traffic. Returns why not, by model, for those that failed."""
    failed = {}
    for model in models:
        try:
            wait_until_ready(client, model)
        except ZenrayError as error:
            failed[model] = str(error)
    return failed


def _up_detached(file: Path, platform: Platform, home: Home) -> None:
    """Start the supervisor as a process of its own; return when it and all listed deployments answer.

    What can go wrong beforehand, and what takes long, is done here, where it is seen.
    """
    if home.supervisor_pid() is not None:
        raise Unavailable(f"A platform already runs from {home.root}.", hint="`zenray status` shows it.")
    check_machine(platform, home.root)
    pull_missing(home, platform)
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
    try:
        running = await_start(child, home, log_file)
    except BaseException:  # Ctrl-C too: what is half started is nobody's
        console.print("stopping what was started")
        child.terminate()
        child.wait()
        raise
    console.print(f"up: {running.gateway_url}/v1   (docs {running.gateway_url}/docs, Ray {running.dashboard_url})")
    try:
        _await_listed(platform, home)
    except KeyboardInterrupt:
        console.print("The platform stays up: `zenray status` shows its deployments, `zenray down` stops it.")
        raise


def await_start(child: subprocess.Popen[bytes], home: Home, log_file: Path) -> RunningPlatform:
    """What runs, once all parts of `child`'s platform answer. Unavailable when it ended or takes too long."""
    deadline_s = time.monotonic() + DETACHED_START_TIMEOUT_S
    with console.status("starting") as spinner:
        while (running := home.running_or_none()) is None:
            if child.poll() is not None:
                raise Unavailable("The platform did not start:\n" + "\n".join(last_lines(log_file, 25)))
            if time.monotonic() > deadline_s:
                raise Unavailable(f"The platform is not up after {DETACHED_START_TIMEOUT_S:.0f} s; see {log_file}.")
            lines = last_lines(log_file, 1)
            spinner.update(escape(lines[0].strip()) if lines else "starting")
            time.sleep(0.05)
    return running


def _await_listed(platform: Platform, home: Home) -> None:
    """Return when all that the file lists takes traffic. Unavailable, naming each that does not, with the reason."""
    deadline_s = time.monotonic() + ASKING_TIMEOUT_S
    while (refused := home.running().refused) is None:
        if time.monotonic() > deadline_s:
            raise Unavailable(
                f"The listed deployments were not asked for within {ASKING_TIMEOUT_S:.0f} s.",
                hint=f"See {home.logs / 'supervisor.log'}.",
            )
        time.sleep(0.05)
    models = [spec.model for spec in platform.deployments if spec.model not in refused]
    failed = refused | wait_for(ControlClient.connect(home), models)
    if failed:
        raise Unavailable("\n".join(failed.values()), hint="The platform itself is up; `zenray down` stops it.")
