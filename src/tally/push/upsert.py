"""Puts rows into a table of PostgreSQL, SQLite or MariaDB.

What the table holds of an item is replaced by its new rows, in one transaction for each parcel: so each row is there
once, however often a parcel is delivered. The table is made if there is none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC
from typing import Any

import pyarrow as pa
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from tally import network
from tally.errors import SpecError, StorageAwayError, StorageError
from tally.masking import mask
from tally.push.base import KEY, Parcel, Receiver, Refusal
from tally.push.target import DATABASES, Push
from tally.sinks.columns import json_text, rows_of

NUMBER = "item_row"
"""The column that numbers the rows of one item, from 0."""

LONGEST_KEY = 700
"""Characters: MariaDB indexes no more."""

_KEYS_AT_ONCE = 500
_TRIES = 5
"""How often a transaction is tried that another one got in the way of."""
_TRIES_OF_ITEMS = 3
"""How often, where the table's constraints are against it: that may be for another one's rows, or for good."""

_EXTRAS = {"postgresql": "postgres", "mysql": "mariadb", "mariadb": "mariadb"}


_SYSTEM_COLUMNS = {"postgresql": frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})}
"""Columns that every table has, so that none of these names can be made: the boxes of detectors have two of them."""

_SHUT_OUT = re.compile(
    r'(database|role) ".*" does not exist|authentication failed|no pg_hba\.conf entry|no password supplied', re.DOTALL
)
"""How PostgreSQL refuses a connection for good. Its driver has no code for that, only the server's own words."""
_SHUT_OUT_CODES = (1044, 1045, 1049, 1698)
"""How MariaDB and MySQL do: access denied, no such database."""

_CHECKS = ((4025,), (3819,))
"""MariaDB's and MySQL's codes for a constraint that is not met; their driver takes them for operational errors."""


class _ItemsRefusedError(Exception):
    """The database does not take these values."""


