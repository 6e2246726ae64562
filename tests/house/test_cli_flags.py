"""The command line is frozen: verbs and a file. A new knob is a field in a spec; a new verb is written down here."""

from __future__ import annotations

from typing import Any

import typer

from zenray.cli.main import app

FLAGS = {
    "chat": ["MODEL"],
    "credits add": ["--note", "ORG", "USD"],
    "data": ["--json", "FOLDER"],
    "deploy": ["--no-wait", "--wait", "TARGET"],
    "down": [],
    "jobs cancel": ["JOB"],
    "jobs list": ["--json"],
    "jobs logs": ["--follow", "JOB"],
    "jobs resume": ["JOB"],
    "jobs show": ["--json", "JOB"],
    "keys create": ["--expires", "--name", "--scope", "ORG"],
    "keys list": ["--json", "ORG"],
    "keys revoke": ["KEY_ID"],
    "models list": ["--json"],
    "models pull": ["--format", "--source", "--version", "MODEL"],
    "models show": ["--json", "MODEL"],
    "models verify": ["NAME"],
    "models versions": ["--json", "MODEL"],
    "orgs create": ["NAME"],
    "orgs list": ["--json"],
    "plan": ["--file", "--json", "-f", "FILE"],
    "run": ["--follow", "FILE"],
    "status": ["--json"],
    "undeploy": ["MODEL"],
    "up": ["--detach", "--file", "-f"],
    "usage": ["--by", "--json", "ORG"],
    "version": [],
}


def spelled(command: Any, name: str = "") -> dict[str, list[str]]:
    """command → its arguments (in capitals) and options, for a command and all below it."""
    below = getattr(command, "commands", None)
    if below is not None:
        found: dict[str, list[str]] = {}
        for word, one in below.items():
            found |= spelled(one, f"{name} {word}".strip())
        return found
    words = []
    for parameter in command.params:
        options = [*parameter.opts, *parameter.secondary_opts]
        names = options if parameter.param_type_name == "option" else [parameter.name.upper()]
        words += [word for word in names if word != "--help"]
    return {name: sorted(words)}


def test_the_list_of_flags_is_frozen():
    assert spelled(typer.main.get_command(app)) == FLAGS


def test_every_listing_speaks_json():
    for name, words in FLAGS.items():
        if name.split()[-1] in {"list", "show", "versions", "status", "usage"}:
            assert "--json" in words, f"zenray {name}"
