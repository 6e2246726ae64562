"""Organisations, keys, credits and usage: who may ask, and what it cost."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Annotated

import httpx
import typer

from zenray.cli.client import ControlClient
from zenray.cli.home import Home
from zenray.cli.output import console, show_json, show_table
from zenray.spec.errors import InvalidValue
from zenray.spec.money import format_usd, usd_to_nano_usd

orgs = typer.Typer(help="Organisations: who pays.", no_args_is_help=True)
keys = typer.Typer(help="API keys: who asks, and for which models.", no_args_is_help=True)
credits = typer.Typer(help="Credits: what an organisation may spend.", no_args_is_help=True)

_UNITS_S = {"min": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(rf"([0-9]{{1,6}})({'|'.join(_UNITS_S)})")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@orgs.command("create")
def create_org(name: Annotated[str, typer.Argument(help="A short name: a-z, 0-9 and '-'.")]) -> None:
    """Create an organisation."""
    ControlClient.connect(Home.from_environment()).post("/admin/orgs", {"name": name})
    console.print(f"Organisation {name} created. Next: `zenray credits add {name} 10` and `zenray keys create {name}`.")


@orgs.command("list")
def list_orgs(as_json: AsJson = False) -> None:
    """List organisations with their balances."""
    rows = ControlClient.connect(Home.from_environment()).get("/admin/orgs")["data"]
    if as_json:
        show_json(rows)
        return
    show_table(
        ["organisation", "#balance", "created"],
        [[row["name"], format_usd(row["balance_nano_usd"]), _day(row["created_at"])] for row in rows],
    )


@keys.command("create")
def create_key(
    org: str,
    scope: Annotated[
        list[str] | None, typer.Option(help="Pattern of model names; may be given more than once.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="To recognise it by in lists.")] = None,
    expires: Annotated[str | None, typer.Option(help="How long it is good for, such as 12h or 30d.")] = None,
) -> None:
    """Create an API key for ORG and print it. It is shown this one time; only its hash is kept."""
    home = Home.from_environment()
    expires_at = None if expires is None else time.time() + duration_s(expires)
    body = {"org": org, "scopes": scope or ["*"], "name": name, "expires_at": expires_at}
    key = ControlClient.connect(home).post("/admin/keys", body)["key"]
    running = home.running_or_none()
    if running is not None:
        wait_until_known(running.gateway_url, key)
    console.print(key)


@keys.command("list")
def list_keys(org: Annotated[str | None, typer.Argument()] = None, as_json: AsJson = False) -> None:
    """List API keys (never the keys themselves)."""
    rows = ControlClient.connect(Home.from_environment()).get("/admin/keys", org=org)["data"]
    if as_json:
        show_json(rows)
        return
    show_table(
        ["key", "organisation", "name", "scopes", "created", "expires", "state"],
        [
            [
                row["id"],
                row["org"],
                row["name"],
                " ".join(row["scopes"]),
                _day(row["created_at"]),
                _day(row["expires_at"]) if row["expires_at"] else "never",
                _key_state(row),
            ]
            for row in rows
        ],
    )


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="The id from `zenray keys list`, not the key.")]) -> None:
    """Revoke a key. Gateways refuse it within two seconds."""
    ControlClient.connect(Home.from_environment()).delete(f"/admin/keys/{key_id}")
    console.print(f"Key {key_id} revoked.")


@credits.command("add")
def add_credits(
    org: str,
    usd: Annotated[str, typer.Argument(help="US dollars, such as 10 or 0.50.")],
    note: Annotated[str | None, typer.Option(help="Kept in the ledger.")] = None,
) -> None:
    """Give ORG credit to spend."""
    try:
        usd_to_nano_usd(usd)
    except (ValueError, ArithmeticError) as error:
        why = f": {error}" if isinstance(error, ValueError) else ""
        raise InvalidValue(f"{usd!r} is not an amount of US dollars{why}.", hint="Write it as 10 or 0.50.") from None
    client = ControlClient.connect(Home.from_environment())
    answer = client.post(f"/admin/orgs/{org}/credits", {"amount_usd": usd, "note": note})
    console.print(f"{org} has {format_usd(answer['balance_nano_usd'])}.")


def usage(
    org: Annotated[str | None, typer.Argument(help="One organisation; all when left out.")] = None,
    by: Annotated[str, typer.Option(help="day, model or key.")] = "day",
    as_json: AsJson = False,
) -> None:
    """Show what was used and what it cost."""
    rows = ControlClient.connect(Home.from_environment()).get("/admin/usage", org=org, group_by=by)["data"]
    if as_json:
        show_json(rows)
        return
    show_table(
        [by, "#requests", "#input tokens", "#of these cached", "#output tokens", "#cost"],
        [
            [
                row["group"],
                row["requests"],
                row["input_tokens"],
                row["cached_input_tokens"],
                row["output_tokens"],
                format_usd(row["cost_nano_usd"]),
            ]
            for row in rows
        ],
    )


def duration_s(text: str) -> float:
    """Seconds of "90min", "12h" or "30d". InvalidValue for anything else, and for nothing at all."""
    found = _DURATION.fullmatch(text)
    if found is None or not int(found[1]):
        raise InvalidValue(f"{text!r} is not a time.", hint="Write it as 90min, 12h or 30d.")
    return int(found[1]) * _UNITS_S[found[2]]


def wait_until_known(gateway_url: str, key: str, timeout_s: float = 3.0) -> None:
    """Return when the gateway takes a new key, so that it works the moment it is shown; at the latest after 3 s."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        try:
            answer = httpx.get(
                f"{gateway_url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=2.0, trust_env=False
            )
        except httpx.HTTPError:
            return  # no gateway to wait for
        if answer.status_code != 401:
            return
        time.sleep(0.05)


def _key_state(row: dict[str, object]) -> str:
    if row.get("revoked_at"):
        return "revoked"
    expires_at = row.get("expires_at")
    if isinstance(expires_at, int | float) and expires_at < datetime.now(UTC).timestamp():
        return "expired"
    return "active"


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
