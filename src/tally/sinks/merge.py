"""From staged files to final ones: read ahead, unify schemas, cut into parts, write. Memory stays bounded."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from tally.arrays import no_rows
from tally.sinks import columns
from tally.sinks.columns import KEY
from tally.sinks.layout import File, OutputLayout
from tally.sql import distinct_names, hide_progress, sql_name, sql_text
from tally.storage import failure, temporary

PART_ROWS = 1_000_000
PART_BYTES = 128 * 1024**2
"""A part is full at this many rows, or bytes of Arrow data."""

_GROUP_ROWS = 128 * 1024
_GROUP_BYTES = 32 * 1024**2
_AHEAD, _AHEAD_IN_BUCKETS = 4, 16
"""Files that are read at once. In a bucket, most of their time is waiting."""
_SMALL = 8
_SORT_HERE = 128 * 1024**2
"""Bytes of rows that are sorted as they are; more of them are sorted by DuckDB, which may take as much memory as the
next number says."""
_SORT_BYTES = 1024**3
_JSON_DIGITS = 15
"""The digits of a decimal number that readers of JSON keep."""

Batches = Iterable[pa.RecordBatch]


# -- reading ------------------------------------------------------------------------------------------


def schema(layout: OutputLayout, names: Iterable[str], first: Iterable[pa.Schema] = ()) -> columns.Unified:
    """The schema that holds the rows of all these Parquet files, and rows of the schemas in ``first``."""

    def one(name: str) -> pa.Schema:
        with layout.parquet(name) as file:
            return file.schema_arrow

    return columns.unify(chain(first, ahead(layout, one, names)))


def stream(tables: Iterable[pa.Table], target: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of tables with differing schemas, in the target schema."""
    for table in tables:
        yield from columns.conform(table, target).to_batches()


def ahead(layout: OutputLayout, read: Callable[[str], Any], names: Iterable[str]) -> Iterator[Any]:
    """The results of ``read`` for each name, in order. Threads read a few of the layout's files ahead."""
    pending: deque[Future[Any]] = deque()
    most = _AHEAD if layout.store.is_local else _AHEAD_IN_BUCKETS
    with ThreadPoolExecutor(most, thread_name_prefix="tally-merge") as pool:
        try:
            for name in names:
                pending.append(pool.submit(read, name))
                if len(pending) >= most:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


# -- writing ------------------------------------------------------------------------------------------


def write(
    layout: OutputLayout, batches: Batches, target: pa.Schema, suffix: str, first: int, *, empty: bool
) -> list[File]:
    """Write rows as the final parts ``first``, ``first + 1`` ...; as one file if the output is merged.

    empty: if there are no rows, write a part without rows, which shows the columns.
    """
    parts: Iterable[Batches] = [batches] if layout.merged else cut(batches)
    files = [
        write_file(layout, layout.part(number, suffix), part, target, suffix)
        for number, part in enumerate(parts, first)
    ]
    if empty and not files:
        files.append(write_file(layout, layout.part(first, suffix), (), target, suffix))
    return files


def publishable(rows: int, size: int) -> bool:
    """Whether a staged Parquet file is large enough to be a part as it is. size: in bytes."""
    return rows >= PART_ROWS // _SMALL or size >= PART_BYTES // _SMALL


def parts(
    layout: OutputLayout,
    staged: Iterable[tuple[str, int, int]],
    first: int,
    target: pa.Schema,
    named: Callable[[int], str],
    *,
    group_rows: int | None = None,
) -> tuple[list[File], dict[str, str]]:
    """Make parts of staged Parquet files: large ones stay as they are, and smaller ones between them are combined.

    staged: their names, rows and bytes. first: the number of the first part. named: the name of the part of a number.
    group_rows: rows of a row group, at most, of what is combined.
    Returns the parts, and the names of staged files by the parts that they will be moved to.
    """
    files: list[File] = []
    moves: dict[str, str] = {}
    small: list[str] = []

    def put_together() -> None:
        if not small:
            return
        for part in cut(stream(ahead(layout, layout.table, small), target)):
            name = named(first + len(files))
            files.append(write_file(layout, name, part, target, "parquet", group_rows=group_rows))
        small.clear()

    for name, rows, size in staged:
        if not publishable(rows, size):
            small.append(layout.staging + name)
            continue
        put_together()
        part = named(first + len(files))
        moves[part] = name
        files.append({"path": part, "rows": rows, "bytes": size})
    put_together()
    return files, moves


def ordered(batches: Batches, given: pa.Schema, by: str) -> Iterator[pa.RecordBatch]:
    """The rows sorted by an integer column, without that column. What is too much for memory goes to disk."""
    rest = iter(batches)
    held: list[pa.RecordBatch] = []
    size = 0
    for batch in rest:
        held.append(batch)
        size += batch.nbytes
        if size > _SORT_HERE:
            return _ordered_on_disk(chain(held, rest), given, by)
    return _ordered_here(pa.Table.from_batches(held, given), by)


def _ordered_here(table: pa.Table, by: str) -> Iterator[pa.RecordBatch]:
    from pyarrow import compute  # slow to import, and few jobs need it

    order = compute.sort_indices(table.column(by))  # stable, rows without a number last
    rows = table.drop_columns([by]).combine_chunks()
    for start in range(0, len(order), _GROUP_ROWS):
        yield from rows.take(order.slice(start, _GROUP_ROWS)).to_batches()


def _ordered_on_disk(batches: Batches, given: pa.Schema, by: str) -> Iterator[pa.RecordBatch]:
    import duckdb

    target = pa.schema([field for field in given if field.name != by])
    names = [f"column {number}" for number in range(len(given))]
    # DuckDB takes names for one that differ only in capitals, and has another idea of intervals and of far times.
    kinds = [columns.replaced(kind, _counted) for kind in given.types]
    plain = pa.schema(list(zip(names, kinds, strict=True)))
    position = given.get_field_index(by)
    kept = ", ".join(sql_name(name) for number, name in enumerate(names) if number != position)

    def prepared() -> Iterator[pa.RecordBatch]:
        for batch in batches:
            arrays = [array.cast(kind) for array, kind in zip(batch.columns, kinds, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=plain)

    found: Any
    with temporary.folder("sort") as folder, duckdb.connect(":memory:") as connection:
        connection.execute(f"SET memory_limit = '{_SORT_BYTES}B'; SET temp_directory = {sql_text(folder)}")
        hide_progress(connection)
        connection.execute("SET TimeZone = 'UTC'")
        connection.register("batches", pa.RecordBatchReader.from_batches(plain, prepared()))
        found = connection.sql(f"SELECT {kept} FROM batches ORDER BY {sql_name(names[position])}")  # noqa: S608
        for batch in found.to_arrow_reader(_GROUP_ROWS):
            arrays = [array.cast(kind) for array, kind in zip(batch.columns, target.types, strict=True)]
            yield pa.RecordBatch.from_arrays(arrays, schema=target)


def _counted(kind: pa.DataType) -> pa.DataType:
    """Integers for times and intervals."""
    return pa.int64() if pa.types.is_timestamp(kind) or pa.types.is_duration(kind) else kind


def write_file(
    layout: OutputLayout,
    name: str,
    batches: Batches,
    target: pa.Schema,
    suffix: str,
    *,
    group_rows: int | None = None,
) -> File:
    """Write rows as one final file. group_rows: of Parquet, rows of a row group at most."""
    with layout.create(name) as path:
        if suffix == "parquet":
            rows = _write_parquet(path, batches, target, group_rows)
        else:
            rows = write_text(path, batches, target, suffix)
        size = path.stat().st_size
    return {"path": name, "rows": rows, "bytes": size}


def extend(
    layout: OutputLayout, old: File, batches: Batches, target: pa.Schema, known: Sequence[str], suffix: str
) -> File:
    """Rewrite a merged CSV or JSON Lines file, with more rows at its end.

    known: its columns; the target schema begins with them.
    """
    source = layout.store.local_path(old["path"])
    with layout.create(old["path"]) as path:
        if suffix == "csv" and len(target) > len(known):
            _widen(source, path, known, target.names[len(known) :])
        else:
            shutil.copyfile(source, path)
        added = path.with_name(f"{path.name}.added")
        rows = write_text(added, batches, target, suffix, header=False)
        with path.open("ab") as whole, added.open("rb") as tail:
            shutil.copyfileobj(tail, whole, 1024**2)
        added.unlink()
        size = path.stat().st_size
    return {"path": old["path"], "rows": old["rows"] + rows, "bytes": size}


def cut(batches: Batches) -> Iterator[Iterator[pa.RecordBatch]]:
    """Cut a stream of rows into parts. Use up each part before asking for the next."""
    rest = (batch for batch in batches if batch.num_rows)
    over: list[pa.RecordBatch] = []

    def part() -> Iterator[pa.RecordBatch]:
        rows = size = 0
        while rows < PART_ROWS and size < PART_BYTES:
            batch = over.pop() if over else next(rest, None)
            if batch is None:
                return
            if rows + batch.num_rows > PART_ROWS:
                over.append(batch.slice(PART_ROWS - rows))
                batch = batch.slice(0, PART_ROWS - rows)
            rows += batch.num_rows
            size += batch.nbytes
            yield batch

    while True:
        if not over:
            batch = next(rest, None)
            if batch is None:
                return
            over.append(batch)
        yield part()


def _write_parquet(path: Path, batches: Batches, target: pa.Schema, group_rows: int | None) -> int:
    rows = pending_rows = pending_bytes = 0
    pending: list[pa.RecordBatch] = []
    with parquet_writer(path, target) as writer:
        for batch in batches:
            pending.append(batch)
            pending_rows += batch.num_rows
            pending_bytes += batch.nbytes
            if pending_rows >= _GROUP_ROWS or pending_bytes >= _GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(pending, target), row_group_size=group_rows or pending_rows)
                rows, pending, pending_rows, pending_bytes = rows + pending_rows, [], 0, 0
        if pending_rows:
            writer.write_table(pa.Table.from_batches(pending, target), row_group_size=group_rows or pending_rows)
    return rows + pending_rows


