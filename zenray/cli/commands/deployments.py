"""Deploy and undeploy: what Ray Serve should run."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from zenray.cli.client import ControlClient
from zenray.cli.home import Home
from zenray.cli.output import console
from zenray.spec.deployments import DeploymentSpec, DeploymentState
from zenray.spec.documents import load_document
from zenray.spec.errors import Unavailable

READY_TIMEOUT_S = 900.0


def deploy(
    target: Annotated[str, typer.Argument(help="A model of the catalog, or a deployment file (.yaml).")],
    wait: Annotated[bool, typer.Option(help="Wait until it answers.")] = True,
) -> None:
    """Serve a model: its newest version with default settings, or exactly what a file says."""
    spec = read_target(target)
    client = ControlClient.connect(Home.from_environment())
    client.put(f"/admin/deployments/{spec.model}", spec.model_dump(mode="json", exclude_unset=True))
    if wait:
        wait_until_ready(client, spec.model)
    else:
        console.print(f"{spec.model} is asked for; `zenray status` shows how far it is.")


def undeploy(model: str) -> None:
    """Stop serving a model. Requests that are being answered are finished first."""
    ControlClient.connect(Home.from_environment()).delete(f"/admin/deployments/{model}")
    console.print(f"{model} drains and stops.")


def read_target(target: str) -> DeploymentSpec:
    """A catalog name, or the deployment file at a path."""
    if target.endswith((".yaml", ".yml")):
        return load_document(Path(target), DeploymentSpec)
    return DeploymentSpec(model=target)


def wait_until_ready(client: ControlClient, model: str, timeout_s: float = READY_TIMEOUT_S) -> None:
    """Show the deployment's state until it takes traffic. Unavailable with the reason when it fails.

    Control may go away and come back meanwhile.
    """
    deadline_s = time.monotonic() + timeout_s
    with console.status(f"{model}: asked for") as spinner:
        while time.monotonic() < deadline_s:
            row: dict[str, Any] = client.get_patiently(f"/admin/deployments/{model}")
            state = DeploymentState(row["state"])
            reason = row.get("message") or "no reason was given"
            if state is DeploymentState.FAILED:
                raise Unavailable(f"{model} could not be deployed: {reason}")
            if row["wanted_phase"] == "failed":
                raise Unavailable(
                    f"{model}: the new revision failed: {reason}", hint=f"{row['revision']} goes on serving as before."
                )
            if state.takes_traffic and row["revision"] == row["wanted_revision"]:
                console.print(f"{model} is {state.value}: {row['revision']}")
                return
            spinner.update(f"{model}: {state.value}{': ' + escape(row['message']) if row.get('message') else ''}")
            time.sleep(0.5)
    raise Unavailable(f"{model} is not ready after {timeout_s:.0f} s.", hint="`zenray status` shows its state.")
