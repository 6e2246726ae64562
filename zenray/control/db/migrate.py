"""Brings the schema up to date when control starts."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text

from zenray.control.db.engine import Database
from zenray.spec.errors import InvalidDocument

_ADVISORY_LOCK = 0x7A656E726179  # "zenray": two controls that start at once migrate one after the other


def migration_config() -> Config:
    config = Config()
    config.set_main_option("script_location", "zenray.control.db:migrations")
    return config


def migrate(database: Database) -> None:
    """Runs every step that the database lacks, in one transaction. Idempotent; safe from several processes."""
    config = migration_config()
    with database.engine.execution_options(zenray_writes=True).begin() as connection:
        if not database.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
        _refuse_newer_schema(ScriptDirectory.from_config(config), connection)
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _refuse_newer_schema(scripts: ScriptDirectory, connection: object) -> None:
    from alembic.runtime.migration import MigrationContext

    current = MigrationContext.configure(connection).get_current_revision()  # type: ignore[arg-type]
    known = {script.revision for script in scripts.walk_revisions()}
    if current is not None and current not in known:
        raise InvalidDocument(
            f"The database is at schema {current}, which this version of zenray does not know.",
            hint="A newer zenray has used it: start that one, or restore a backup from before.",
        )