def parquet_writer(where: Any, target: pa.Schema) -> pq.ParquetWriter:
    """A writer with Zstandard, and dictionaries except for the key: keys never repeat, but begin alike."""
    return pq.ParquetWriter(
        where,
        target,
        compression="zstd",
        use_dictionary=[name for name in target.names if name != KEY],
        column_encoding={KEY: "DELTA_BYTE_ARRAY"},
    )


def write_text(path: Path, batches: Batches, target: pa.Schema, suffix: str, *, header: bool = True) -> int:
    """Write rows as ``csv`` or ``jsonl``. header: of CSV, whether the first line names the columns."""
    # In CSV, DuckDB quotes only what needs it; in JSON Lines, it writes nested values.
    import duckdb

    raised: list[BaseException] = []
    called = list(distinct_names(target.names).values())

    def prepared() -> Iterator[pa.RecordBatch]:
        try:
            for batch in batches:
                yield _textual(batch, suffix, called)
        except BaseException as error:
            raised.append(error)
            raise

    plain = _textual(no_rows(target), suffix, called).schema
    with text_connection() as connection:
        connection.register("batches", pa.RecordBatchReader.from_batches(plain, prepared()))
        try:
            if suffix == "csv":
                return _copy_csv(connection, "FROM batches", path, target.names if header else None)
            if called == target.names:
                query, options = "FROM batches", "FORMAT json"
            else:  # the JSON itself is written here, with names that DuckDB would take for one
                heads = [sql_text(json.dumps(name, ensure_ascii=False) + ":") for name in target.names]
                values = [f"coalesce(to_json({sql_name(name)})::VARCHAR, 'null')" for name in called]
                fields = ", ',', ".join(f"{head}, {value}" for head, value in zip(heads, values, strict=True))
                query = f"SELECT concat('{{', {fields}, '}}') FROM batches"  # noqa: S608
                options = "FORMAT csv, HEADER false, QUOTE '', ESCAPE '', DELIM '\x01'"
            found = connection.execute(f"COPY ({query}) TO {sql_text(path)} ({options})").fetchone()
        except duckdb.Error as error:
            raise (raised[0] if raised else failure("write", str(path), error)) from None
    return int(found[0]) if found else 0


