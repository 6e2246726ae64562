"""What gateways are told: versions that only rise, deltas that miss nothing."""

from __future__ import annotations

import threading

import orjson

from zenray.control.auth.service import create_key, create_org, revoke_key
from zenray.control.db.engine import Database
from zenray.control.db.published import Kind, current_version, publish, raise_floor, read_published
from zenray.control.edge.snapshot import render_snapshot
from zenray.spec.edge import OrgEntry, Snapshot


def snapshot(database: Database, since: int) -> Snapshot:
    with database.read() as session:
        return Snapshot.model_validate_json(render_snapshot(session, since, now=0.0))


def put(database: Database, name: str, salt: str | None, *, now_s: float = 0.0) -> bool:
    entry = None if salt is None else OrgEntry(org=name, cache_salt=salt)
    with database.write() as session:
        return publish(session, Kind.ORG, name, entry, now_s=lambda: now_s)


def test_a_delta_has_what_changed_and_none_for_what_went(database: Database) -> None:
    put(database, "a", "1")
    put(database, "b", "1")
    first = snapshot(database, 0)
    assert first.full and first.orgs.keys() == {"a", "b"}
    put(database, "a", None)
    put(database, "c", "1")
    second = snapshot(database, first.version)
    assert not second.full
    assert second.orgs == {"a": None, "c": OrgEntry(org="c", cache_salt="1")}
    assert snapshot(database, second.version).orgs == {}
    assert snapshot(database, 0).orgs.keys() == {"b", "c"}


def test_telling_the_same_again_is_no_change(database: Database) -> None:
    assert put(database, "a", "1")
    version = snapshot(database, 0).version
    assert not put(database, "a", "1")
    assert not put(database, "never", None)
    assert snapshot(database, version).version == version


def test_versions_rise_even_when_the_clock_goes_back(database: Database) -> None:
    put(database, "a", "1", now_s=5_000.0)
    high = snapshot(database, 0).version
    assert high >= 5_000_000
    put(database, "a", "2", now_s=1.0)
    assert snapshot(database, 0).version == high + 1


def test_a_start_makes_everybody_fetch_everything_and_never_goes_back(database: Database) -> None:
    put(database, "a", "1")
    before = snapshot(database, 0).version
    with database.write() as session:
        assert raise_floor(session) > before
    again = snapshot(database, before)
    assert again.full and again.orgs.keys() == {"a"}


def test_a_version_from_the_future_gets_everything(database: Database) -> None:
    put(database, "a", "1")
    assert snapshot(database, snapshot(database, 0).version + 10**9).full


def test_keys_and_organisations_reach_the_snapshot(database: Database) -> None:
    with database.write() as session:
        org = create_org(session, "acme", now=1.0)
        made = create_key(session, "acme", prefix="sk-", now=1.0, scopes=["zen-*"], user_id="u", expires_at=9.0)
        key_id, salt = made.row.key_id, org.cache_salt
    first = snapshot(database, 0)
    assert first.orgs == {"acme": OrgEntry(org="acme", cache_salt=salt)}
    (digest,) = first.keys
    entry = first.keys[digest]
    assert entry is not None and (entry.key_id, entry.scopes, entry.user_id, entry.expires_at) == (
        key_id,
        ("zen-*",),
        "u",
        9.0,
    )
    with database.write() as session:
        revoke_key(session, key_id, now=2.0)
    change = snapshot(database, first.version)
    revoked = change.keys[digest]
    assert revoked is not None and revoked.revoked and not change.orgs


def test_whoever_follows_deltas_while_many_write_ends_with_everything(database: Database) -> None:
    """A lower version that became visible after a higher one would be missed for ever."""
    writers, each = 6, 15
    seen: dict[str, object] = {}
    stop = threading.Event()

    def follow() -> None:
        since = 1
        while True:
            ended = stop.is_set()
            with database.read() as session:
                body = orjson.loads(render_snapshot(session, since, now=0.0))
            since = body["version"]
            seen.update(body["orgs"])
            if ended:
                return

    def write(writer: int) -> None:
        for number in range(each):
            put(database, f"w{writer}-{number}", "1")

    follower = threading.Thread(target=follow)
    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    follower.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    follower.join()
    assert len(seen) == writers * each
    with database.read() as session:
        versions = [entry.version for entry in read_published(session, 0)[2]]
        assert len(set(versions)) == writers * each and max(versions) == current_version(session)
