"""Connecting to the database that holds jobs and the registry, with its schema brought up to date.

While PostgreSQL is away (restarted, failing over, without a connection to spare), every call raises DatabaseAwayError.
Callers that can wait do so with :class:`tally.database.waiting.Patience`.
"""

from __future__ import annotations

import atexit
import os
import sqlite3
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from tally.config import make_private, settings
from tally.database.migrate import UnknownRevisionError, migrate
from tally.errors import DatabaseAwayError, StorageError
from tally.masking import mask

_HINT = "Set TALLY_HOME (or TALLY_DATABASE) to a place that can be written to; or make room there, if the disk is full."

BUSY_SECONDS = 30.0
"""How long SQLite waits while another process writes."""

CONNECT_SECONDS = 5
"""Limit for connecting to PostgreSQL."""

IDLE_SECONDS = 10.0
"""PostgreSQL ends a transaction whose client is silent for this long."""

_POSTGRES: dict[str, Any] = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "tally",
    # Notices within half a minute that the server's machine lost power.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    # A prepared plan would stay in use after its table has grown. Connection poolers cannot handle them either.
    "prepare_threshold": None,
}
"""Connection settings; the URL's own take precedence."""

_AWAY_STATES = ("08", "57P", "53300", "40001", "40P01", "55P03", "57014", "25P03")
"""Prefixes of PostgreSQL's error codes for temporary conditions: connection lost, shutting down or starting up, too
many clients, transaction to be retried."""

_REFUSALS = ("authentication failed", "pg_hba.conf", "does not exist", "is not permitted to log in", "no password")
"""Parts of the messages of a server that refuses the login, which is not temporary."""

_open: weakref.WeakSet[sa.Engine] = weakref.WeakSet()
"""What :func:`connect` made and somebody still has. Weakly: who drops one has its connections closed."""


@atexit.register
def _close() -> None:
    """At the end of the process, SQLite tidies up its files where their last connection is closed."""
    for engine in list(_open):
        engine.dispose()


def connect(url: str) -> sa.Engine:
    """An engine for ``url``, with the schema migrated to the newest revision.

    Raises StorageError when the database cannot be opened, DatabaseAwayError when it does not answer just now.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):  # a port that is no number, say
        raise StorageError("the database's URL cannot be understood", hint=_HINT) from None
    if "\0" in (parsed.database or ""):
        raise StorageError("the database's URL cannot be understood: it holds a zero byte (%00)", hint=_HINT)
    if parsed.drivername == "postgresql":  # SQLAlchemy would take psycopg2
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = mask(url)
    sqlite = parsed.get_backend_name() == "sqlite"
    if sqlite and parsed.database and parsed.database != ":memory:":
        try:
            make_private(Path(parsed.database).parent)
            with suppress(OSError):  # it is there, or SQLite says what is wrong
                os.close(os.open(parsed.database, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise StorageError(
                f"cannot make the folder of the database {shown}: {error.strerror}",
                hint="Set TALLY_HOME to a folder that can be written to.",
            ) from error
    try:
        engine = sa.create_engine(parsed, **_options(parsed))
    except (sa.exc.ArgumentError, ImportError) as error:
        postgres = isinstance(error, ImportError) and parsed.drivername == "postgresql+psycopg"
        hint = "It needs a driver: pip install 'tally-scoring[postgres]'" if postgres else _HINT
        raise StorageError(f"cannot open the database {shown}: {error}", hint=hint) from error
    _open.add(engine)
    try:
        if sqlite:
            _prepare_sqlite(engine)
        elif engine.driver == "psycopg":
            _prepare_postgres(engine)
            if url == settings().database:
                _follow_settings(engine)
        migrate(engine)
    except sa.exc.DBAPIError as error:
        engine.dispose()
        reason = " ".join(str(error.orig).split())
        if _is_away(engine.dialect, error, connecting=True):
            raise DatabaseAwayError(
                f"cannot open the database {shown}: {reason}",
                reason=reason,
                hint="Check that it runs and can be reached from here, or set TALLY_DATABASE to another.",
            ) from error
        raise StorageError(f"cannot open the database {shown}: {reason}", hint=_hint(parsed, reason)) from error
    except UnknownRevisionError as error:
        engine.dispose()
        raise StorageError(
            f"the database {shown} has the schema {error}, which this version of Tally does not know",
            hint="It was made by a newer version: upgrade Tally, or set TALLY_HOME to another folder.",
        ) from None
    _explain_errors(engine, shown)
    return engine


def _hint(url: sa.URL, reason: str) -> str:
    """What helps where a database was reached, or its file found, and it cannot be opened."""
    if url.get_backend_name() == "sqlite":
        return _HINT
    if f'database "{url.database}" does not exist' in reason:
        return f"Make it (createdb {url.database}), or correct TALLY_DATABASE; Tally makes its tables itself."
    return "Correct TALLY_DATABASE: postgresql://USER:PASSWORD@HOST/DATABASE"


def _options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    if url.drivername != "postgresql+psycopg":
        return {"pool_pre_ping": True}
    return {
        # Replaces connections that were cut while idle.
        "pool_pre_ping": True,
        "isolation_level": "READ COMMITTED",  # the store locks rows where it matters
        "connect_args": {name: value for name, value in _POSTGRES.items() if name not in url.query},
    }


def _is_away(dialect: sa.Dialect, error: sa.exc.DBAPIError, *, connecting: bool) -> bool:
    """Whether the error is temporary. SQLite's never are."""
    if dialect.name != "postgresql":
        return False
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    if state is not None:
        return str(state).startswith(_AWAY_STATES)
    if not isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError)):
        return False
    return error.connection_invalidated or (connecting and not any(each in str(error.orig) for each in _REFUSALS))