def text_connection() -> Any:
    """A DuckDB that writes times with a zone as those of UTC, wherever this machine is."""
    import duckdb

    connection = duckdb.connect(":memory:", config={"threads": 1})
    connection.execute("SET TimeZone = 'UTC'")
    return connection


def _copy_csv(connection: Any, query: str, path: Path, names: Sequence[str] | None) -> int:
    """Write rows as CSV, with these names in the first line if there are any. Returns how many rows there are."""
    # DuckDB's own header numbers names that differ only in capitals, and has none that are empty.
    renamed = names is not None and len({name.lower() for name in names} - {""}) < len(names)
    options = f"FORMAT csv, HEADER {str(names is not None and not renamed).lower()}"
    target = path.with_name(f"{path.name}.rows") if renamed else path
    found = connection.execute(f"COPY ({query}) TO {sql_text(target)} ({options})").fetchone()
    if renamed and names is not None:
        with target.open("rb") as rows, path.open("wb") as whole:
            _write_header(whole, names)
            shutil.copyfileobj(rows, whole, 1024**2)
        target.unlink()
    return int(found[0]) if found else 0


def _write_header(file: BinaryIO, names: Sequence[str]) -> None:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(names)
    file.write(text.getvalue().encode())


def _widen(source: Path, target: Path, known: Sequence[str], names: Sequence[str]) -> None:
    """Copy a CSV file with empty columns added. known: the names of those that it has."""
    import duckdb

    every = [*known, *names]
    extra = "".join(f", NULL AS {sql_name(f'new {number}')}" for number in range(len(names)))
    columns = ", ".join(f"{sql_text(f'column {number}')}: 'VARCHAR'" for number in range(len(known)))
    with text_connection() as connection, temporary.folder("merge") as folder:
        given = sql_text(plain_path(source, folder))
        rows = target.with_name(f"{target.name}.rows")
        try:
            connection.execute(
                f"COPY (SELECT *{extra} FROM read_csv({given}, {CSV}, columns = {{{columns}}})) "  # noqa: S608
                f"TO {sql_text(rows)} (FORMAT csv, HEADER false)"
            )
        except duckdb.Error as error:
            raise failure("write", str(target), error) from None
    with rows.open("rb") as file, target.open("wb") as whole:
        _write_header(whole, every)
        shutil.copyfileobj(file, whole, 1024**2)
    rows.unlink()


CSV = """header = true, delim = ',', quote = '"', escape = '"', nullstr = '', allow_quoted_nulls = false"""
"""Options with which DuckDB reads the CSV files written here. An empty text stays different from null."""


def plain_path(path: Path, folder: Path, number: int = 0) -> Path:
    """The path; if DuckDB would take it for a pattern, the path of a link made in the folder."""
    if not re.search(r"[*?\[\]{}]", str(path)):
        return path
    link = folder.joinpath(f"{number:06d}{path.suffix}")
    link.symlink_to(path)
    return link


def _textual(batch: pa.RecordBatch, suffix: str, names: Sequence[str]) -> pa.RecordBatch:
    """The batch with only such values as the text format can hold, and with these names."""
    arrays = [_textual_column(array, suffix) for array in batch.columns]
    return pa.RecordBatch.from_arrays(arrays, names=list(names))


def _textual_column(array: Any, suffix: str) -> Any:
    array = array.cast(columns.stored_type(array.type))
    kind = columns.replaced(array.type, _told_intervals)
    array = array.cast(kind)
    if pa.types.is_binary(kind) or (suffix == "csv" and pa.types.is_nested(kind)):
        return columns.as_text(array)
    if suffix == "jsonl" and pa.types.is_decimal(kind) and kind.precision > _JSON_DIGITS:
        return columns.as_text(array)
    if suffix == "jsonl" and (pa.types.is_floating(kind) or pa.types.is_nested(kind)):
        return columns.without_bytes(columns.only_finite(array))
    return array


def _told_intervals(kind: pa.DataType) -> pa.DataType:
    """Intervals as DuckDB writes them: in microseconds, which it does not have to convert; finer ones are integers."""
    if columns.is_fine_interval(kind):
        return pa.int64()
    return pa.duration("us") if pa.types.is_duration(kind) else kind
