"""SQL over results, with DuckDB. Nothing can be written, and nothing but the results can be read."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import pyarrow as pa

from tally.errors import SpecError, StorageError
from tally.sinks.base import Output, Sink
from tally.sinks.columns import KEY, is_fine_interval, printable, replaced, schema_of, type_named
from tally.sinks.merge import CSV, plain_path
from tally.sql import hide_progress, json_place, sql_name, sql_text
from tally.storage import failure, is_url, open_store, temporary

Dead: TypeAlias = "pa.Table | Iterable[Mapping[str, Any]]"

_EXPLAIN = re.compile(r"(?i)\s*explain\b")
_DEAD = {"stage": "string", "error": "string"}


def query(
    sink: Sink,
    outputs: Iterable[Output],
    sql: str,
    dead: Dead = (),
    *,
    limit: int | None = None,
    memory: str | None = None,
) -> pa.Table:
    """The answer to one SELECT (or FROM, WITH, VALUES, DESCRIBE, SUMMARIZE ...) over a job's results.

    The view ``results`` holds the rows, ``key`` first; ``dead`` holds ``key, stage, error``. A running job
    shows what is committed.
    outputs: as for :meth:`Sink.committed`. dead: a table or rows with those three columns.
    limit: rows of the answer, at most. memory: what DuckDB may take, such as ``1GiB``; beyond it, it uses the disk.
    Raises SpecError with DuckDB's message if the statement is wrong, StorageError if a file cannot be read.
    """
    outputs, listed = list(outputs), _dead_table(dead)
    try:
        return _query(sink, outputs, sql, listed, limit, memory)
    except StorageError:
        # The job was published between looking and reading: its results lie elsewhere now.
        return _query(sink, outputs, sql, listed, limit, memory)


def rows(sink: Sink, outputs: Iterable[Output]) -> pa.Table:
    """All rows, in the source's order."""
    found = query(sink, outputs, "FROM results")
    manifest = sink.manifest()
    names = list((manifest or {}).get("schema", {}))
    return found.rename_columns(names) if len(names) == found.num_columns else found


def _query(
    sink: Sink, outputs: list[Output], sql: str, dead: pa.Table, limit: int | None, memory: str | None
) -> pa.Table:
    kind, places = sink.committed(outputs)
    manifest = sink.manifest()
    with temporary.folder("query") as spill, duckdb.connect(":memory:") as connection:
        paths = [str(plain_path(_local(place), spill, number)) for number, place in enumerate(places)]
        connection.execute(f"SET temp_directory = {sql_text(spill)}; SET TimeZone = 'UTC'")
        if memory is not None:
            connection.execute(f"SET memory_limit = {sql_text(memory)}")
        connection.execute("SET autoinstall_known_extensions = false; SET autoload_known_extensions = false")
        hide_progress(connection)
        connection.execute("SET enable_external_file_cache = false")  # a file may be replaced between two queries
        connection.execute(f"SET python_enable_replacements = false; SET allowed_paths = {_list(paths)}")
        connection.execute("SET enable_external_access = false")
        try:
            _views(connection, kind, paths, _types(sink, manifest, kind), dead)
        except duckdb.Error as error:
            raise failure("read", "the results", error) from None
        connection.execute("SET lock_configuration = true")
        return _answer(connection, sql, limit)


def _types(sink: Sink, manifest: Mapping[str, Any] | None, kind: str) -> dict[str, str]:
    """The names of the columns' Arrow types, as far as they are known."""
    if manifest is not None:
        return dict(manifest["schema"])
    declared = sink.describe().columns if kind == "parquet" else None
    return {KEY: "string", **declared} if declared else {}


def _views(
    connection: duckdb.DuckDBPyConnection,
    kind: str,
    paths: list[str],
    types: dict[str, str],
    dead: pa.Table,
) -> None:
    connection.register("dead", dead)
    if not paths:
        connection.register("results", dead.schema.empty_table().select([KEY]))
        return
    connection.execute(f"CREATE VIEW results AS {_reader(connection, kind, paths, types, _sql_names(list(types)))}")


