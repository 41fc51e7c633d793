"""Connecting to the database that holds jobs and the registry, and bringing its schema up to date.

PostgreSQL may be away for a while: it is restarted, fails over, or has no connection to spare. Whatever is asked of
it then raises DatabaseAwayError, and whoever can wait does so by :class:`Patience`.
"""

from __future__ import annotations

import logging
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from tally.errors import DatabaseAwayError, StorageError

log = logging.getLogger("tally")

T = TypeVar("T")

HEAD = "0003"
"""The newest revision in ``migrations/versions``; a test keeps it true."""

_HINT = "Set TALLY_HOME (or TALLY_DATABASE) to a place that is there and can be written to."

_MIGRATION_LOCK = 0x7A11_7
"""PostgreSQL's advisory locks have numbers; any that nobody else uses will do."""


BUSY_SECONDS = 30.0
"""How long SQLite waits for another process that writes."""

CONNECT_SECONDS = 5
"""How long connecting to PostgreSQL may take."""

IDLE_SECONDS = 10.0
"""How long a transaction on PostgreSQL may wait for its client."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between looks whether a database is back: they grow, and none is exact, so that not all come at once."""

_POSTGRES: dict[str, Any] = {
    "connect_timeout": CONNECT_SECONDS,
    "application_name": "tally",
    # A server that is gone without a word (its machine lost power) is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
    # A plan that was made while a table was small would be kept when it has grown. (Poolers mind them, too.)
    "prepare_threshold": None,
}
"""Settings of connections, where the URL says nothing else."""

_AWAY_STATES = ("08", "57P", "53300", "40001", "40P01", "55P03", "57014", "25P03")
"""Beginnings of PostgreSQL's error codes that pass: connection lost, shutting down or starting up, too many clients,
and those that ask for the transaction to be tried again."""

_REFUSALS = ("authentication failed", "pg_hba.conf", "does not exist", "is not permitted to log in", "no password")
"""In what a server says that does not let us in: that does not pass by itself."""


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

    Raises StorageError when the database cannot be opened, DatabaseAwayError when it does not answer at present.
    """
    try:
        parsed = sa.make_url(url)
    except sa.exc.ArgumentError:
        raise StorageError("the database's URL cannot be understood", hint=_HINT) from None
    if parsed.drivername == "postgresql":  # SQLAlchemy would take psycopg2
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = _shown(parsed)
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
        engine = sa.create_engine(parsed, **_options(parsed))
    except (sa.exc.ArgumentError, ImportError) as error:
        postgres = isinstance(error, ImportError) and parsed.drivername == "postgresql+psycopg"
        hint = "It needs a driver: pip install 'tally-scoring[postgres]'" if postgres else _HINT
        raise StorageError(f"cannot open the database {shown}: {error}", hint=hint) from error
    try:
        if sqlite:
            _prepare_sqlite(engine)
        elif engine.driver == "psycopg":
            _prepare_postgres(engine)
        _migrate(engine)
    except sa.exc.DBAPIError as error:
        engine.dispose()
        reason = " ".join(str(error.orig).split())
        if _is_away(engine.dialect, error, connecting=True):
            raise DatabaseAwayError(
                f"cannot open the database {shown}: {reason}",
                reason=reason,
                hint="See that it runs and can be reached from here, or set TALLY_DATABASE to another.",
            ) from error
        raise StorageError(f"cannot open the database {shown}: {reason}", hint=_HINT) from error
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


def _shown(url: sa.URL) -> str:
    """The URL as it may be shown: without its password, and without what else its query may hold."""
    hidden = {name: "***" for name in url.query if "password" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def _options(url: sa.URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    if url.drivername != "postgresql+psycopg":
        return {"pool_pre_ping": True}
    return {
        # A connection that was cut while nobody used it is replaced without anybody's notice.
        "pool_pre_ping": True,
        "isolation_level": "READ COMMITTED",  # whatever the server's default is: rows are locked where it matters
        "connect_args": {name: value for name, value in _POSTGRES.items() if name not in url.query},
    }


def _is_away(dialect: sa.Dialect, error: sa.exc.DBAPIError, *, connecting: bool) -> bool:
    """Whether the database may be asked again later; an error of SQLite's is here to stay."""
    if dialect.name != "postgresql":
        return False
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    if state is not None:
        return str(state).startswith(_AWAY_STATES)
    if not isinstance(error, (sa.exc.OperationalError, sa.exc.InterfaceError)):
        return False
    return error.connection_invalidated or (connecting and not any(each in str(error.orig) for each in _REFUSALS))


