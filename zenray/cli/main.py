"""The `zenray` command line: verbs and a file. Its flags are frozen by a test; a new knob is a field in a spec."""

from __future__ import annotations

import logging
import sys

import typer

from zenray import __version__
from zenray.cli.commands import accounts, chat, data, deployments, jobs, models, plan, platform, runs
from zenray.cli.output import console, show_error
from zenray.spec.errors import ZenrayError

app = typer.Typer(
    name="zenray",
    help="Make, tune, serve, ask and bill a family of Mixture-of-Distilled-Experts language models, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

app.command("up")(platform.up)
app.command("down")(platform.down)
app.command("status")(platform.status)
app.add_typer(models.app, name="models")
app.command("deploy")(deployments.deploy)
app.command("undeploy")(deployments.undeploy)
app.add_typer(accounts.orgs, name="orgs")
app.add_typer(accounts.keys, name="keys")
app.add_typer(accounts.credits, name="credits")
app.command("usage")(accounts.usage)
app.command("chat")(chat.chat)
app.command("run")(runs.run)
app.command("plan")(plan.plan)
app.add_typer(jobs.app, name="jobs")
app.command("data")(data.data)


@app.command("version")
def version() -> None:
    """Print the version."""
    console.print(__version__)


def main() -> None:
    """Run the command line. What zenray or the system refuses is one message and exit code 1, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    try:
        app()
    except (ZenrayError, OSError) as error:
        show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
