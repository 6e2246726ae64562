"""Organisations and keys."""

from __future__ import annotations

import hashlib

import pytest
from sqlalchemy import text

from zenray.control.auth.service import create_key, create_org, get_org, list_keys, revoke_key
from zenray.control.db.engine import Database
from zenray.spec.errors import Conflict, InvalidValue, NotFound


def make_org(database: Database, name: str = "acme") -> None:
    with database.write() as session:
        create_org(session, name, now=1.0)


def test_only_the_hash_of_a_key_is_kept(database: Database) -> None:
    make_org(database)
    with database.write() as session:
        made = create_key(session, "acme", prefix="sk-zen-", now=1.0)
        assert made.secret.startswith("sk-zen-") and len(made.secret) >= len("sk-zen-") + 40
        assert made.row.sha256 == hashlib.sha256(made.secret.encode()).hexdigest()
        assert create_key(session, "acme", prefix="sk-zen-", now=1.0).secret != made.secret
    with database.engine.connect() as connection:
        for table in ("api_keys", "published_entries"):
            rows = connection.execute(text(f"SELECT * FROM {table}")).all()  # noqa: S608
            assert rows and made.secret[10:40] not in str(rows)


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a" * 64, "ä", "a/b", "a\x00"])
def test_impossible_names_are_refused(database: Database, name: str) -> None:
    with pytest.raises(InvalidValue, match="1 to 63"), database.write() as session:
        create_org(session, name, now=1.0)


def test_a_taken_name_is_a_conflict_and_an_unknown_one_is_answered_with_the_nearest(database: Database) -> None:
    make_org(database)
    with pytest.raises(Conflict, match="acme"), database.write() as session:
        create_org(session, "acme", now=2.0)
    with pytest.raises(NotFound, match="Did you mean 'acme'"), database.read() as session:
        get_org(session, "acmee")


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"scopes": []}, "scopes"),
        ({"scopes": ["*"] * 65}, "scopes"),
        ({"scopes": ["zen 7b"]}, "scopes"),
        ({"scopes": [""]}, "scopes"),
        ({"expires_at": 0.5}, "expires_at"),
    ],
)
def test_bad_keys_are_refused(database: Database, changes: dict[str, object], param: str) -> None:
    make_org(database)
    with pytest.raises(InvalidValue) as caught, database.write() as session:
        create_key(session, "acme", prefix="sk-", now=1.0, **changes)  # type: ignore[arg-type]
    assert caught.value.param == param


def test_revoking_twice_keeps_the_first_time(database: Database) -> None:
    make_org(database)
    with database.write() as session:
        key_id = create_key(session, "acme", prefix="sk-", now=1.0).row.key_id
    for now in (2.0, 3.0):
        with database.write() as session:
            assert revoke_key(session, key_id, now=now).revoked_at == 2.0
    with database.read() as session:
        assert [row.revoked_at for row in list_keys(session, "acme")] == [2.0]
    with pytest.raises(NotFound, match="key_nope"), database.write() as session:
        revoke_key(session, "key_nope", now=4.0)
