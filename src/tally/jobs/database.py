"""Connecting to the database that holds jobs and the registry, and bringing its schema up to date."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from tally.errors import StorageError

HEAD = "0002"
"""The newest revision in ``migrations/versions``; a test keeps it true."""

_HINT = "Set TALLY_HOME (or TALLY_DATABASE) to a place that is there and can be written to."

_MIGRATION_LOCK = 0x7A11_7
"""PostgreSQL's advisory locks have numbers; any that nobody else uses will do."""


BUSY_SECONDS = 30.0
"""How long SQLite waits for another process that writes."""


class now(FunctionElement[float]):  # noqa: N801 - written like a function in statements
    """Seconds since the epoch by the database's clock: the one clock that all coordinators share."""

    type = sa.Double()
    inherit_cache = True


@compiles(now, "sqlite")
def _now_sqlite(element: Any, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: Any, compiler: Any, **options: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


def connect(url: str) -> sa.Engine:
    """An engine for ``url``, with the schema migrated to the newest revision.

    Raises StorageError when the database cannot be opened.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise StorageError("the database's URL cannot be understood", hint=_HINT) from None
    shown = parsed.render_as_string(hide_password=True)
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite and parsed.database:
        try:
            Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot make the folder of the database {shown}: {error.strerror}",
                hint="Set TALLY_HOME to a folder that can be written to.",
            ) from error
    try:
        engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS} if sqlite else {})
    except (sa.exc.ArgumentError, ModuleNotFoundError) as error:
        raise StorageError(f"cannot open the database {shown}: {error}", hint=_HINT) from error
    try:
        if sqlite:
            _prepare_sqlite(engine)
        _migrate(engine)
    except sa.exc.DBAPIError as error:
        engine.dispose()
        raise StorageError(f"cannot open the database {shown}: {error.orig}", hint=_HINT) from error
    except _UnknownRevisionError as error:
        engine.dispose()
        raise StorageError(
            f"the database {shown} has the schema {error}, which this version of Tally does not know",
            hint="It was made by a newer version: upgrade Tally, or set TALLY_HOME to another folder.",
        ) from None
    _tell_plainly(engine, shown)
    return engine


class _UnknownRevisionError(Exception):
    pass


def _tell_plainly(engine: sa.Engine, shown: str) -> None:
    """A database that fails (full disk, lost connection, locked) is the user's to mend, not a bug to trace."""

    @sa.event.listens_for(engine, "handle_error", retval=True)
    def explain(context: sa.engine.ExceptionContext) -> BaseException | None:
        if not isinstance(context.sqlalchemy_exception, sa.exc.OperationalError):
            return None
        reason = " ".join(str(context.original_exception).split())
        return StorageError(
            f"the database {shown} failed: {reason}",
            hint="Nothing that was committed is lost. Mend it, then: tally jobs resume JOB",
        )


def _prepare_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's BEGIN below is the only one
        cursor = connection.cursor()
        _write_ahead(cursor)
        # In WAL mode NORMAL survives kill -9; a power cut may lose the last commits, never corrupt:
        # their chunks are then run again.
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # A transaction that reads first and writes later would fail with "database is locked" when
        # another writer came between: take the write lock at the start.
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _write_ahead(cursor: Any) -> None:
    """Switch to write-ahead logging: once for each file, and SQLite does not wait when another does it just now."""
    deadline = time.monotonic() + BUSY_SECONDS
    while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _migrate(engine: sa.Engine) -> None:
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
        if revision != HEAD:  # another process may have been faster
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError:
                raise _UnknownRevisionError(repr(revision)) from None


def _revision(connection: sa.Connection) -> str | None:
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
    return revision
