"""Puts rows into a table of a DuckDB file, which is opened for each transaction and no longer: others can read it
between two of them.

DuckDB keeps every type that results have. What a column of the user's own table would change is found by bringing the
values there and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from tally.database import foreign
from tally.errors import StorageAwayError, StorageError
from tally.push.base import KEY, Parcel, Receiver, Refusal
from tally.push.rows import NUMBER, numbers, twice, with_a_type
from tally.push.target import Push
from tally.sinks.columns import is_fine_interval, replaced
from tally.sql import hide_progress, sql_name


def open_receiver(push: Push, facts: Mapping[str, Any]) -> Receiver:
    """See :mod:`tally.push.factory`."""
    return DuckReceiver(push)


class DuckReceiver(Receiver):
    """See the module."""

    def __init__(self, push: Push) -> None:
        assert push.table is not None
        address = push.address()
        self._path, self._name = foreign.file_of(address), push.table
        self._table = ".".join(map(sql_name, push.table.split(".")))
        self._shown = f"{address}#{push.table}"
        self._begun = self._made = False

    def check(self, schema: pa.Schema | None, *, begun: bool) -> None:
        """See :meth:`Receiver.check`."""
        self._begun = begun

        def look(connection: duckdb.DuckDBPyConnection) -> None:
            if schema is not None:
                self._fitting(connection, _with_whole_intervals(schema.empty_table()), make=False)

        self._transaction(look)

    def deliver(self, parcel: Parcel, *, confirm: Callable[[], None] = lambda: None) -> list[Refusal]:
        """See :meth:`Receiver.deliver`. An item that a constraint of the table is against costs itself alone."""
        try:
            self.deliver_all(lambda: [parcel], confirm=confirm)
        except _ItemsRefusedError as error:
            if len(parcel.keys) <= 1:
                return [Refusal(key, error.message) for key in parcel.keys]
            half = len(parcel.keys) // 2
            return [
                refusal
                for some in (parcel.keys[:half], parcel.keys[half:])
                for refusal in self.deliver(
                    Parcel(parcel.name, some, parcel.rows.filter(pc.is_in(parcel.rows[KEY], pa.array(some)))),
                    confirm=confirm,
                )
            ]
        return []

    def deliver_all(
        self, parcels: Callable[[], Iterable[Parcel]], *, confirm: Callable[[], None] = lambda: None
    ) -> None:
        """See :meth:`Receiver.deliver_all`."""

        def change(connection: duckdb.DuckDBPyConnection) -> None:
            for parcel in parcels():
                self._put(connection, parcel)
            confirm()

        self._transaction(change)
        self._begun = True

    def close(self) -> None:
        """See :meth:`Receiver.close`."""

    def _put(self, connection: duckdb.DuckDBPyConnection, parcel: Parcel) -> None:
        rows = with_a_type(_with_whole_intervals(parcel.rows))
        columns = self._fitting(connection, rows, make=True)
        if NUMBER in columns:
            rows = rows.append_column(NUMBER, numbers(rows[KEY]))
        connection.register("given_keys", pa.table({KEY: pa.array(parcel.keys, pa.string())}))
        connection.register("given", rows)
        connection.execute(f"DELETE FROM {self._table} WHERE key IN (SELECT key FROM given_keys)")  # noqa: S608
        names = ", ".join(map(sql_name, rows.column_names))
        connection.execute(f"INSERT INTO {self._table} ({names}) SELECT {names} FROM given")  # noqa: S608

    def _fitting(self, connection: duckdb.DuckDBPyConnection, rows: pa.Table, *, make: bool) -> Mapping[str, str]:
        """The columns of the table, by name, each with its type. Raises StorageError if rows do not fit there.

        make: whether to make the table if there is none.
        """
        if name := twice(rows.column_names):
            raise StorageError(
                f"{self._shown}: the results have a column {name!r}, which databases do not tell from another one",
                hint="Rename it, or leave it out.",
            )
        if (columns := self._columns(connection)) is None:
            if self._begun:
                raise StorageError(
                    f"{self._shown} is not there any more, and rows of this job had arrived in it",
                    hint="If it was renamed or moved, bring it back, then resume the job. To fill a new table, score "
                    "again from the start.",
                )
            if not make:
                return {}
            connection.register("given", rows.append_column(NUMBER, numbers(rows[KEY])).slice(0, 0))
            others = "".join(f", {sql_name(name)}" for name in rows.column_names if name != KEY)
            connection.execute(f"CREATE TABLE {self._table} AS SELECT key, {NUMBER}{others} FROM given")  # noqa: S608
            columns = self._columns(connection)
            assert columns is not None
            self._made = True
        if KEY not in columns:
            raise StorageError(
                f"{self._shown} has no column {KEY!r}, which says whose a row is",
                hint="Give a table that has one, or the name of a table that is not there: it is made.",
            )
        connection.register("given", rows)
        given = self._described(connection, "SELECT * FROM given")
        if missing := [name for name in given if name not in columns]:
            lines = "; ".join(f"ALTER TABLE {self._table} ADD COLUMN {sql_name(n)} {given[n]}" for n in missing)
            if self._made and make:
                connection.execute(lines)
                return self._fitting(connection, rows, make=make)
            raise StorageError(
                f"{self._shown} lacks {', '.join(map(repr, missing))}",
                hint=f"Add what is missing, then resume the job: {lines}",
            )
        for name, kind in given.items():
            if columns[name] != kind and rows.num_rows:
                self._check_kept(connection, name, kind, columns[name])
        return columns

    def _check_kept(self, connection: duckdb.DuckDBPyConnection, name: str, kind: str, wanted: str) -> None:
        column = sql_name(name)
        lost = connection.execute(
            f"SELECT {column}::VARCHAR FROM given WHERE {column} IS NOT NULL "  # noqa: S608
            f"AND try_cast(try_cast({column} AS {wanted}) AS {kind}) IS DISTINCT FROM {column} LIMIT 1"
        ).fetchone()
        if lost is not None:
            raise StorageError(
                f"{self._shown}: column {name!r} is {wanted} there, and the results hold {lost[0]!r}, a {kind}",
                hint="Change its type in the table, then resume the job. Columns that a scorer declares have one type "
                "from the start.",
            )

    def _columns(self, connection: duckdb.DuckDBPyConnection) -> Mapping[str, str] | None:
        """The columns of the table and their types; None if there is no table."""
        schema, _, name = self._name.rpartition(".")
        found = connection.execute(
            "SELECT column_name, data_type FROM duckdb_columns() WHERE database_name = current_database() "
            "AND lower(schema_name) = lower(?) AND lower(table_name) = lower(?) ORDER BY column_index",
            [schema or "main", name],
        ).fetchall()
        return dict(found) or None

    @staticmethod
    def _described(connection: duckdb.DuckDBPyConnection, query: str) -> Mapping[str, str]:
        return {row[0]: row[1] for row in connection.execute(f"DESCRIBE {query}").fetchall()}

    def _transaction(self, change: Callable[[duckdb.DuckDBPyConnection], None]) -> None:
        try:
            with duckdb.connect(self._path) as connection:
                hide_progress(connection)
                connection.execute("SET enable_external_access = false; SET TimeZone = 'UTC'; BEGIN")
                change(connection)
                connection.execute("COMMIT")
        except duckdb.ConstraintException as error:
            raise _ItemsRefusedError(f"{self._shown} refuses an item: {_line(error)}") from None
        except (duckdb.IOException, duckdb.ConnectionException) as error:
            # Another process has it open, or this one has, to read from it.
            raise StorageAwayError(f"{self._shown}: {_line(error)}") from None
        except duckdb.Error as error:
            raise StorageError(
                f"{self._shown} takes no rows: {_line(error)}", hint="Mend that, then resume the job."
            ) from None


def _with_whole_intervals(rows: pa.Table) -> pa.Table:
    """The rows with intervals in nanoseconds as whole numbers: DuckDB's have microseconds."""
    fields = [field.with_type(replaced(field.type, _whole)) for field in rows.schema]
    return rows.cast(pa.schema(fields))


def _whole(kind: pa.DataType) -> pa.DataType:
    return pa.int64() if is_fine_interval(kind) else kind


class _ItemsRefusedError(StorageError):
    """A constraint of the table is against these values."""


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
