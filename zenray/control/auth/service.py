"""Makes, lists and revokes organisations and API keys, and tells gateways of each change."""

from __future__ import annotations

import hashlib
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from zenray.control.auth.tables import ApiKey, Org
from zenray.control.db.published import Kind, publish
from zenray.spec.edge import KeyEntry, OrgEntry
from zenray.spec.errors import Conflict, InvalidValue, NotFound, suggest

KEY_RANDOM_CHARACTERS = 48
MAX_SCOPES = 64
_ALPHABET = string.ascii_letters + string.digits
_ORG = re.compile(r"^[a-z0-9][a-z0-9-]{0,62}$")
_SCOPE = re.compile(r"^[A-Za-z0-9._:/*?\[\]!-]{1,128}$")


@dataclass(frozen=True)
class NewKey:
    """A key just made. `secret` exists here and nowhere else: show it once."""

    row: ApiKey
    secret: str


def create_org(session: Session, name: str, *, now: float) -> Org:
    """InvalidValue for an impossible name, Conflict if it is taken."""
    if not _ORG.match(name):
        raise InvalidValue(
            f"{name!r} cannot be the name of an organisation.",
            hint="Use 1 to 63 of a-z, 0-9 and '-', beginning with a letter or a digit.",
            param="name",
        )
    if session.get(Org, name):
        raise Conflict(f"The organisation {name!r} exists already.", param="name")
    org = Org(name=name, cache_salt=secrets.token_hex(16), created_at=now)
    session.add(org)
    session.flush()
    publish(session, Kind.ORG, name, OrgEntry(org=name, cache_salt=org.cache_salt))
    return org


def list_orgs(session: Session) -> list[Org]:
    return list(session.scalars(select(Org).order_by(Org.name)))


def get_org(session: Session, name: str) -> Org:
    """NotFound, with the nearest name, if there is none."""
    org = session.get(Org, name)
    if org is None:
        known = session.scalars(select(Org.name))
        raise NotFound(f"There is no organisation {name!r}.", hint=suggest(name, known), param="org")
    return org


def create_key(
    session: Session,
    org: str,
    *,
    prefix: str,
    now: float,
    name: str | None = None,
    user_id: str | None = None,
    scopes: Sequence[str] = ("*",),
    expires_at: float | None = None,
) -> NewKey:
    """A key of `org` for the models that match one of `scopes`. Only its SHA-256 is kept."""
    get_org(session, org)
    _check_scopes(scopes)
    if expires_at is not None and expires_at <= now:
        raise InvalidValue(f"expires_at {expires_at:.0f} is in the past.", hint=f"It is {now:.0f}.", param="expires_at")
    secret = prefix + "".join(secrets.choice(_ALPHABET) for _ in range(KEY_RANDOM_CHARACTERS))
    row = ApiKey(
        key_id=f"key_{secrets.token_hex(8)}",
        sha256=hash_key(secret),
        shown=f"{prefix}…{secret[-4:]}",
        org=org,
        name=name,
        user_id=user_id,
        scopes=list(scopes),
        expires_at=expires_at,
        created_at=now,
    )
    session.add(row)
    session.flush()
    publish(session, Kind.KEY, row.sha256, _entry(row))
    return NewKey(row, secret)


def list_keys(session: Session, org: str | None = None) -> list[ApiKey]:
    query = select(ApiKey).order_by(ApiKey.created_at, ApiKey.key_id)
    if org is not None:
        get_org(session, org)
        query = query.where(ApiKey.org == org)
    return list(session.scalars(query))


def revoke_key(session: Session, key_id: str, *, now: float) -> ApiKey:
    """From the next snapshot on, gateways refuse the key. Revoking twice changes nothing."""
    row = session.get(ApiKey, key_id, with_for_update=True)
    if row is None:
        known = session.scalars(select(ApiKey.key_id))
        raise NotFound(f"There is no key {key_id!r}.", hint=suggest(key_id, known, most=5), param="key_id")
    if row.revoked_at is None:
        row.revoked_at = now
        session.flush()
        publish(session, Kind.KEY, row.sha256, _entry(row))
    return row


def hash_key(secret: str) -> str:
    """A plain SHA-256: the key has 285 random bits, so there is nothing that a slow hash would protect."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _entry(row: ApiKey) -> KeyEntry:
    return KeyEntry(
        key_id=row.key_id,
        org=row.org,
        user_id=row.user_id,
        scopes=tuple(row.scopes),
        expires_at=row.expires_at,
        revoked=row.revoked_at is not None,
    )


def _check_scopes(scopes: Sequence[str]) -> None:
    if not 1 <= len(scopes) <= MAX_SCOPES:
        raise InvalidValue(
            f"{len(scopes)} scopes given.", hint=f"Give 1 to {MAX_SCOPES}; '*' is all models.", param="scopes"
        )
    for scope in scopes:
        if not _SCOPE.match(scope):
            raise InvalidValue(
                f"{scope!r} is not a pattern of model names.",
                hint="Use letters, digits, '.', '_', ':', '/', '-', and the wildcards '*', '?' and '[…]'.",
                param="scopes",
            )
