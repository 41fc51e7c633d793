"""Bringing a database's schema up to the newest revision."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

HEAD = "0019"
"""The newest revision in ``migrations/versions``; a test keeps it true."""

_MIGRATION_LOCK = 0x7A11_7
"""Number of the PostgreSQL advisory lock held while migrating; any that nobody else uses will do."""


class UnknownRevisionError(Exception):
    """The schema was made by a newer version of Tally; the message is its revision."""


def migrate(engine: sa.Engine) -> None:
    """Bring the schema up to ``HEAD``. Raises UnknownRevisionError. Several processes may do this at once."""
    with engine.connect().execution_options(reading=True) as connection:
        if _revision(connection) == HEAD:
            return
    # Alembic takes a quarter of a second to import: only when there is something to do.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # SQLite's BEGIN IMMEDIATE lets one in at a time already
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
        revision = _revision(connection)
        if revision != HEAD:  # unless another process was faster
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError:
                raise UnknownRevisionError(repr(revision)) from None


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision
