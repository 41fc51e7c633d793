"""Queries of SQLite's files.

SQLite's columns hold values of any type. A column of a table is taken for what it was declared as, and of an
expression, all values are looked at.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from tally.database import foreign
from tally.errors import SourceNotFoundError, SpecError
from tally.sources.sql.base import BATCH, Column, OpenQuery, as_batch, as_float, distinct, misfit
from tally.sql import sql_name

_VIEW = "rows_of_query"
_DECLARED: tuple[tuple[str, pa.DataType], ...] = (
    ("BOOL", pa.bool_()),
    ("INT", pa.int64()),
    ("DATETIME", pa.timestamp("us")),
    ("TIMESTAMP", pa.timestamp("us")),
    ("DATE", pa.date32()),
    ("TIME", pa.time64("us")),
    ("CHAR", pa.string()),
    ("CLOB", pa.string()),
    ("TEXT", pa.string()),
    ("JSON", pa.string()),
    ("UUID", pa.string()),
    ("BLOB", pa.binary()),
    ("REAL", pa.float64()),
    ("FLOA", pa.float64()),
    ("DOUB", pa.float64()),
)
"""What a declared type that has this in it is; the first that fits counts."""
_DECIMAL = re.compile(r"(?:DEC|NUMERIC)\w*\s*\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)")
_TIME = "'[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9][ T][0-9][0-9]:[0-9][0-9]*'"
_ZONES = ("'*Z'", "'*[+-][0-9][0-9]:[0-9][0-9]'", "'*:*[+-][0-9][0-9][0-9][0-9]'", "'*:*[+-][0-9][0-9]'")
"""How a time ends that has a zone."""
_FINER = re.compile(r"[.,]\d{6}\d*[1-9]")
"""Digits beyond microseconds, which Python would cut off."""
_Moment = TypeVar("_Moment", datetime, time)
_STORED = {"integer": pa.int64(), "real": pa.float64(), "text": pa.string(), "blob": pa.binary()}


class _Query(OpenQuery):
    snapshot = "one transaction: all rows are of one moment"

    def __init__(self, path: str, query: str) -> None:
        if not Path(path).is_file():
            raise SourceNotFoundError(f"there is no file {path}", hint=f"It is looked for in {Path.cwd()}.")
        self._query = query
        self._connection = sqlite3.connect(
            f"{Path(path).absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=30
        )
        try:
            self._connection.set_authorizer(_no_other_files)
            self._connection.execute("BEGIN")
            self._connection.execute(f"CREATE TEMP VIEW {_VIEW} AS\n{query}")
            names = [
                each[0] for each in self._connection.execute(query).description
            ]  # of a view, they are made distinct
            distinct([Column(name, pa.null()) for name in names])
            declared = self._connection.execute(f"PRAGMA table_info({_VIEW})").fetchall()
            self.columns = [self._column(each[1], each[2].upper()) for each in declared]
            self._made = [_converter(each) for each in self.columns]
        except BaseException:
            self.close()
            raise

    def _column(self, name: str, declared: str) -> Column:
        if (found := _DECIMAL.search(declared)) and int(found[1]) <= 38:
            return Column(name, pa.decimal128(int(found[1]), int(found[2] or 0)))
        kind = next((kind for word, kind in _DECLARED if word in declared), None)
        if kind is None:
            kind = self._seen(name)
        if kind == pa.timestamp("us") or (not declared and kind == pa.string()):
            kind = self._times(name, kind)
        return Column(name, kind)

    def _seen(self, name: str) -> pa.DataType:
        """The type of all values of a column that says none."""
        found = self._connection.execute(f"SELECT DISTINCT typeof({sql_name(name)}) FROM {_VIEW}")  # noqa: S608
        kinds = {each for (each,) in found} - {"null"}
        if kinds == {"integer", "real"}:
            return pa.float64()
        if len(kinds) > 1:
            raise SpecError(
                f"query: column {name!r} holds values of several types: {', '.join(sorted(kinds))}",
                hint=f"Say which it is: CAST({name} AS REAL) AS {name}",
            )
        return _STORED[kinds.pop()] if kinds else pa.null()

    def _times(self, name: str, kind: pa.DataType) -> pa.DataType:
        """The type of a column of texts that may all be times, with a zone or without."""
        column = sql_name(name)
        zones = " OR ".join(f"{column} GLOB {each}" for each in _ZONES)
        there, times, zoned = self._connection.execute(
            f"SELECT count({column}), total({column} GLOB {_TIME}), "  # noqa: S608
            f"total({column} GLOB {_TIME} AND ({zones})) FROM {_VIEW}"
        ).fetchone()
        if not there or times < there:
            return kind
        if 0 < zoned < there:
            raise SpecError(f"query: some times of column {name!r} have a zone, and others have none")
        return pa.timestamp("us", "UTC") if zoned else pa.timestamp("us")

    def batches(self) -> Iterator[pa.RecordBatch]:
        cursor = self._connection.execute(f"SELECT * FROM {_VIEW}")  # noqa: S608
        while rows := cursor.fetchmany(BATCH):
            if any(self._made):
                rows = list(
                    zip(
                        *(
                            values if make is None else [None if each is None else make(each) for each in values]
                            for values, make in zip(zip(*rows, strict=True), self._made, strict=True)
                        ),
                        strict=True,
                    )
                )
            yield as_batch(rows, self.columns)

    def close(self) -> None:
        self._connection.close()


def _converter(column: Column) -> Callable[[Any], Any] | None:
    """What makes the values of a type that SQLite does not have; None where there is nothing to make."""
    kind = column.kind
    if pa.types.is_boolean(kind):
        return lambda value: bool(value) if value in (0, 1) else value
    if pa.types.is_float64(kind):
        return _parsed(column, lambda value: as_float(value) if isinstance(value, int) else value)
    if pa.types.is_decimal(kind):
        return _parsed(column, lambda value: Decimal(str(value)))
    if pa.types.is_timestamp(kind):
        return _parsed(column, lambda value: _exact(datetime.fromisoformat(value), value, zoned=kind.tz is not None))
    if pa.types.is_date(kind):
        return _parsed(column, date.fromisoformat)
    if pa.types.is_time(kind):
        return _parsed(column, lambda value: _exact(time.fromisoformat(value), value, zoned=False))
    return None


def _exact(moment: _Moment, text: str, *, zoned: bool) -> _Moment:
    """The time. Raises ValueError if its column's type would not tell its zone, or its last digits."""
    if (moment.tzinfo is not None) != zoned or _FINER.search(text):
        raise ValueError(text)
    return moment


def _parsed(column: Column, parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def made(value: Any) -> Any:
        try:
            return parse(value)
        except (ValueError, TypeError, ArithmeticError):
            raise misfit(column, value) from None

    return made


def _no_other_files(action: int, *_: Any) -> int:
    return sqlite3.SQLITE_DENY if action in (sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH) else sqlite3.SQLITE_OK


ERRORS = (sqlite3.Error,)


def is_away(error: Exception) -> bool:
    """See :mod:`tally.sources.sql.factory`."""
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


def open_query(url: str, query: str) -> OpenQuery:
    """See :mod:`tally.sources.sql.factory`."""
    return _Query(foreign.file_of(url), query)
