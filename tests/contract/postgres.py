"""A real PostgreSQL server for tests: Debian's programs, a data folder of its own, reached over a Unix socket."""

from __future__ import annotations

import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg

START_TIMEOUT_S = 30.0


def programs() -> Path:
    """The folder of the newest PostgreSQL's programs. Fails with what to install."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/postgres"),
        key=lambda path: [int(n) for n in re.findall(r"\d+", str(path))],
    )
    if found:
        return found[-1].parent
    on_path = shutil.which("postgres")
    if on_path and shutil.which("initdb"):
        return Path(on_path).resolve().parent
    raise RuntimeError("PostgreSQL is not installed: `apt-get install postgresql` (as root), or run `make setup`.")


class PostgresServer:
    """A running server. `new_database` gives an empty database, or a copy of another one, as an URL."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = itertools.count(1)

    def url(self, name: str) -> str:
        return f"postgresql://zenray@/{name}?host={self._folder}"

    def new_database(self, template: str | None = None) -> str:
        name = f"test_{next(self._numbers)}"
        # The names are ours, not a user's; CREATE DATABASE takes no parameters.
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE {template or 'template0'}".encode())
        return name

    def shut(self, name: str, shut: bool = True) -> None:
        """An outage of one database: its sessions end, and new ones are refused until `shut=False`."""
        with self.connect() as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {'false' if shut else 'true'}".encode())
            if shut:
                connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))

    def connect(self, name: str = "postgres") -> psycopg.Connection:
        return psycopg.connect(dbname=name, user="zenray", host=str(self._folder), autocommit=True)


@contextmanager
def running_postgres(*, durable: bool = False) -> Iterator[PostgresServer]:
    """Starts a server and stops it at the end, leaving nothing. As root it runs as a user without rights."""
    programs_ = programs()
    as_user = _drop_root()
    folder = Path(tempfile.mkdtemp(prefix="zenray-pg-"))
    try:
        if as_user:
            user = pwd.getpwnam(_other_user())
            os.chown(folder, user.pw_uid, user.pw_gid)
        data = folder / "data"
        arguments = [*as_user, str(programs_ / "initdb"), "-D", str(data), "-U", "zenray", "-A", "trust", "-E", "UTF8"]
        made = subprocess.run([*arguments, "--no-sync", "--locale=C.UTF-8"], capture_output=True, text=True, cwd="/")
        if made.returncode:
            raise RuntimeError(f"initdb failed: {made.stderr}")
        settings = {"listen_addresses": "", "unix_socket_directories": str(folder), "max_connections": "100"}
        if not durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
            settings |= {"wal_level": "minimal", "max_wal_senders": "0", "max_wal_size": "4GB", "autovacuum": "off"}
        flags = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [*as_user, str(programs_ / "postgres"), "-D", str(data), *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
            )
        try:
            _wait(server, folder)
            yield PostgresServer(folder)
        finally:
            server.send_signal(signal.SIGQUIT)  # "immediate": its data is thrown away
            server.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _wait(server: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            PostgresServer(folder).connect().close()
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start: {(folder / 'log').read_text()}") from None
            time.sleep(0.05)


def _drop_root() -> list[str]:
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={_other_user()}", f"--regid={_group_of(_other_user())}", "--clear-groups", "--"]


def _other_user() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _group_of(name: str) -> int:
    return pwd.getpwnam(name).pw_gid
