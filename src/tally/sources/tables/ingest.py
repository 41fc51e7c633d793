"""Converting tables to work files: Parquet with the rows selected, aggregated over windows and grouped, out of core.

First, every file that is not Parquet is converted, row for row. Then, if rows are selected, grouped by key or
aggregated over windows, all files become one sorted Parquet file. Lines that cannot be read are listed in a file of
their own.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from tally.errors import StorageError
from tally.sources.tables import delimited, jsonlines
from tally.sources.tables.damage import DAMAGED, unreadable
from tally.sources.tables.formats import TEXT, Format, in_parquet, plain_type
from tally.sources.tables.packed import plain_text
from tally.sources.tables.paths import values
from tally.sources.tables.select import ORDER, UNITS, Selection, TableRequest, quantile
from tally.sources.tables.stored import open_stored
from tally.sources.tables.type_inference import INFERRED, LOOKED_AT, Kinds
from tally.sql import distinct_names, hide_progress, sql_name, sql_text
from tally.storage import Store, failure, temporary
from tally.text import did_you_mean

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

ROWS, KEYS, BAD = "rows.parquet", "keys.parquet", "bad.parquet"
FIRST, COUNT = "_first", "_rows"
_MEMORY = 4 * 1024**3
"""Bytes of memory for DuckDB. It spills the rest to disk."""
_GROUP_ROWS = 122_880
_BATCH_ROWS = 65_536
WORDS: dict[Format, str] = {"csv": "line", "jsonl": "line", "json": "object", "excel": "row"}
"""What the lines of the text that is read were in the file."""
_ORIGIN = "make_timestamp(2000, 1, 3, 0, 0, 0)"
"""A Monday: windows of days and weeks begin at midnight, windows of weeks on Mondays."""


@dataclass(frozen=True)
class Query:
    """What to make of the files. types: DuckDB's, of the columns of text.

    paths: DuckDB's types of the columns that stand in the files' paths, as far as they are needed; pattern: see
    :mod:`tally.sources.tables.paths`.
    """

    request: TableRequest
    selection: Selection
    csv: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    paths: Mapping[str, str] = field(default_factory=dict, repr=False)
    pattern: str | None = field(default=None, repr=False)

    def described(self) -> str:
        """What identifies it. What earlier versions did not know is left out where it is not asked for."""
        more = (dict(self.paths), self.pattern, self.request.unit, self.request.zone, dict(self.request.called))
        return repr(self) + (repr(more) if any(more) else "")

    @property
    def sorts(self) -> bool:
        """Whether all files become one, instead of one each."""
        return bool(self.request.by or self.request.where or self.request.window is not None or self.paths)


@dataclass(frozen=True, slots=True)
class TableFile:
    """One file. key: the beginning of its rows' keys. location: index of the location that lists it. mark: of its
    content, as listed (see :meth:`tally.storage.Store.marked`). rows: their number, if it is known."""

    key: str
    store: Store
    name: str
    format: Format
    location: int
    mark: str
    rows: int | None = None

    @property
    def url(self) -> str:
        return f"{self.store.url}/{self.name}"


@dataclass(frozen=True)
class Made:
    """What was made: JSON-able.

    kind: ``files`` (one table for each file), ``rows`` (one table, each row with its position in the whole input) or
    ``windows``. files: key and number of rows of each file. tables: name and number of rows of each work file. bad:
    number of lines that could not be read. keys: number of keys. timeless: rows without a time, which are in no window.
    versions: of each file, as its store marks it. healthy: for the number of each file with lines that could not be
    read, a digest of its other lines. read: of a database, what the manifest says of how it was read. unit: of
    times that are numbers since 1970.
    """

    kind: str
    files: list[tuple[str, int]]
    tables: list[tuple[str, int]]
    bad: int = 0
    keys: int = 0
    timeless: int = 0
    versions: list[str] = field(default_factory=list)
    healthy: dict[str, str] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    unit: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Made:
        pairs = {name: [(each[0], each[1]) for each in fields[name]] for name in ("files", "tables")}
        return cls(**{**fields, **pairs})


def make(inputs: Iterable[TableFile], query: Query, folder: Path) -> Made:
    """Make the work files in a folder of this machine. Raises StorageError."""
    import duckdb

    spill = folder / "spill"
    files: list[tuple[str, int]] = []
    tables: list[tuple[Path, int]] = []
    with temporary.folder("tables") as links, connect(spill) as connection:
        try:
            inputs = list(inputs)
            files, tables, healthy = _convert(connection, inputs, query, folder, Path(links))
            if not query.sorts:
                made = Made("files", files, [(path.name, rows) for path, rows in tables], _count(folder / BAD))
            else:
                made = _arrange(connection, query, inputs, files, tables, folder, Path(links))
            return replace(made, healthy=healthy)
        except duckdb.Error as error:
            if "Invalid string encoding" in str(error):
                _check_text(files, tables)
            raise failure("prepare", str(folder), _first_line(error)) from None
        except OSError as error:
            raise error if isinstance(error, StorageError) else failure("write", str(folder), error) from None
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def _check_text(files: Sequence[tuple[str, int]], tables: Sequence[tuple[Path, int]]) -> None:
    """Raises StorageError if there is a text in Parquet that is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for (key, _), (path, rows) in zip(files, tables, strict=True):
        if not rows or not path.exists():
            continue
        at = 1
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS):
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                try:
                    column.validate(full=True)
                except pa.ArrowInvalid as error:
                    found = re.search(r"string index (\d+)", str(error))
                    row = f", row {at + int(found[1]):,}" if found else ""
                    raise StorageError(
                        f"{key}{row}, column {name!r}: its text is not valid UTF-8",
                        hint="Write it as UTF-8, or as bytes.",
                    ) from None
            at += batch.num_rows


