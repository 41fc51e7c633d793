"""Rows into PostgreSQL by ``COPY``, several times as fast as by ``INSERT``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import sqlalchemy as sa

from tally.sinks.columns import json_text

_ROWS = 8_192
"""Rows that become CSV at once: few enough that the server reads some while others are made."""


def copy(connection: sa.Connection, table: sa.Table, rows: pa.Table) -> None:
    """Copy rows into a table, whose columns have these names and take these values. Raises SQLAlchemy's errors."""
    quote = connection.dialect.identifier_preparer
    names = ", ".join(quote.quote(name) for name in rows.column_names)
    statement = f"COPY {quote.format_table(table)} ({names}) FROM STDIN (FORMAT csv)"
    driver: Any = connection.connection.driver_connection
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as target:
            for piece in _pieces(rows, table):
                target.write(piece)
    except connection.dialect.loaded_dbapi.Error as error:
        raise sa.exc.DBAPIError.instance(
            statement, None, error, connection.dialect.loaded_dbapi.Error, dialect=connection.dialect
        ) from None


def _pieces(rows: pa.Table, table: sa.Table) -> Iterator[memoryview]:
    options = pc.WriteOptions(include_header=False, quoting_style="needed")  # all text is quoted, and NULL is not
    written = {name: _writer(rows[name].type, table.columns[name]) for name in rows.column_names}
    for start in range(0, rows.num_rows, _ROWS):
        part = rows.slice(start, _ROWS)
        arrays = [part[name] if write is None else write(part[name]) for name, write in written.items()]
        out = pa.BufferOutputStream()
        pc.write_csv(pa.table(arrays, names=rows.column_names), out, options)
        yield memoryview(out.getvalue())


def _writer(kind: pa.DataType, column: sa.Column[Any]) -> Callable[[Any], Any] | None:
    """What makes texts of values that Arrow does not write as PostgreSQL reads them; None where there is nothing to
    do."""
    types = pa.types
    if isinstance(column.type, sa.JSON) or types.is_nested(kind):
        return _as(json_text)
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return _as(lambda value: f"\\x{value.hex()}")
    if types.is_dictionary(kind):
        return lambda values: values.cast(kind.value_type)
    if types.is_timestamp(kind) and kind.tz is not None:
        # Arrow writes no offset: the session's zone is UTC.
        return lambda values: values.cast(pa.timestamp(kind.unit, "UTC")).cast(pa.timestamp(kind.unit))
    if types.is_float16(kind):
        return lambda values: values.cast(pa.float32())
    return None


def _as(text: Callable[[Any], str]) -> Callable[[Any], pa.Array]:
    return lambda values: pa.array(
        [None if value is None else text(value) for value in values.to_pylist()], pa.string()
    )