class TableReceiver(Receiver):
    """Raises SpecError if its database cannot be meant, or its driver is not installed."""

    def __init__(self, push: Push) -> None:
        assert push.table is not None
        self._name = push.table
        address = push.address()
        try:
            url = sa.make_url(address)
        except (sa.exc.ArgumentError, ValueError):
            raise SpecError("push: the database's URL cannot be understood") from None
        if url.drivername not in DATABASES:
            raise SpecError(f"push: {url.drivername}:// is no database that rows can go into")
        self._shown = f"{mask(url.render_as_string(hide_password=True))}#{self._name}"
        try:
            self._engine = sa.create_engine(url.set(drivername=DATABASES[url.drivername]), pool_pre_ping=True)
        except ImportError:
            extra = _EXTRAS.get(url.drivername, "postgres")
            raise SpecError(
                f"push: {url.drivername}:// needs a driver", hint=f"pip install 'tally-scoring[{extra}]'"
            ) from None
        sa.event.listen(self._engine, "do_connect", self._connected)
        if (exactly := _SESSIONS.get(self._engine.dialect.name)) is not None:
            sa.event.listen(self._engine, "connect", exactly)
        self._table: sa.Table | None = None
        self._begun = False

    def _connected(self, dialect: sa.Dialect, record: Any, args: Any, options: dict[str, Any]) -> Any:
        """A connection to an address that was checked, where not all may be connected to; None leaves it to SQLAlchemy.

        Raises StorageError, StorageAwayError.
        """
        host = options.get("host")
        if host is None or network.is_allowed(host):
            return None
        try:
            if dialect.name == "postgresql":
                options["hostaddr"] = network.addresses(host, int(options.get("port", 5432)))[0]
                return None
            made = dialect.loaded_dbapi.connect(**options, defer_connect=True)
            made.connect(network.create_connection((made.host, made.port), made.connect_timeout))
        except network.PrivateAddressError as error:
            raise StorageError(f"{self._shown} may not be connected to: {error.strerror}") from None
        except OSError as error:
            raise StorageAwayError(f"{self._shown} does not answer: {error}") from None
        return made

    def check(self, schema: pa.Schema | None, *, begun: bool) -> None:
        """See :meth:`Receiver.check`."""
        self._begun = begun
        found: list[sa.Table | None] = []
        self._transaction(lambda connection: found.append(self._found(connection)))
        self._table = found[0]
        if schema is None:
            return
        schema = self._named(schema.empty_table()).schema
        self._check_names(schema)
        if self._table is not None:
            self._check_columns(self._table, schema)
            _shaped(schema.empty_table(), self._table, self._shown, self._engine.dialect.name)

    def deliver(self, parcel: Parcel) -> list[Refusal]:
        """See :meth:`Receiver.deliver`."""
        refusals = [Refusal(key, f"a key of over {LONGEST_KEY} characters") for key in parcel.keys if _is_long(key)]
        keys = [key for key in parcel.keys if not _is_long(key)]
        given = self._named(parcel.rows)
        table = self._fitting(given.schema)
        rows = [row for row in self._rows(given, table) if not _is_long(row[KEY])]
        refusals += self._replace(table, keys, rows)
        self._begun = True
        return refusals

    def close(self) -> None:
        """See :meth:`Receiver.close`."""
        self._engine.dispose()

    # -- rows ----------------------------------------------------------------------------------------------------

    def _named(self, rows: pa.Table) -> pa.Table:
        """The rows, with names that columns can have here: ``xmin`` becomes ``xmin_``."""
        taken = _SYSTEM_COLUMNS.get(self._engine.dialect.name, frozenset())
        return rows.rename_columns([f"{name}_" if name in taken else name for name in rows.column_names])

    def _replace(self, table: sa.Table, keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Refusal]:
        """Replace what the table holds of these items. An item that the database refuses costs itself alone."""
        try:
            self._transaction(lambda connection: _put(connection, table, keys, rows))
        except _ItemsRefusedError as error:
            if len(keys) <= 1:
                return [Refusal(key, str(error)) for key in keys]
            half = len(keys) // 2
            return [
                refusal
                for some in (keys[:half], keys[half:])
                for refusal in self._replace(table, some, [row for row in rows if row[KEY] in set(some)])
            ]
        return []

    def _transaction(self, change: Callable[[sa.Connection], None]) -> None:
        """Raises _ItemsRefusedError where the database does not take these values, StorageAwayError where it does not
        answer, StorageError where it takes nothing."""
        for tries in range(_TRIES):
            try:
                with self._engine.begin() as connection:
                    change(connection)
                return
            except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
                if _is_altered(error):
                    raise self._unfit(error) from None
                if _is_shut_out(error):
                    raise StorageError(
                        f"{self._shown} does not let us in: {_reason(error)}",
                        hint="Check the database's name, the user and the password, then resume the job.",
                    ) from None
                if error.orig is not None and error.orig.args[:1] in _CHECKS:
                    raise _ItemsRefusedError(_reason(error)) from None
                # Locked, deadlocked, or away: what lasts is told as away.
                if tries == _TRIES - 1 or error.connection_invalidated:
                    raise StorageAwayError(f"{self._shown}: {_reason(error)}") from None
            except sa.exc.ProgrammingError as error:
                raise self._unfit(error) from None
            except sa.exc.IntegrityError as error:
                # Another job, or a process of this one that was killed, has put rows of these items there since ours
                # were removed: the next try removes those.
                if tries >= _TRIES_OF_ITEMS - 1:
                    raise _ItemsRefusedError(_reason(error)) from None
            except sa.exc.StatementError as error:
                raise _ItemsRefusedError(_reason(error)) from None

    def _unfit(self, error: sa.exc.DBAPIError) -> StorageError:
        self._table = None  # it may have been changed
        return StorageError(f"{self._shown} takes no rows: {_reason(error)}", hint="Mend that, then resume the job.")

    def _rows(self, given: pa.Table, table: sa.Table) -> Iterator[dict[str, Any]]:
        numbers: dict[str, int] = {}
        plain = [(column.name, _plain_for(column, self._engine.dialect.name)) for column in table.columns]
        names = set(given.column_names)
        for row in rows_of(_shaped(given, table, self._shown, self._engine.dialect.name)):
            number = numbers[row[KEY]] = numbers.get(row[KEY], -1) + 1
            made = {name: convert(row[name]) for name, convert in plain if name in names}
            yield {**made, NUMBER: number} if NUMBER in table.columns else made

    # -- the table -----------------------------------------------------------------------------------------------

    def _fitting(self, schema: pa.Schema) -> sa.Table:
        """The table, with a column for each of these. Raises StorageError if it is another kind of table."""
        if self._table is None:
            found: list[sa.Table] = []
            self._transaction(lambda connection: found.append(self._opened(connection, schema)))
            self._table = found[0]
        self._check_columns(self._table, schema)
        return self._table

    def _check_columns(self, table: sa.Table, schema: pa.Schema) -> None:
        missing = [field for field in schema if field.name not in table.columns]
        if missing:
            lines = "; ".join(
                f"ALTER TABLE {self._quoted(self._name)} ADD COLUMN {self._quoted(field.name)} "
                f"{_sql_type(field.type, field.name).compile(self._engine.dialect)}"
                for field in missing
            )
            self._table = None
            raise StorageError(
                f"{self._shown} lacks {', '.join(repr(field.name) for field in missing)}",
                hint=f"Add what is missing, then resume the job: {lines}",
            )

    def _check_names(self, schema: pa.Schema) -> None:
        if twice := _twice(schema.names, [NUMBER]):
            raise StorageError(
                f"{self._shown}: the results have a column {twice!r}, which databases do not tell from another one",
                hint="Rename it, or leave it out.",
            )

    def _opened(self, connection: sa.Connection, schema: pa.Schema) -> sa.Table:
        """The table, which is made if there was none from the beginning."""
        self._check_names(schema)
        if (found := self._found(connection)) is not None:
            return found
        schema_name, _, name = self._name.rpartition(".")
        columns = [sa.Column(field.name, _sql_type(field.type, field.name)) for field in schema if field.name != KEY]
        made = sa.Table(
            name,
            sa.MetaData(),
            sa.Column(KEY, _KEY_TYPE, primary_key=True),
            sa.Column(NUMBER, sa.Integer, primary_key=True, autoincrement=False),
            *columns,
            schema=schema_name or None,
        )
        made.create(connection, checkfirst=True)
        found = self._found(connection)
        assert found is not None
        return found

    def _found(self, connection: sa.Connection) -> sa.Table | None:
        """The table; None if it is to be made. Raises StorageError for another kind of table, and where it has gone."""
        schema_name, _, name = self._name.rpartition(".")
        if not sa.inspect(connection).has_table(name, schema=schema_name or None):
            if self._begun:
                raise StorageError(
                    f"{self._shown} is not there any more, and rows of this job had arrived in it",
                    hint="If it was renamed or moved, bring it back, then resume the job. To fill a new table, score "
                    "again from the start.",
                )
            return None
        found = sa.Table(name, sa.MetaData(), autoload_with=connection, schema=schema_name or None)
        for column in found.columns:
            if isinstance(column.type, sa.JSON):
                column.type.none_as_null = True
        if KEY not in found.columns:
            raise StorageError(
                f"{self._shown} has no column {KEY!r}, which says whose a row is",
                hint="Give a table that has one, or the name of a table that is not there: it is made.",
            )
        return found

    def _quoted(self, name: str) -> str:
        return self._engine.dialect.identifier_preparer.quote(name)