@contextmanager
def connect(spill: Path | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
    """A DuckDB with limited memory. spill: the folder for what does not fit."""
    import duckdb

    config: dict[str, Any] = {"threads": os.cpu_count() or 1}
    if spill is not None:
        config["temp_directory"] = str(spill)
    with duckdb.connect(":memory:", config=config) as connection:
        limit = min(psutil.virtual_memory().total // 4, _MEMORY)
        connection.execute(f"SET memory_limit = '{limit}B'; SET TimeZone = 'UTC'")
        hide_progress(connection)
        connection.execute("SET autoinstall_known_extensions = false; SET autoload_known_extensions = false")
        yield connection


def link(path: Path, folder: Path, number: int, suffix: str) -> Path:
    """A link to the file whose name DuckDB does not take for a pattern."""
    target = folder / f"{number:06d}{suffix}"
    target.symlink_to(path)
    return target


# -- every file as Parquet ----------------------------------------------------------------------------


def _convert(
    connection: Any, inputs: Iterable[TableFile], query: Query, folder: Path, links: Path
) -> tuple[list[tuple[str, int]], list[tuple[Path, int]], dict[str, str]]:
    """Convert every file to Parquet.

    Returns key and rows of each file, path and rows of each table, and :attr:`Made.healthy`.
    """
    import duckdb

    files: list[tuple[str, int]] = []
    tables: list[tuple[Path, int]] = []
    healthy: dict[str, str] = {}
    with _Bad(folder / BAD) as bad:
        for number, each in enumerate(inputs):
            path = each.store.local_path(each.name, mark=each.mark)
            target = folder / f"{number:06d}.parquet"
            if each.format == "parquet":
                table, rows = path, _count(path) if each.rows is None else each.rows
            elif each.format not in TEXT:
                table, rows = target, _from_stored(each, query, target)
            else:
                plain = plain_text(path, each.key, each.format, links, number)
                bring = _from_csv if each.format == "csv" else _from_jsonl
                try:
                    faults = bring(connection, plain, each, query, target, links, number)
                    lines = bad.add(number, f"{each.key} {WORDS[each.format]}", faults)
                except duckdb.Error as error:
                    raise unreadable(each.key, error) from None
                if lines:
                    healthy[str(number)] = delimited.digest_without(plain, lines)
                table, rows = target, _count(target) if target.exists() else 0
            files.append((each.key, rows))
            tables.append((table, rows))
    return files, tables, healthy


def _columns(query: Query) -> list[str]:
    """The columns that are converted: all of them if there is a condition, which may name any."""
    if query.request.where is not None:
        return list(query.types)
    return [name for name in query.selection.inputs if name not in query.paths]


def _from_csv(
    connection: Any, path: Path, each: TableFile, query: Query, target: Path, folder: Path, number: int
) -> Iterable[delimited.Fault]:
    dialect = delimited.look(path, each.key, query.csv)
    if dialect is None:
        return []
    columns = _columns(query)
    for name in columns:
        if name not in dialect.names:
            raise StorageError(
                f"{each.key} lacks the column {name!r}{did_you_mean(name, dialect.names)}",
                hint="all files have to have the same columns",
            )
    plain = delimited.readable(path, dialect, folder, each.key)
    types = {name: query.types[name] for name in columns}
    there, called = distinct_names(dialect.names), distinct_names(columns)
    chosen = ", ".join(f"{sql_name(there[name])} AS {sql_name(called[name])}" for name in columns) or "1 AS one"

    def copy(path: Path) -> Iterable[delimited.Fault]:
        delimited.forget_faults(connection)
        delimited.check_thousands(connection, path, dialect, types, each.key)
        if number >= LOOKED_AT:
            _check_types(delimited.infer_types(connection, path, dialect, lambda *_: True)[0], query, each.key)
        _copy(connection, f"SELECT {chosen} FROM {delimited.relation(path, dialect, types)}", target)  # noqa: S608
        return delimited.faults(connection, path, dialect, each.key)

    return delimited.evenly(copy, plain, dialect, folder)


def _from_jsonl(
    connection: Any, path: Path, each: TableFile, query: Query, target: Path, folder: Path, number: int
) -> Iterable[delimited.Fault]:
    types = {name: query.types[name] for name in _columns(query)}
    if number >= LOOKED_AT:
        _check_types(jsonlines.infer_types(connection, path, lambda *_: True)[0], query, each.key)
    _copy(connection, jsonlines.rows(path, types), target)
    return jsonlines.faults(connection, path, types, f"{each.key}, {WORDS[each.format]}", _count(target))


def _check_types(found: Mapping[str, Kinds], query: Query, key: str) -> None:
    """Raises StorageError if kept columns of a file, whose types were not inferred, hold what their types do not."""
    kept = [query.selection.origin.get(name, name) for name in query.selection.info]
    for name in dict.fromkeys([*kept, *query.request.by]):
        kind, kinds = query.types.get(name), found.get(name, Kinds())
        fits = {"DOUBLE": ("BIGINT", "DOUBLE"), "TIMESTAMP": ("DATE", "TIMESTAMP")}.get(str(kind), (kind,))
        if kinds and kind in INFERRED and kind != "VARCHAR" and kinds.exact not in fits:
            raise StorageError(
                f"{key}: column {name!r} holds other values than {kind}, which the first {LOOKED_AT} files hold",
                hint=f"say how to read it, as in csv types={{{name}: VARCHAR}}",
            )


def _from_stored(each: TableFile, query: Query, target: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_stored(each.format, each.store, each.name) as reader:
        names = reader.schema.names if query.request.where is not None else _columns(query) or reader.schema.names[:1]
        if missing := [name for name in names if name not in reader.schema.names]:
            raise StorageError(f"{each.key} lacks the column {missing[0]!r}", hint=f"Other files have it. {DAMAGED}")
        schema = pa.schema([(name, in_parquet(plain_type(reader.schema.field(name).type))) for name in names])
        called = list(distinct_names(names).values())
        rows = 0
        with pq.ParquetWriter(target, pa.schema(list(zip(called, schema.types, strict=True)))) as writer:
            for batch in reader.batches:
                table = pa.Table.from_batches([batch]).select(names)
                arrays = [_cast(column, field, each.key) for column, field in zip(table.columns, schema, strict=True)]
                writer.write_table(pa.Table.from_arrays(arrays, called), row_group_size=_GROUP_ROWS)
                rows += table.num_rows
    return rows


def _cast(column: Any, field: pa.Field, key: str) -> Any:
    import pyarrow as pa

    try:
        return column.cast(field.type)
    except pa.ArrowInvalid as error:
        what = f"{key}, column {field.name!r}: {_first_line(error)}"
        raise StorageError(what, hint="Write the column as another type, or leave it out.") from None


# -- selected, aggregated, grouped --------------------------------------------------------------------


def _arrange(
    connection: Any,
    query: Query,
    inputs: Sequence[TableFile],
    files: list[tuple[str, int]],
    tables: Sequence[tuple[Path, int]],
    folder: Path,
    links: Path,
) -> Made:
    """Make one table of the selected rows, with an index of its keys."""
    request = query.request
    bad = _count(folder / BAD)
    kind = "rows" if request.window is None else "windows"
    offsets, paths, in_paths = [], [], []
    total = 0
    for number, (path, rows) in enumerate(tables):
        if rows:
            in_paths.append(values(inputs[number].url, query.pattern) if query.paths else {})
            paths.append(link(path, links, number, ".rows.parquet"))
            offsets.append(total)
        total += rows
    if not paths:
        return Made(kind, files, [], bad)
    connection.execute(f"SET VARIABLE offsets = {offsets}::BIGINT[]")
    more = ""
    for at, (name, type_) in enumerate(query.paths.items()):
        texts = ", ".join("NULL" if each[name] is None else sql_text(str(each[name])) for each in in_paths)
        connection.execute(f"SET VARIABLE path_{at} = [{texts}]::VARCHAR[]")
        more += f", getvariable('path_{at}')[file_index::BIGINT + 1]::{type_} AS {sql_name(name)}"
    # A condition is the user's SQL: it must not read other files.
    listed = ", ".join(sql_text(path) for path in paths)
    allowed = ", ".join(sql_text(os.path.realpath(path)) for path in paths)
    connection.execute(
        f"SET allowed_directories = [{sql_text(f'{links}/')}, {sql_text(f'{folder}/')}]; "
        f"SET allowed_paths = [{allowed}]; SET enable_external_access = false; SET lock_configuration = true"
    )
    where = f"WHERE (\n{request.where}\n)" if request.where is not None else ""
    source = (
        f"(SELECT *, file_row_number + getvariable('offsets')[file_index::BIGINT + 1] AS {ORDER} "  # noqa: S608
        f"FROM (SELECT *, file_index{more} "
        f"FROM read_parquet([{listed}], union_by_name = true, file_row_number = true)) "
        f"{where})"
    )
    timeless, unit = 0, None
    if request.window is None:
        _copy(connection, _rows_of(query, source), folder / ROWS)
    else:
        assert request.time is not None
        unit = _unit_of(connection, query, source)
        _copy(connection, _windows_of(query, source, unit), folder / ROWS)
        missing = f"SELECT count(*) FROM {source} WHERE {_time_of(query)} IS NULL"  # noqa: S608
        timeless = int(connection.execute(missing).fetchone()[0])
    for path, _ in tables:
        if path.parent == folder:
            path.unlink(missing_ok=True)
    keys = 0
    if request.by:
        by = ", ".join(map(sql_name, request.by))
        _copy(
            connection,
            f"SELECT {by}, min(file_row_number) AS {FIRST}, count(*) AS {COUNT} "  # noqa: S608
            f"FROM read_parquet({sql_text(folder / ROWS)}, file_row_number = true) GROUP BY {by} ORDER BY {FIRST}",
            folder / KEYS,
        )
        keys = _count(folder / KEYS)
    return Made(kind, files, [(ROWS, _count(folder / ROWS))], bad, keys, timeless, unit=unit)


def _rows_of(query: Query, source: str) -> str:
    columns = ", ".join([*map(sql_name, query.selection.inputs), ORDER])
    by = "".join(f"{sql_name(name)}, " for name in query.request.by)
    return f"SELECT {columns} FROM {source} ORDER BY {by}{ORDER}"  # noqa: S608


def _unit_of(connection: Any, query: Query, source: str) -> str | None:
    """The unit of times that are numbers since 1970; None of others.

    Raises StorageError if it is not given, and the values do not all fit one.
    """
    request = query.request
    if query.selection.number is None:
        return None
    if request.unit is not None:
        return request.unit
    time = f"({_time_of(query)})"
    low, high = connection.execute(f"SELECT min({time}), max({time}) FROM {source}").fetchone()  # noqa: S608
    if low is None:
        return "s"
    for unit, per_second in UNITS.items():
        if _SINCE * per_second <= low and high <= _UNTIL * per_second:
            return unit
    raise StorageError(
        f"time: {request.time!r} holds numbers from {low} to {high}, which are no times between 1990 and 2100 in "
        "one of the units s, ms, us and ns since 1970",
        hint="Say which unit it is, as in --time-unit ms, or pass over what is no time with --where.",
    )


def _time_of(query: Query) -> str:
    """The times, as SQL; NaN is none."""
    time = sql_name(query.request.time or "")
    return _without_nan(time, query.selection.number)


def _without_nan(value: str, kind: pa.DataType | None) -> str:
    """A number as SQL, NULL where it is NaN: as missing as no value at all."""
    # Of these, DuckDB takes a file's statistics, which leave NaN out, for a proof that there is none.
    if str(kind) == "halffloat":
        return f"CASE WHEN isfinite({value}) OR isinf({value}) THEN {value} END"
    return f"CASE WHEN isnan({value}) THEN NULL ELSE {value} END" if str(kind) in ("double", "float") else value


_SINCE, _UNTIL = 631_152_000, 4_102_444_800
"""1990 and 2100, in seconds since 1970: times of which the unit is told by their values."""


def _windows_of(query: Query, source: str, unit: str | None) -> str:
    request, time, called = query.request, f"({_time_of(query)})", sql_name(query.request.time or "")
    by = "".join(f"{sql_name(name)}, " for name in request.by)
    zoned = "TIMESTAMPTZ" if "tz=" in str(query.selection.inputs[query.request.time or ""]) else "TIMESTAMP"
    moment = f"{time}::{zoned}"
    if unit is not None:
        # Fractions of a microsecond are cut off downwards, so that no reading moves into a later window.
        scaled = {"s": f"{time} * 1000000", "ms": f"{time} * 1000", "us": time, "ns": f"{time} / 1000"}[unit]
        if str(query.selection.number).startswith(("int", "uint")):
            scaled = {"ns": f"{time}::HUGEINT // 1000"}.get(unit, scaled.replace(time, f"{time}::HUGEINT"))
        moment = f"make_timestamptz(floor({scaled})::BIGINT)"
    plain = f"{moment}::TIMESTAMP"
    local = plain if request.zone is None else f"timezone({sql_text(request.zone)}, {moment})"
    begin = f"time_bucket(to_microseconds({request.window}), {local}, {_ORIGIN})"
    # Ordered by time, and by position in the input where times are equal.
    latest = f"epoch_us({plain})::HUGEINT * 1000000000000 + {ORDER}"
    made = []
    for name, (column, how) in query.selection.aggregates.items():
        value = _without_nan(sql_name(column), query.selection.inputs.get(column))
        expressions = {
            "mean": f"avg({value}::DOUBLE)",
            "min": f"min({value})",
            "max": f"max({value})",
            "last": f"arg_max({value}, {latest})",
            "count": "count(*)",
            # DuckDB's own stops the whole query at an infinite number.
            "std": f"CASE WHEN bool_or(isinf({value}::DOUBLE)) THEN 'nan'::DOUBLE "
            f"ELSE stddev_samp({value}::DOUBLE) FILTER (WHERE isfinite({value}::DOUBLE)) END",
            "median": f"quantile_cont({value}::DOUBLE, 0.5)",
        }
        share = quantile(how)
        expression = expressions[how] if share is None else f"quantile_cont({value}::DOUBLE, {share})"
        made.append(f"{expression} AS {sql_name(name)}")
    begins = f"({begin})::{zoned}" if request.zone is None else f"timezone({sql_text(request.zone)}, {begin})"
    chosen = ", ".join([f"{begins} AS {called}", *made])
    # By number: a name that result and input share would mean the input's column.
    groups = ", ".join(str(index + 1) for index in range(len(request.by) + 1))
    return f"SELECT {by}{chosen} FROM {source} WHERE {time} IS NOT NULL GROUP BY {groups} ORDER BY {groups}"  # noqa: S608


def _copy(connection: Any, query: str, target: Path) -> None:
    connection.execute(f"COPY ({query}) TO {sql_text(target)} (FORMAT parquet, ROW_GROUP_SIZE {_GROUP_ROWS})")


def _count(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows) if path.exists() else 0


def _first_line(error: Exception) -> Exception:
    return ValueError(str(error).strip().split("\n", 1)[0])


# -- lines that cannot be read ------------------------------------------------------------------------


class _Bad:
    """Writes the lines that cannot be read, as they are found. Without any, there is no file."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._path = path
        self._writer: Any = None
        self._schema = pa.schema(
            [
                ("file", pa.int64()),
                ("before", pa.int64()),
                ("line", pa.int64()),
                ("key", pa.string()),
                ("error", pa.string()),
            ]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def add(self, file: int, key: str, faults: Iterable[delimited.Fault]) -> list[int]:
        """Write the faults of one file. key: the beginning of their keys. Returns the numbers of their lines."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        lines: list[int] = []
        pending: list[dict[str, Any]] = []
        for fault in faults:
            lines.append(fault.line)
            pending.append(
                {
                    "file": file, "before": fault.before, "line": fault.line, "key": f"{key} {fault.line}",
                    "error": fault.message,
                }
            )  # fmt: skip
            if len(pending) >= _BATCH_ROWS:
                self._write(pa.Table.from_pylist(pending, self._schema), pq)
                pending = []
        if pending:
            self._write(pa.Table.from_pylist(pending, self._schema), pq)
        return lines

    def _write(self, table: pa.Table, pq: Any) -> None:
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, self._schema)
        self._writer.write_table(table)