def _dead_table(dead: Dead) -> pa.Table:
    if isinstance(dead, pa.Table):
        return dead
    schema = schema_of(_DEAD)
    assert schema is not None
    rows = list(dead)
    return pa.table({name: [printable(str(row[name])) for row in rows] for name in schema.names}, schema=schema)


def _reader(
    connection: duckdb.DuckDBPyConnection, kind: str, paths: list[str], types: dict[str, str], names: dict[str, str]
) -> str:
    """The rows as an SQL query, of the same types whatever format they are kept in.

    names: what SQL calls each column.
    """
    duck = _duck_types(connection, types) if types else {}
    if kind == "parquet":
        given = f"read_parquet({_list(paths)}, union_by_name = true)"
    elif kind == "csv":
        # As text: if DuckDB knew the types, it would read what a query casts as that, right from the text.
        given = f"read_csv({_list(paths)}, {CSV}, union_by_name = true, all_varchar = true)"
    elif names == {name: name for name in names}:
        given = f"read_json({_list(paths)}, format = 'newline_delimited', columns = {_struct(_kept_in_json(duck))})"
    else:
        fields = ", ".join(f"json->>{sql_text(json_place(name))} AS {sql_name(names[name])}" for name in duck)
        given = f"(SELECT {fields} FROM read_ndjson_objects({_list(paths)}))"  # noqa: S608
    there: list[str] = [row[0] for row in connection.execute(f"DESCRIBE FROM {given}").fetchall()]
    known = dict(zip(there, types if len(there) == len(types) else there, strict=True))
    chosen = []
    for column in there:
        name = known[column]
        value = _read_as(sql_name(column), duck[name], kind, types[name]) if name in duck else sql_name(column)
        chosen.append(f"{value} AS {sql_name(names.get(name, name))}")
    return f"SELECT {', '.join(chosen)} FROM {given}"  # noqa: S608


def _duck_types(connection: duckdb.DuckDBPyConnection, types: dict[str, str]) -> dict[str, str]:
    """The DuckDB types of columns, from the names of Arrow's."""
    kinds = []
    for kind in types.values():
        try:
            kinds.append(replaced(type_named(kind), _asked))
        except SpecError:
            kinds.append(pa.string())
    plain = pa.schema([(f"column {number}", kind) for number, kind in enumerate(kinds)])
    connection.register("described", plain.empty_table())
    found = connection.execute("DESCRIBE described").fetchall()
    connection.unregister("described")
    return {name: row[1] for name, row in zip(types, found, strict=True)}


def _asked(kind: pa.DataType) -> pa.DataType:
    """The type that SQL sees: times of microseconds, if they are not finer, and integers for intervals that are."""
    if pa.types.is_timestamp(kind) and kind.unit in ("s", "ms"):
        return pa.timestamp("us", kind.tz)
    return pa.int64() if is_fine_interval(kind) else kind


_INTERVALS = {"duration[s]": "to_seconds", "duration[ms]": "to_milliseconds"}


def _read_as(value: str, kind: str, form: str, known: str) -> str:
    """A column as one of its DuckDB type, from how the format keeps it. known: its Arrow type."""
    nested = kind.endswith(("]", ")")) and not kind.startswith("DECIMAL")
    if form == "parquet":
        return f"{_INTERVALS.get(known, 'to_microseconds')}({value})" if kind == "INTERVAL" else value
    if kind == "BLOB":
        return f"from_base64({value})"
    if kind in ("VARCHAR", '"NULL"'):
        return value
    if nested:
        return f"{value}::JSON::{kind.replace('BLOB', 'VARCHAR')}" if form == "csv" else value
    return f"CAST({value} AS {kind})"


def _kept_in_json(types: Mapping[str, str]) -> dict[str, str]:
    return {name: "VARCHAR" if kind == "BLOB" else kind.replace("BLOB", "VARCHAR") for name, kind in types.items()}