def _twice(names: Sequence[str], more: Sequence[str]) -> str | None:
    """A name that differs from another one in capitals only, or is one of Tally's own."""
    seen = {name.casefold() for name in more}
    for name in names:
        if name.casefold() in seen:
            return name
        seen.add(name.casefold())
    return None


_KEY_TYPE = sa.Text().with_variant(
    mysql.VARCHAR(LONGEST_KEY, charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb"
)
_TEXT = sa.Text().with_variant(mysql.LONGTEXT(charset="utf8mb4", collation="utf8mb4_bin"), "mysql", "mariadb")
_BYTES = sa.LargeBinary().with_variant(mysql.LONGBLOB(), "mysql", "mariadb")
_JSON = sa.Text().with_variant(postgresql.JSONB(), "postgresql").with_variant(mysql.LONGTEXT(), "mysql", "mariadb")


def _sql_type(kind: pa.DataType, name: str) -> sa.types.TypeEngine[Any]:
    """The type of a new table's column."""
    types = pa.types
    if name == KEY:
        return _KEY_TYPE
    if types.is_boolean(kind):
        return sa.Boolean()
    if types.is_uint64(kind):
        return sa.Numeric(20, 0).with_variant(sa.Text(), "sqlite")
    if types.is_integer(kind) or types.is_duration(kind):
        return sa.BigInteger()
    if types.is_floating(kind):
        return sa.Double()
    if types.is_decimal(kind):
        # SQLite would keep a float64.
        return sa.Numeric(kind.precision, kind.scale).with_variant(sa.Text(), "sqlite")
    if types.is_timestamp(kind):
        zoned = kind.tz is not None
        return sa.DateTime(timezone=zoned).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    if types.is_date(kind):
        return sa.Date()
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return _BYTES
    if types.is_nested(kind):
        return _JSON
    return _TEXT


_BYTES_TYPES = (sa.LargeBinary, sa.BINARY, sa.VARBINARY, mysql.TINYBLOB, mysql.MEDIUMBLOB, mysql.LONGBLOB)
_ALIKE: tuple[tuple[Callable[[pa.DataType], bool], tuple[type, ...]], ...] = (
    (pa.types.is_boolean, (sa.Boolean, sa.Integer)),
    (pa.types.is_uint64, (sa.Numeric, sa.String)),
    (pa.types.is_integer, (sa.Integer, sa.Numeric)),
    (pa.types.is_floating, (sa.Float,)),
    (pa.types.is_decimal, (sa.Numeric, sa.String)),
    (pa.types.is_timestamp, (sa.DateTime,)),
    (pa.types.is_date, (sa.Date,)),
    (pa.types.is_binary, _BYTES_TYPES),
    (pa.types.is_nested, (sa.JSON, sa.String)),
    (lambda kind: True, (sa.String, sa.Uuid, sa.Enum)),
)
"""Which columns of a table hold values of an Arrow type; the first that fits counts."""


def _shaped(given: pa.Table, table: sa.Table, shown: str, dialect: str) -> pa.Table:
    """The rows as they fit the table's columns. Raises StorageError where a column would change what it gets."""
    arrays = []
    for name in given.column_names:
        array, wanted = given[name], table.columns[name].type
        if pa.types.is_duration(array.type):
            array = array.cast(pa.int64())  # no two databases have the same intervals: they are counted in their unit
        if pa.types.is_timestamp(array.type) and array.type.unit == "ns":
            try:
                array = array.cast(pa.timestamp("us", array.type.tz))
            except pa.ArrowInvalid:
                raise StorageError(
                    f"{shown}: column {name!r} holds nanoseconds, and no database keeps those",
                    hint="Round them, or leave the column out.",
                ) from None
        if not pa.types.is_null(array.type) and (why := _misfit(array, wanted, dialect)):
            raise StorageError(
                f"{shown}: column {name!r} is {wanted} there, and the results hold {why}",
                hint="Change its type in the table, then resume the job.",
            )
        arrays.append(array)
    return pa.table(arrays, names=given.column_names)


def _misfit(array: pa.ChunkedArray, wanted: sa.types.TypeEngine[Any], dialect: str) -> str | None:
    """What the values are, if a column of this type would not take them, or would change them."""
    kind, types = array.type, pa.types
    if not isinstance(wanted, next(fits for test, fits in _ALIKE if test(kind))):
        return str(kind)
    if isinstance(wanted, sa.Float):
        single = dialect != "sqlite" and isinstance(wanted, (sa.REAL, mysql.FLOAT))
        return str(kind) if not types.is_floating(kind) or (single and types.is_float64(kind)) else None
    if isinstance(wanted, sa.Numeric):  # which SQLite keeps as a float64
        scale = kind.scale if types.is_decimal(kind) else 0
        cut = wanted.scale is not None and wanted.scale < scale
        return str(kind) if dialect == "sqlite" or cut else None
    if isinstance(wanted, sa.DateTime):
        if dialect == "postgresql" and wanted.timezone != (kind.tz is not None):
            return "times with a zone" if kind.tz is not None else "times without a zone"
        digits = getattr(wanted, "fsp", None) or 0 if dialect != "postgresql" else getattr(wanted, "precision", None)
        if dialect != "sqlite" and digits is not None and digits < 6 and not _whole_seconds(array):
            return "fractions of seconds"
    if isinstance(wanted, sa.String) and wanted.length is not None and types.is_string(kind):
        import pyarrow.compute as pc

        if (pc.max(pc.utf8_length(array)).as_py() or 0) > wanted.length:
            return "longer text"
    return None


def _whole_seconds(array: pa.ChunkedArray) -> bool:
    try:
        array.cast(pa.timestamp("s", array.type.tz))
    except pa.ArrowInvalid:
        return False
    return True


def _plain_for(column: sa.Column[Any], dialect: str) -> Callable[[Any], Any]:
    """What makes a value one that the column takes."""
    if isinstance(column.type, sa.JSON):
        return lambda value: None if value is None else json.loads(json_text(value))
    bare = dialect != "postgresql"

    def plain(value: Any) -> Any:
        if isinstance(value, (list, dict, tuple)):
            return json_text(value)
        if isinstance(value, float) and bare and math.isnan(value):
            return None  # neither SQLite nor MariaDB knows NaN
        if bare and getattr(value, "tzinfo", None) is not None:
            return value.astimezone(UTC).replace(tzinfo=None)
        if isinstance(column.type, sa.String) and value is not None and not isinstance(value, str):
            return str(value)
        return value

    return plain


def _put(connection: sa.Connection, table: sa.Table, keys: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    exactly = _EXACT.get(connection.dialect.name)
    column = table.c[KEY].collate(exactly) if exactly else table.c[KEY]
    for begin in range(0, len(keys), _KEYS_AT_ONCE):
        connection.execute(sa.delete(table).where(column.in_(keys[begin : begin + _KEYS_AT_ONCE])))
    if rows:
        connection.execute(sa.insert(table), list(rows))


def _is_long(key: str) -> bool:
    return len(key) > LONGEST_KEY


def _is_altered(error: sa.exc.DBAPIError) -> bool:
    """Whether SQLite, which calls that an operational error, misses the table or a column of it."""
    return re.match(r"no such (table|column)|table .* has no column", str(error.orig)) is not None


def _is_shut_out(error: sa.exc.DBAPIError) -> bool:
    """Whether the server answers, and refuses to connect us: waiting would not help."""
    told = getattr(error.orig, "args", ())
    return told[:1] in [(code,) for code in _SHUT_OUT_CODES] or _SHUT_OUT.search(str(error.orig)) is not None


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    cause = getattr(error, "orig", None) or error
    return mask(" ".join(str(cause).split()))


_EXACT = {"sqlite": "BINARY", "mysql": "utf8mb4_bin", "mariadb": "utf8mb4_bin"}
"""Collations by which keys that differ in capitals differ, whatever the column's own is."""


def _in_utc(connection: Any, record: Any) -> None:
    """Have PostgreSQL keep times as they are, whatever the zone of the session would be."""
    with connection.cursor() as cursor:
        cursor.execute("SET TIME ZONE 'UTC'")
    connection.commit()


def _strictly(connection: Any, record: Any) -> None:
    """Have MariaDB refuse what it would otherwise cut."""
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION sql_mode = 'TRADITIONAL', time_zone = '+00:00'")


_SESSIONS = {"postgresql": _in_utc, "mysql": _strictly, "mariadb": _strictly}
"""What a new connection is told first."""