def _explain_errors(engine: sa.Engine, shown: str) -> None:
    """Turn operational errors (full disk, lost connection, locked) into ours: users can fix those."""

    @sa.event.listens_for(engine, "handle_error", retval=True)
    def explain(context: sa.engine.ExceptionContext) -> BaseException | None:
        error = context.sqlalchemy_exception
        if context.is_pre_ping or not isinstance(error, sa.exc.DBAPIError):
            return None
        reason = " ".join(str(context.original_exception).split())
        if _is_away(context.dialect, error, connecting=context.connection is None):
            return DatabaseAwayError(
                f"the database {shown} is away: {reason}",
                reason=reason,
                hint="Nothing that was committed is lost. When it is back: tally jobs resume JOB",
            )
        if not isinstance(error, sa.exc.OperationalError):
            return None
        return StorageError(
            f"the database {shown} failed: {reason}",
            hint="Nothing that was committed is lost. Repair it, then: tally jobs resume JOB",
        )


def _prepare_postgres(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        # A process that is stopped or cut off inside a transaction keeps its rows locked, so that nobody could take
        # over its job. The server ends such transactions.
        connection.autocommit = True
        connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_SECONDS * 1000:.0f}")
        connection.autocommit = False


def _follow_settings(engine: sa.Engine) -> None:
    """Log in as the settings say when a connection is made: a password that is kept in a file may have been changed."""

    @sa.event.listens_for(engine, "do_connect")
    def log_in(dialect: sa.Dialect, record: Any, arguments: list[Any], options: dict[str, Any]) -> None:
        now = sa.make_url(settings().database)
        login = {"user": now.username, "password": now.password}
        options |= {name: value for name, value in login.items() if value is not None}


def _prepare_sqlite(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy's BEGIN below is the only one
        cursor = connection.cursor()
        _write_ahead(cursor)
        # In WAL mode, NORMAL survives kill -9. A power cut may lose the last commits, whose chunks are then run
        # again, but never corrupts the file.
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @sa.event.listens_for(engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # Take the write lock at the start: a transaction that reads first would fail with "database is locked" if
        # another one wrote before it does.
        reading = connection.get_execution_options().get("reading", False)
        connection.exec_driver_sql("BEGIN" if reading else "BEGIN IMMEDIATE")


def _write_ahead(cursor: Any) -> None:
    """Switch the file to write-ahead logging. SQLite itself does not wait when another process is doing it."""
    deadline = time.monotonic() + BUSY_SECONDS
    while cursor.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
