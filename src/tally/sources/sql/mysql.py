"""Queries of MariaDB and MySQL, by PyMySQL: rows are sent as they are read, in a transaction that sees one moment."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pymysql
from pymysql.constants import FIELD_TYPE, FLAG
from pymysql.cursors import SSCursor

from tally.database import foreign
from tally.sources.sql.base import BATCH, Column, OpenQuery, as_batch, distinct

_INTEGERS = {
    FIELD_TYPE.TINY: (pa.int8(), pa.uint8()),
    FIELD_TYPE.SHORT: (pa.int16(), pa.uint16()),
    FIELD_TYPE.INT24: (pa.int32(), pa.uint32()),
    FIELD_TYPE.LONG: (pa.int32(), pa.uint32()),
    FIELD_TYPE.LONGLONG: (pa.int64(), pa.uint64()),
    FIELD_TYPE.YEAR: (pa.int16(), pa.int16()),
}
_TYPES = {
    FIELD_TYPE.DOUBLE: pa.float64(),
    FIELD_TYPE.DATE: pa.date32(),
    FIELD_TYPE.NEWDATE: pa.date32(),
    FIELD_TYPE.DATETIME: pa.timestamp("us"),
    FIELD_TYPE.TIMESTAMP: pa.timestamp("us", "UTC"),  # the session's zone is UTC
    FIELD_TYPE.TIME: pa.duration("us"),
    FIELD_TYPE.BIT: pa.binary(),
    FIELD_TYPE.GEOMETRY: pa.binary(),
    FIELD_TYPE.JSON: pa.string(),
    FIELD_TYPE.NULL: pa.null(),
}
_BINARY = 63
"""The number of the character set of what is no text."""
_DIGITS = 38


class _Query(OpenQuery):
    snapshot = "consistent snapshot: all rows of InnoDB's tables are of one moment"

    def __init__(self, url: str, query: str) -> None:
        self._engine = foreign.engine(url, "source")
        self._query = query
        self._pooled = self._engine.raw_connection()
        connection: Any = self._pooled.driver_connection
        self._connection = connection
        try:
            with connection.cursor() as cursor:
                cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ")
                cursor.execute("START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY")
                cursor.execute(f"SELECT * FROM (\n{query}\n) AS rows_of_query LIMIT 0")  # noqa: S608
                # PyMySQL's description of columns leaves out whether they are unsigned, or text.
                self.columns = distinct([_column(each) for each in cursor._result.fields])
                if (table := _TABLE.fullmatch(query)) is not None:
                    self._query = f"SELECT {', '.join(map(_told, self.columns))} FROM {table[1]}"  # noqa: S608
                    self.columns = [each._replace(remark="") for each in self.columns]
        except BaseException:
            self.close()
            raise

    def batches(self) -> Iterator[pa.RecordBatch]:
        cursor: Any = self._connection.cursor(SSCursor)
        cursor.execute(self._query)
        while rows := cursor.fetchmany(BATCH):
            yield as_batch(rows, self.columns)

    def close(self) -> None:
        self._connection._force_close()  # a cursor that is given back would be read to its end first
        self._pooled.invalidate()
        self._engine.dispose()


_TABLE = re.compile(r"SELECT \* FROM ((?:`(?:[^`]|``)+`\.?)+)")


def _told(column: Column) -> str:
    """A column of a table, with all digits: of a FLOAT, the server writes six."""
    name = f"`{column.name.replace('`', '``')}`"
    return f"CAST({name} AS DOUBLE) AS {name}" if pa.types.is_float32(column.kind) else name


def _column(found: Any) -> Column:
    name, code = found.name, found.type_code
    unsigned = bool(found.flags & FLAG.UNSIGNED)
    if code in _INTEGERS:
        return Column(name, _INTEGERS[code][unsigned])
    if code in (FIELD_TYPE.DECIMAL, FIELD_TYPE.NEWDECIMAL):
        # The length is that of the text: with a sign, and a point.
        precision = found.length - (not unsigned) - (found.scale > 0)
        kind = pa.decimal128(precision, found.scale) if precision <= _DIGITS else pa.decimal256(precision, found.scale)
        return Column(name, kind)
    if code == FIELD_TYPE.FLOAT:
        remark = f"{name} is FLOAT, of which the database writes six digits (CAST({name} AS DOUBLE) AS {name} has all)"
        return Column(name, pa.float32(), remark=remark)
    if code in _TYPES:
        return Column(name, _TYPES[code])
    return Column(name, pa.binary() if found.charsetnr == _BINARY else pa.string())


ERRORS = (pymysql.Error,)
_OF_CLIENTS = range(2000, 3000)
"""Codes of errors that the client tells, and not the server: it is away."""
_FULL = 1040


def is_away(error: Exception) -> bool:
    """See :mod:`tally.sources.sql.factory`."""
    code = error.args[0] if error.args else None
    return code in _OF_CLIENTS or code == _FULL


def open_query(url: str, query: str) -> OpenQuery:
    """See :mod:`tally.sources.sql.factory`."""
    return _Query(url, query)
