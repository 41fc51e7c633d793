"""Queries of DuckDB's files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from tally.database import foreign
from tally.errors import SourceNotFoundError
from tally.sources.sql.base import BATCH, Column, OpenQuery, distinct
from tally.sql import hide_progress, sql_name

_AS_TEXT = ("TIME WITH TIME ZONE", "BIT")
"""Types whose values Arrow has no type for: it would drop the zone, or give bytes."""


class _Query(OpenQuery):
    snapshot = "one transaction: all rows are of one moment"

    def __init__(self, path: str, query: str) -> None:
        if not Path(path).is_file():
            raise SourceNotFoundError(f"there is no file {path}", hint=f"It is looked for in {Path.cwd()}.")
        self._query = query
        self._connection = duckdb.connect(path, read_only=True)
        try:
            hide_progress(self._connection)
            # A query reads the database, and no other files.
            self._connection.execute("SET TimeZone = 'UTC'; SET enable_external_access = false")
            self._connection.execute("SET lock_configuration = true; BEGIN")
            # Those of the query around it are made distinct.
            found = self._connection.sql(query)
            distinct([Column(name, pa.null()) for name in found.columns])
            odd = [name for name, kind in zip(found.columns, found.types, strict=True) if str(kind) in _AS_TEXT]
            if odd:
                cast = ", ".join(f"{sql_name(name)}::VARCHAR AS {sql_name(name)}" for name in odd)
                self._query = query = f"SELECT * REPLACE ({cast}) FROM (\n{query}\n)"  # noqa: S608
            looked = self._connection.sql(f"SELECT * FROM (\n{query}\n) LIMIT 0").to_arrow_table()  # noqa: S608
            self.columns = [Column(each.name, each.type) for each in looked.schema]
        except BaseException:
            self.close()
            raise

    def batches(self) -> Iterator[pa.RecordBatch]:
        return iter(self._connection.sql(self._query).to_arrow_reader(BATCH))

    def close(self) -> None:
        self._connection.close()


ERRORS = (duckdb.Error,)


def is_away(error: Exception) -> bool:
    """See :mod:`tally.sources.sql.factory`. A file that another process writes to cannot be opened."""
    return isinstance(error, duckdb.IOException) and "lock" in str(error)


def open_query(url: str, query: str) -> OpenQuery:
    """See :mod:`tally.sources.sql.factory`."""
    return _Query(foreign.file_of(url), query)