def _tell_plainly(engine: sa.Engine, shown: str) -> None:
    """A database that fails (full disk, lost connection, locked) is the user's to mend, not a bug to trace."""

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
            hint="Nothing that was committed is lost. Mend it, then: tally jobs resume JOB",
        )


def _prepare_postgres(engine: sa.Engine) -> None:
    @sa.event.listens_for(engine, "connect")
    def configure(connection: Any, record: Any) -> None:
        # A process that is stopped, or cut off, in the midst of a transaction holds the rows that it has locked, and
        # nobody could take its job over: the server ends such a transaction.
        connection.autocommit = True
        connection.execute(f"SET idle_in_transaction_session_timeout = {IDLE_SECONDS * 1000:.0f}")
        connection.autocommit = False


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


class Listener:
    """Hears what PostgreSQL's NOTIFY tells on a channel, on a connection of its own. Used by one thread."""

    def __init__(self, connection: sa.Connection, channel: str) -> None:
        self._connection = connection
        driver: Any = connection.connection.driver_connection
        self._driver = driver
        self._fileno = int(driver.fileno())
        connection.exec_driver_sql(f"LISTEN {channel}")
        connection.detach()  # it is not one of the pool's any more

    def fileno(self) -> int:
        """Of its socket, which is to be read from once something was told."""
        return self._fileno

    def heard(self) -> list[str]:
        """What has been told since; raises whatever it may when the connection is lost."""
        return [str(each.payload) for each in self._driver.notifies(timeout=0)]

    def close(self) -> None:
        """End the connection."""
        with suppress(Exception):  # it may be broken
            self._connection.close()


def listen(engine: sa.Engine, channel: str) -> Listener | None:
    """Hear what is told on the channel from now on; None where nothing is."""
    if engine.driver != "psycopg":
        return None
    connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        return Listener(connection, channel)
    except BaseException:
        connection.close()
        raise


class Patience:
    """Makes a caller wait while the database is away. Several threads may share one.

    say: told once that the database is away and that ``what`` waits, and once that it is back.
    """

    def __init__(self, say: Callable[[str], None] = log.warning, *, what: str = "the job") -> None:
        self._say, self._what = say, what
        self._lock = threading.Lock()
        self._away = False
        self._until: float | None = None

    def give_up(self, after: float) -> None:
        """Wait no longer than that many seconds from now. May be called from a signal handler."""
        until = time.monotonic() + after
        self._until = until if self._until is None else min(self._until, until)

    def __call__(self, call: Callable[[], T]) -> T:
        """What the call returns, which is made again and again while the database is away.

        The call has to be one that may be repeated: its answer may have been lost after it was carried out.
        Raises DatabaseAwayError only once it was told to give up.
        """
        tries = 0
        while True:
            try:
                result = call()
            except DatabaseAwayError as error:
                self.wait(error, tries)
                tries += 1
            else:
                self.is_back()
                return result

    def is_away(self, error: DatabaseAwayError) -> None:
        """Say so, unless that was said."""
        with self._lock:
            told, self._away = self._away, True
        if not told:
            self._say(f"the database is away ({error.reason}); {self._what} waits")

    def is_back(self) -> None:
        """It has answered."""
        if self._away:
            with self._lock:
                told, self._away = not self._away, False
            if not told:
                self._say("the database is back")

    def wait(self, error: DatabaseAwayError, tries: int) -> None:
        """Wait until it is time for the next try; ``tries``: how many there were. Raises the error to give up."""
        self.is_away(error)
        until = time.monotonic() + pause(tries)
        while (now := time.monotonic()) < until:
            if self._until is not None and now >= self._until:
                raise error
            # In small steps: a lock or an event is nothing that a signal handler may touch.
            time.sleep(min(0.1, until - now))


def pause(tries: int) -> float:
    """Seconds to wait after so many tries in a row."""
    return float(min(FIRST_PAUSE * 2.0 ** min(tries, 30), LONGEST_PAUSE) * random.uniform(0.5, 1.0))  # noqa: S311
