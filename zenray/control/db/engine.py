"""Opens the database, SQLite or PostgreSQL, and hands out sessions: one to read with, one to write with."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.orm import Session, sessionmaker

from zenray.spec.errors import InvalidDocument

logger = logging.getLogger(__name__)

BUSY_TIMEOUT_S = 20
POOL_CONNECTIONS = 20


class Database:
    """One engine and its two kinds of session.

    `write()` holds SQLite's write lock from its first statement (BEGIN IMMEDIATE), so that what it read is still true
    when it writes; on PostgreSQL the repositories lock the rows that matter (SELECT … FOR UPDATE). Both kinds commit
    when their block ends and roll back when it raises; code inside never commits. No network call belongs inside.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_sqlite = engine.dialect.name == "sqlite"
        # SQLite has one writer; waiting here is fair and costs nothing, waiting inside SQLite polls.
        self._sqlite_writer = threading.Lock() if self.is_sqlite else None
        self._readers = sessionmaker(engine, expire_on_commit=False)
        self._writers = sessionmaker(engine.execution_options(zenray_writes=True), expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        with self._readers() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        if self._sqlite_writer is None:
            with self._writers.begin() as session:
                yield session
        else:
            with self._sqlite_writer, self._writers.begin() as session:
                yield session

    def ping(self) -> None:
        """One round trip; raises what the driver raises when the database is away."""
        with self.engine.connect() as connection:
            connection.execute(text("SELECT 1"))

    def close(self) -> None:
        self.engine.dispose()


def open_database(url: str) -> Database:
    """Connects lazily to a SQLAlchemy URL (`sqlite:///FILE`, `postgresql://…`). Does not migrate: see `migrate`."""
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        return Database(_sqlite_engine(parsed))
    return Database(
        create_engine(
            parsed,
            hide_parameters=True,  # an error is logged, and what could not be written may be a key or a salt
            pool_size=POOL_CONNECTIONS,
            pool_pre_ping=True,
            connect_args={"connect_timeout": 10, "application_name": "zenray-control"},
        )
    )


def _parse(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidDocument(
            "database_url is not a SQLAlchemy URL.",
            hint="Write sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.",
        ) from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if backend == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise InvalidDocument(
                "An in-memory SQLite database cannot be shared by threads.", hint="Write sqlite:///FILE."
            )
        return parsed
    raise InvalidDocument(f"database_url: {backend!r} is not supported.", hint="Use SQLite or PostgreSQL.")


def _sqlite_engine(url: URL) -> Engine:
    _keep_from_others(Path(str(url.database)))
    engine = create_engine(
        url,
        hide_parameters=True,
        pool_size=POOL_CONNECTIONS,
        max_overflow=40,
        connect_args={"timeout": BUSY_TIMEOUT_S, "check_same_thread": False, "cached_statements": 256},
    )

    @event.listens_for(engine, "connect")
    def _configure(dbapi_connection: Any, _record: Any) -> None:
        dbapi_connection.isolation_level = None  # the driver begins nothing by itself: `_begin` does
        cursor = dbapi_connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        # FULL: what was acknowledged to a gateway is deleted there, so it must survive a power cut here.
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("zenray_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _keep_from_others(path: Path) -> None:
    """Makes the file, or takes it away from all but its owner: it holds every engine's key and every cache salt.

    SQLite gives its write-ahead log and that log's index the mode of the file; those that lie here may be older.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    for file in (path, Path(f"{path}-wal"), Path(f"{path}-shm")):
        if file.exists() and file.stat().st_mode & 0o077:
            file.chmod(0o600)
