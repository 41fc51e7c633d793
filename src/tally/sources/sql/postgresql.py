"""Queries of PostgreSQL, by psycopg: a cursor on the server, in a transaction that sees one moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psycopg
import pyarrow as pa
from psycopg.types.string import TextLoader

from tally.database import foreign
from tally.errors import SpecError
from tally.sources.sql.base import BATCH, Column, OpenQuery, as_batch, distinct

if TYPE_CHECKING:
    import sqlalchemy as sa

_TYPES: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int2": pa.int16(),
    "int4": pa.int32(),
    "int8": pa.int64(),
    "oid": pa.uint32(),
    "float4": pa.float32(),
    "float8": pa.float64(),
    "bytea": pa.binary(),
    "date": pa.date32(),
    "time": pa.time64("us"),
    "timestamp": pa.timestamp("us"),
    "timestamptz": pa.timestamp("us", "UTC"),
}
"""What psycopg's values of PostgreSQL's types are. Of all others, the text is taken that PostgreSQL itself writes."""
_IN_ARRAYS = {**_TYPES, **dict.fromkeys(("text", "varchar", "bpchar", "name"), pa.string())}


class _Query(OpenQuery):
    snapshot = "repeatable read: all rows are of one moment"

    def __init__(self, engine: sa.Engine, query: str) -> None:
        self._engine = engine
        self._pooled = engine.raw_connection()
        self._cursor: psycopg.ServerCursor[Any] | None = None
        connection: Any = self._pooled.driver_connection
        try:
            connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
            connection.read_only = True
            connection.execute("SET LOCAL cursor_tuple_fraction = 1.0")  # all rows will be fetched
            self._cursor = connection.cursor(name="tally")
            self._cursor.itersize = BATCH
            self._cursor.execute(query)  # it declares the cursor: nothing runs yet
            if self._cursor.description is None:
                raise SpecError("query: gives no rows")
            self.columns = distinct([_column(self._cursor, each) for each in self._cursor.description])
        except BaseException:
            self.close()
            raise

    def batches(self) -> Iterator[pa.RecordBatch]:
        assert self._cursor is not None
        while rows := self._cursor.fetchmany(BATCH):
            yield as_batch(rows, self.columns)

    def close(self) -> None:
        with suppress(psycopg.Error):
            if self._cursor is not None:
                self._cursor.close()
        self._pooled.invalidate()  # the cursor and the transaction end with it
        self._engine.dispose()


def _column(cursor: psycopg.ServerCursor[Any], found: psycopg.Column) -> Column:
    known = cursor.adapters.types.get(found.type_code)
    name = known.name if known is not None else ""
    if known is not None and known.array_oid == found.type_code and (kind := _IN_ARRAYS.get(name)) is not None:
        return Column(found.name, pa.list_(kind))
    if name == "interval":
        raise SpecError(
            f"query: column {found.name!r} is an interval, and months have no length",
            hint=f"Have it in seconds: extract(epoch FROM {found.name})::float8 AS {found.name}",
        )
    if name == "numeric" and known is not None and known.oid == found.type_code:
        precision, scale = found.precision, found.scale
        if precision is not None and scale is not None and 0 <= scale <= precision <= _MOST_DIGITS:
            kind = pa.decimal128(precision, scale) if precision <= _DIGITS else pa.decimal256(precision, scale)
            return Column(found.name, kind)
        remark = (
            f"{found.name} is numeric without a number of digits, and taken for float64 ({found.name}::numeric(18, 6) "
            "keeps its digits)"
        )
        return Column(found.name, pa.float64(), rounded=True, remark=remark)
    if (kind := _TYPES.get(name)) is not None:
        return Column(found.name, kind)
    cursor.adapters.register_loader(found.type_code, TextLoader)
    return Column(found.name, pa.string())


_DIGITS, _MOST_DIGITS = 38, 76
"""Of Arrow's decimals."""


ERRORS = (psycopg.Error,)


def is_away(error: Exception) -> bool:
    """See :mod:`tally.sources.sql.factory`."""
    # Without a code, there was no connection, or it was lost; 57P: the server is stopped; 53300: it is full.
    code = getattr(error, "sqlstate", None) or ""
    return isinstance(error, psycopg.OperationalError) and (not code or code[:3] == "57P" or code[:2] in ("08", "53"))


def open_query(url: str, query: str) -> OpenQuery:
    """See :mod:`tally.sources.sql.factory`."""
    return _Query(foreign.engine(url, "source"), query)
