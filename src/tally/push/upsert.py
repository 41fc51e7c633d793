"""Puts rows into a table of PostgreSQL, SQLite or MariaDB.

What the table holds of an item is replaced by its new rows, in one transaction for each parcel, or for all: so each row
is there once, however often a parcel is delivered. The table is made if there is none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql

from tally.database import foreign
from tally.errors import StorageAwayError, StorageError
from tally.masking import mask
from tally.push import copying
from tally.push.base import KEY, Parcel, Receiver, Refusal
from tally.push.rows import NUMBER, numbers, twice, with_a_type
from tally.push.target import Push
from tally.sinks.columns import json_text, rows_of

LONGEST_KEY = 700
"""Characters: MariaDB indexes no more."""

_KEYS_AT_ONCE = 500
_TRIES = 5
"""How often a transaction is tried that another one got in the way of."""
_TRIES_OF_ITEMS = 3
"""How often, where the table's constraints are against it: that may be for another one's rows, or for good."""

_SYSTEM_COLUMNS = {"postgresql": frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})}
"""Columns that every table has, so that none of these names can be made: the boxes of detectors have two of them."""

_CHECKS = ((4025,), (3819,))
"""MariaDB's and MySQL's codes for a constraint that is not met; their driver takes them for operational errors."""


class _ItemsRefusedError(Exception):
    """The database does not take these values."""


def open_receiver(push: Push, facts: Mapping[str, Any]) -> Receiver:
    """See :mod:`tally.push.factory`."""
    return TableReceiver(push)


class TableReceiver(Receiver):
    """Raises SpecError if its database cannot be meant, or its driver is not installed."""

    def __init__(self, push: Push) -> None:
        assert push.table is not None
        self._name = push.table
        address = push.address()
        self._engine = foreign.engine(address, "push")
        self._shown = f"{foreign.shown(address)}#{self._name}"
        self._table: sa.Table | None = None
        self._begun = self._made = False

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

    def deliver(self, parcel: Parcel, *, confirm: Callable[[], None] = lambda: None) -> list[Refusal]:
        """See :meth:`Receiver.deliver`."""
        refusals: list[Refusal] = []
        keys = parcel.keys
        if max(map(len, keys), default=0) > LONGEST_KEY:
            refusals = [Refusal(key, _LONG) for key in keys if _is_long(key)]
            keys = [key for key in keys if not _is_long(key)]
        table, rows = self._fitted(parcel.rows, alters=True)
        refusals += self._replace(table, keys, rows, confirm)
        self._begun = True
        return refusals

    def deliver_all(
        self, parcels: Callable[[], Iterable[Parcel]], *, confirm: Callable[[], None] = lambda: None
    ) -> None:
        """See :meth:`Receiver.deliver_all`."""

        def change(connection: sa.Connection) -> None:
            for parcel in parcels():
                if long := next(filter(_is_long, parcel.keys), None):
                    raise _ItemsRefusedError(f"{long[:80]}...: {_LONG}")
                # Another connection would wait for this one, which has written to the table.
                table, rows = self._fitted(parcel.rows, alters=False)
                _put(connection, table, parcel.keys, rows)
            confirm()

        try:
            self._transaction(change)
        except _ItemsRefusedError as error:
            raise StorageError(
                f"{self._shown} refuses an item, so that none of them is there: {error}",
                hint="Mend the cause, then resume the job.",
            ) from None
        self._begun = True

    def close(self) -> None:
        """See :meth:`Receiver.close`."""
        self._engine.dispose()

    # -- rows ----------------------------------------------------------------------------------------------------

    def _named(self, rows: pa.Table) -> pa.Table:
        """The rows, with names that columns can have here: ``xmin`` becomes ``xmin_``."""
        taken = _SYSTEM_COLUMNS.get(self._engine.dialect.name, frozenset())
        return rows.rename_columns([f"{name}_" if name in taken else name for name in rows.column_names])

    def _fitted(self, rows: pa.Table, *, alters: bool) -> tuple[sa.Table, pa.Table]:
        """The table, and rows that fit its columns, numbered if it has a column for that."""
        given = with_a_type(self._named(rows))
        table = self._fitting(given.schema, alters=alters)
        shaped = _shaped(given, table, self._shown, self._engine.dialect.name)
        if (longest := pc.max(pc.utf8_length(shaped[KEY])).as_py()) is not None and longest > LONGEST_KEY:
            shaped = shaped.filter(pc.less_equal(pc.utf8_length(shaped[KEY]), LONGEST_KEY))
        if NUMBER in table.columns:
            shaped = shaped.add_column(1, NUMBER, numbers(shaped[KEY]))
        return table, shaped

    def _replace(
        self, table: sa.Table, keys: Sequence[str], rows: pa.Table, confirm: Callable[[], None]
    ) -> list[Refusal]:
        """Replace what the table holds of these items. An item that the database refuses costs itself alone."""

        def change(connection: sa.Connection) -> None:
            _put(connection, table, keys, rows)
            confirm()

        try:
            self._transaction(change)
        except _ItemsRefusedError as error:
            if len(keys) <= 1:
                return [Refusal(key, str(error)) for key in keys]
            half = len(keys) // 2
            return [
                refusal
                for some in (keys[:half], keys[half:])
                for refusal in self._replace(
                    table, some, rows.filter(pc.is_in(rows[KEY], pa.array(some, rows[KEY].type))), confirm
                )
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
                if error.orig is not None and foreign.is_shut_out(error.orig):
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

    # -- the table -----------------------------------------------------------------------------------------------

    def _fitting(self, schema: pa.Schema, *, alters: bool) -> sa.Table:
        """The table, with a column for each of these. Raises StorageError if it is another kind of table.

        alters: whether a table that was made here gets columns of which it was not known before what they hold.
        """
        if self._table is None:
            found: list[sa.Table] = []
            self._transaction(lambda connection: found.append(self._opened(connection, schema)))
            self._table = found[0]
        if alters and self._made and (missing := self._missing(self._table, schema)):

            def add(connection: sa.Connection) -> None:
                for field in missing:
                    connection.execution_options(no_parameters=True).exec_driver_sql(self._added(field))

            self._transaction(add)
            self._table = None
            return self._fitting(schema, alters=False)
        self._check_columns(self._table, schema)
        return self._table

    def _check_columns(self, table: sa.Table, schema: pa.Schema) -> None:
        if missing := self._missing(table, schema):
            lines = "; ".join(map(self._added, missing))
            self._table = None
            raise StorageError(
                f"{self._shown} lacks {', '.join(repr(field.name) for field in missing)}",
                hint=f"Add what is missing, then resume the job: {lines}",
            )

    def _missing(self, table: sa.Table, schema: pa.Schema) -> list[pa.Field]:
        return [field for field in schema if field.name not in table.columns]

    def _added(self, field: pa.Field) -> str:
        return (
            f"ALTER TABLE {self._quoted(self._name)} ADD COLUMN {self._quoted(field.name)} "
            f"{_sql_type(field.type, field.name).compile(self._engine.dialect)}"
        )

    def _check_names(self, schema: pa.Schema) -> None:
        if name := twice(schema.names):
            raise StorageError(
                f"{self._shown}: the results have a column {name!r}, which databases do not tell from another one",
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
        self._made = True
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
                hint="Change its type in the table, then resume the job. Columns that a scorer declares have one type "
                "from the start.",
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
        longest = pc.max(pc.utf8_length(array)).as_py() or 0
        return "longer text" if longest > wanted.length else None
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
        if isinstance(value, float) and bare and not math.isfinite(value):
            if math.isnan(value):
                return None  # neither SQLite nor MariaDB knows NaN
            if dialect != "sqlite":
                raise ValueError(f"column {column.name!r} holds {value}, and {dialect} has no infinity")
        if isinstance(value, str) and isinstance(column.type, (sa.DateTime, sa.Date)):
            raise ValueError(f"column {column.name!r} holds {value}, which is beyond the years 1 to 9999")
        if bare and getattr(value, "tzinfo", None) is not None:
            return value.astimezone(UTC).replace(tzinfo=None)
        if isinstance(column.type, sa.String) and value is not None and not isinstance(value, str):
            return str(value)
        return value

    return plain


def _put(connection: sa.Connection, table: sa.Table, keys: Sequence[str], rows: pa.Table) -> None:
    """Put rows of these items in the place of those that the table holds of them."""
    if connection.dialect.name != "postgresql":
        _remove(connection, table, keys)
        if rows.num_rows:
            plain = {name: _plain_for(table.columns[name], connection.dialect.name) for name in rows.column_names}
            try:
                made = [{name: plain[name](value) for name, value in row.items()} for row in rows_of(rows)]
            except (ValueError, OverflowError) as error:
                raise _ItemsRefusedError(str(error)) from None
            connection.execute(sa.insert(table), made)
        return
    if [column.name for column in table.primary_key] == [KEY, NUMBER] and rows.num_rows:
        single = rows.num_rows == len(keys) and not pc.max(rows[NUMBER]).as_py()
        empty = set() if single else set(keys) - set(rows[KEY].to_pylist())
        # Most rows are new. An item that is there already has a first row, as ours has, and these two collide.
        try:
            with connection.begin_nested():
                copying.copy(connection, table, rows)
                _remove(connection, table, list(empty))
            return
        except sa.exc.IntegrityError:
            pass
    _remove(connection, table, keys)
    if rows.num_rows:
        copying.copy(connection, table, rows)


def _remove(connection: sa.Connection, table: sa.Table, keys: Sequence[str]) -> None:
    exactly = _EXACT.get(connection.dialect.name)
    column = table.c[KEY].collate(exactly) if exactly else table.c[KEY]
    for begin in range(0, len(keys), _KEYS_AT_ONCE):
        connection.execute(sa.delete(table).where(column.in_(keys[begin : begin + _KEYS_AT_ONCE])))


_LONG = f"a key of over {LONGEST_KEY} characters"


def _is_long(key: str) -> bool:
    return len(key) > LONGEST_KEY


def _is_altered(error: sa.exc.DBAPIError) -> bool:
    """Whether SQLite, which calls that an operational error, misses the table or a column of it."""
    return re.match(r"no such (table|column)|table .* has no column", str(error.orig)) is not None


def _reason(error: sa.exc.SQLAlchemyError) -> str:
    cause = getattr(error, "orig", None) or error
    return mask(" ".join(str(cause).split()))


_EXACT = {"sqlite": "BINARY", "mysql": "utf8mb4_bin", "mariadb": "utf8mb4_bin"}
"""Collations by which keys that differ in capitals differ, whatever the column's own is."""
