"""Items that are rows of a database: those of a table, or of any query.

The query is read once, by the coordinator, in one transaction, into work files beside the output; workers read those.
So the rows are of one moment, a resumed job scores the same ones, and no worker is told how to reach the database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tally.database import foreign
from tally.errors import SourceChangedError, SourceNotFoundError, SpecError, StorageError
from tally.sources.base import Chunk
from tally.sources.listing import Listing
from tally.sources.sql.factory import opened
from tally.sources.tables.ingest import ROWS, Made, Query, TableFile, connect, make
from tally.sources.tables.parquet import DECODED, Stream
from tally.sources.tables.row_ranges import RowRange
from tally.sources.tables.schema import Found
from tally.sources.tables.select import TableRequest, select
from tally.sources.tables.source import MissingReason, TableSource
from tally.sources.tables.work_files import WorkFolder
from tally.sql import sql_name, sql_text
from tally.storage import open_store
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

    from tally.sources.sql.base import OpenQuery

_FILE = "000000.parquet"
_SHOWN = 5
"""Keys that are named where several rows have the same."""
_AGAIN = "Give the command that began the job again, with --overwrite; the results that are there stay until then."


@dataclass(frozen=True)
class SqlSource(TableSource):
    """Rows of a database. Make it with :meth:`of`; small, immutable, picklable.

    address: the database's URL, without a password, or ``env:NAME``. sql: the query. named: its table, or ``query``.
    key: the columns whose values are the rows' keys; without, rows are numbered.
    """

    address: str = ""
    sql: str = ""
    named: str = "query"
    key: tuple[str, ...] = ()
    held: tuple[str, ...] = field(default=(), repr=False)
    """The columns that are read: all, where a condition may name any."""

    @classmethod
    def of(
        cls,
        address: str,
        sql: str | None,
        *,
        features: Sequence[str] | int | None,
        key: str | None = None,
        by: Sequence[str] = (),
        keep: Sequence[str] = (),
        where: str | None = None,
        time: str | None = None,
        window: float | None = None,
        aggregate: Sequence[str] = ("mean",),
        time_unit: str | None = None,
        timezone: str | None = None,
        missing_reason: MissingReason | None = None,
    ) -> SqlSource:
        """The source of the rows of a query, or of the table that the address names after ``#``.

        key: a column, or several, separated by commas. The others: as for :meth:`TableSource.describe`.
        Nothing but the query's columns is asked of the database. Raises SpecError with every problem;
        StorageAwayError, StorageError.
        """
        address, _, table = address.partition("#")
        if (sql is None) == (not table):
            raise SpecError(
                f"source: {address} names {'no table' if sql is None else 'a table, and query is given too'}",
                hint="Name a table, as in postgresql://HOST/DATABASE#TABLE, or give a query: --query 'SELECT ...'",
            )
        text = f"SELECT * FROM {_quoted(table, address)}" if sql is None else sql.strip().rstrip(";")  # noqa: S608
        request = TableRequest.of(features, by, keep, where, time, window, aggregate, time_unit, timezone)
        with opened(address, text, table=table or None) as found:
            schema = found.schema
            assumed = tuple(each.remark for each in found.columns if each.remark)
        keys = _columns_of(key, schema)
        selection, problems = select(schema, request)
        problems += [
            f"key: there is no column {name!r}{did_you_mean(name, schema.names)} (there are {', '.join(schema.names)})"
            for name in keys
            if name not in schema.names
        ]
        problems += [
            f"key: column {name!r} holds {kind}, which is no key as it stands; have its text in the query, as by hex()"
            for name, kind in zip(schema.names, schema.types, strict=True)
            if name in keys and _is_no_text(kind)
        ]
        if key is not None and window is not None:
            problems.append("key: windows are named by their key and time; leave it out")
        if where is not None:
            problems += Found(schema, []).check_where(where)
        if problems:
            raise SpecError(problems)
        kinds = {name: schema.field(name).type for name in keys}
        selection = replace(selection, inputs={**selection.inputs, **kinds})
        held = tuple(schema.names if where is not None else selection.inputs)
        return cls(
            Listing((f"{foreign.shown(address)}{'#' * bool(table)}{table}",), (), "table"),
            Query(request, selection),
            assumed,
            False,
            None,
            missing_reason,
            address=address,
            sql=text,
            named=table or "query",
            key=keys,
            held=held,
        )

    # -- work files --------------------------------------------------------------------------------

    def indivisible(self) -> str | None:
        """See :meth:`Source.indivisible`."""
        return "a database answers a query once, to one coordinator"

    def prepare(self) -> None:
        """Read the query into work files, unless they are there. See :meth:`Source.prepare`."""
        described = json.dumps([self.address, self.sql, self.named, self.key, self.query.described()])
        WorkFolder(self._scratch()).ensure(hashlib.sha256(described.encode()).hexdigest(), self._brought)
        self._look_again()

    def _brought(self, folder: Path) -> Made:
        with opened(self.address, self.sql) as found:
            began = datetime.now(UTC).isoformat(timespec="seconds")
            self._check_same(found)
            rows = _write(found, self.held, folder / _FILE)
            facts = {"database": self.listing.uris[0], "rows": rows, "began_at": began, "snapshot": found.snapshot}
        if not rows:
            raise SourceNotFoundError(f"nothing to score: {self.named} of {self.listing.uris[0]} gives no rows")
        self._check_keys(folder / _FILE)
        store = open_store(str(folder))
        file = TableFile(self.named, store, _FILE, "parquet", 0, store.marked(_FILE)[1], rows)
        return replace(make([file], self.query, folder), read=facts)

    def _check_same(self, found: OpenQuery) -> None:
        """Raises SourceChangedError if the query has other columns than when the job was made."""
        kinds = dict(zip(found.schema.names, found.schema.types, strict=True))
        for name in self.held:
            expected = self.query.selection.inputs.get(name, kinds.get(name))
            if name not in kinds or kinds[name] != expected:
                now = f"is {kinds[name]}" if name in kinds else "is gone"
                raise SourceChangedError(f"column {name!r} of {self.listing.uris[0]} {now}, and was {expected}")

    def _check_keys(self, path: Path) -> None:
        """Raises SpecError unless each row has a key of its own."""
        if not self.key:
            return
        columns = ", ".join(map(sql_name, self.key))
        table = f"read_parquet({sql_text(path)})"
        with connect(path.parent / "spill") as connection:
            missing = " OR ".join(f"{sql_name(name)} IS NULL" for name in self.key)
            [(nulls,)] = connection.execute(f"SELECT count(*) FROM {table} WHERE {missing}").fetchall()  # noqa: S608
            several = connection.execute(
                f"SELECT {columns}, count(*) FROM {table} GROUP BY ALL HAVING count(*) > 1 "  # noqa: S608
                f"ORDER BY ALL LIMIT {_SHOWN + 1}"
            ).fetchall()
        if nulls:
            raise SpecError(
                f"key: {', '.join(self.key)}: {nulls:,} rows have none",
                hint="Leave such rows out of the query, or name columns that all rows have.",
            )
        if several:
            shown = ", ".join(f"{'/'.join(map(str, each[:-1]))} ({each[-1]:,} times)" for each in several[:_SHOWN])
            raise SpecError(
                f"key: {', '.join(self.key)}: several rows have the same: {shown}{' ...' * (len(several) > _SHOWN)}",
                hint="Name columns that tell rows apart: --key Device,Tag,TS",
            )

    def _nothing(self) -> SourceNotFoundError:
        shown = self.listing.uris[0]
        if (where := self.query.request.where) is not None:
            return SourceNotFoundError(f"nothing to score: no row of {shown} meets the condition {where!r}")
        if self.query.request.window is not None and self._work.made.timeless:
            return SourceNotFoundError(f"nothing to score: no row of {shown} has a time")
        return SourceNotFoundError(f"nothing to score: {self.named} of {shown} gives no rows")

    def facts(self) -> Mapping[str, Any]:
        """See :meth:`Source.facts`."""
        return self._work.made.read

    # -- keys --------------------------------------------------------------------------------------

    def key_columns(self, row_range: RowRange) -> list[str]:
        """See :meth:`TableSource.key_columns`."""
        return list(self.key) or super().key_columns(row_range)

    def keys_of(self, row_range: RowRange, start: int, rows: Any, count: int) -> pa.StringArray:
        """See :meth:`TableSource.keys_of`."""
        from tally.sources.tables.keys import joined, plain_text

        if not self.key:
            return super().keys_of(row_range, start, rows, count)
        if len(self.key) > 1:
            return joined([rows[name] for name in self.key])
        return plain_text(rows[self.key[0]])

    # -- dead items --------------------------------------------------------------------------------

    def alone(self, chunk: Chunk, position: int, key: str) -> Chunk:
        """See :meth:`Source.alone`. It keeps the row's key, and which reading of the query it comes from."""
        item = self.slice(chunk, position, position + 1)
        [row_range] = item.payload["pieces"]
        kept: dict[str, Any] = {"reading": self._work.folder, "key": key}
        if row_range[0] == "key":
            kept["by"] = {name: str(value) for name, value in self.key_values(row_range[1]).items()}
        return replace(item, payload={**item.payload, "item": kept})

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """See :meth:`Source.combine`. Rows of an earlier reading of the query are found again by their keys."""
        here = self._work.folder
        items = [each.payload["item"] for each in chunks]
        places = self._places({each["key"] for each in items if each["reading"] != here and "by" not in each})
        found = []
        for chunk, item in zip(chunks, items, strict=True):
            [row_range] = chunk.payload["pieces"]
            if item["reading"] != here:
                row_range = self._keyed(item, row_range) if "by" in item else places[item["key"]]
            found.append(replace(chunk, payload={"pieces": [row_range]}))
        return self._combined(found)

    def _keyed(self, item: Mapping[str, Any], row_range: RowRange) -> RowRange:
        """The key of a model, by its values, in this reading."""
        for ordinal in range(self._work.made.keys):
            if {name: str(value) for name, value in self.key_values(ordinal).items()} == item["by"]:
                return ["key", ordinal, row_range[2]]
        raise StorageError(f"there are no rows of {item['key']} any more", hint=_AGAIN)

    def _places(self, keys: set[str]) -> dict[str, RowRange]:
        """Where the rows of these keys are in this reading. Raises StorageError if that cannot be told."""
        if not keys:
            return {}
        if not self.key:
            raise StorageError(
                f"{self.listing.uris[0]} has been read anew, and its rows have no keys by which they are known",
                hint=f"{_AGAIN} With --key COLUMN, single rows can be replayed.",
            )
        name = ROWS if self.query.sorts else _FILE
        rows = dict(self._work.made.tables)[name]
        stream = Stream(self._work.parquet(name), self.key, DECODED)
        places: dict[str, RowRange] = {}
        at = 0
        try:
            for batch in stream.read(0, rows):
                for offset, key in enumerate(self.keys_of(["rows", -1, name], at, batch, batch.num_rows).to_pylist()):
                    if key in keys:
                        places[key] = ["rows", -1, name, at + offset, at + offset + 1, rows]
                at += batch.num_rows
        finally:
            stream.close()
        if gone := keys - places.keys():
            raise StorageError(f"{self.listing.uris[0]} has no row {min(gone)} any more", hint=_AGAIN)
        return places


def _is_no_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _quoted(table: str, address: str) -> str:
    """The name of a table, maybe of a schema, in a query of this database."""
    quote = "`" if foreign.scheme_of(foreign.value(address, "source")) in ("mysql", "mariadb") else '"'
    return ".".join(f"{quote}{part.replace(quote, quote * 2)}{quote}" for part in table.split("."))


def _columns_of(key: str | None, schema: pa.Schema) -> tuple[str, ...]:
    if key is None:
        return ()
    return (key,) if key in schema.names else tuple(name.strip() for name in key.split(","))


def _write(found: OpenQuery, names: Sequence[str], path: Path) -> int:
    """Write the rows as Parquet, a batch at a time. Returns how many there are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from tally.sources.tables.formats import in_parquet

    columns = list(names) or found.schema.names[:1]
    schema = pa.schema([(name, in_parquet(found.schema.field(name).type)) for name in columns])
    rows = 0
    with pq.ParquetWriter(path, schema) as writer:
        for batch in found.batches():
            table = pa.Table.from_batches([batch]).select(columns).cast(schema)
            writer.write_table(table)
            rows += batch.num_rows
    return rows