def _sql_names(names: Sequence[str]) -> dict[str, str]:
    """What SQL calls each column: its name; with a number, each of those that differ only in capitals.

    SQL would take any of them for the first.
    """
    count = Counter(name.lower() for name in names)
    taken, called = set(count), {}
    for name in names:
        given = name or "column"  # SQL has no empty names
        unique, number = given, 0
        while (count[name.lower()] > 1 or not name) and unique.lower() in taken:
            number += 1
            unique = f"{given}_{number}"
        taken.add(unique.lower())
        called[name] = unique
    return called


_NAMES = {"count_star()": "count"}
"""Columns that DuckDB names as it calls a function inside."""


def _answer(connection: duckdb.DuckDBPyConnection, sql: str, limit: int | None) -> pa.Table:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise _wrong(connection, error) from None
    if len(statements) != 1:
        what = "no statement" if not statements else f"{len(statements)} statements"
        raise SpecError(f"the query holds {what}", hint="Give one, such as: select * from results limit 10")
    if (other := _beside_reading(connection, statements[0])) is not None:
        raise SpecError(f"results can only be read, and the query {other}", hint="Use select.")
    try:
        answer = connection.sql(sql)
        found = (answer if limit is None else answer.limit(limit)).to_arrow_table()
    except duckdb.IOException as error:
        raise failure("read", "the results", error) from None
    except duckdb.Error as error:
        raise _wrong(connection, error) from None
    return found.rename_columns(_each_once([_NAMES.get(name, name) for name in found.column_names]))


def _beside_reading(connection: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> str | None:
    """What the statement does that is not reading; None if it only reads.

    DuckDB lets the files be written that it may read: by COPY, also in the WITH of a SELECT, and where EXPLAIN ANALYZE
    carries one out.
    """
    text = statement.query
    if statement.type == duckdb.StatementType.EXPLAIN:
        try:
            inner = connection.extract_statements(text[found.end() :]) if (found := _EXPLAIN.match(text)) else []
        except duckdb.Error:
            inner = []
        select = [each.type for each in inner] == [duckdb.StatementType.SELECT]
        return None if select else "asks to explain something else than a plain select"
    if statement.type != duckdb.StatementType.SELECT:
        return f"is a statement of the kind {statement.type.name}"
    if "copy" in text.lower():  # asking for the plan looks into every file once more
        try:
            [(_, plan)] = connection.execute(f"EXPLAIN (FORMAT JSON) {text}").fetchall()
        except duckdb.Error:
            return None  # running it says what is wrong
        if any("COPY" in name for name in _operators(json.loads(plan))):
            return "writes files"
    return None


def _operators(plan: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    for each in plan:
        yield each["name"]
        yield from _operators(each["children"])


def _each_once(names: Sequence[str]) -> list[str]:
    """The names, with numbers for those that are there already."""
    once: dict[str, None] = {}
    for name in names:
        unique, number = name, 0
        while unique in once or (number and unique in names):
            number += 1
            unique = f"{name}_{number}"
        once[unique] = None
    return list(once)


def _wrong(connection: duckdb.DuckDBPyConnection, error: Exception) -> SpecError:
    # The first line is enough. The others suggest names, and the hint has the right ones.
    message = re.sub(r"^[A-Z][\w ]* Error:\s*", "", str(error).strip()).partition("\n")[0].strip()
    listed = []
    for view in ("results", "dead"):
        names = [row[0] for row in connection.execute(f"DESCRIBE {view}").fetchall()]
        listed.append(f"{view}({', '.join(names)})")
    return SpecError(f"the query cannot be answered: {message}", hint=f"There are {' and '.join(listed)}.")


def _local(place: str) -> Path:
    if not is_url(place):
        return Path(place)
    root, _, name = place.rpartition("/")
    return open_store(root).local_path(name)


def _list(paths: list[str]) -> str:
    return "[" + ", ".join(sql_text(path) for path in paths) + "]"


def _struct(types: dict[str, str]) -> str:
    return "{" + ", ".join(f"{sql_text(name)}: {sql_text(kind)}" for name, kind in types.items()) + "}"
