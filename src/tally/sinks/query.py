"""SQL over results, with DuckDB. Nothing can be written, and nothing but the results can be read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import duckdb
import pyarrow as pa

from tally.errors import SpecError, StorageError
from tally.sinks.base import Output, Sink
from tally.sinks.columns import KEY, printable, schema_of, type_named
from tally.sinks.merge import CSV, plain_path
from tally.sql import sql_text
from tally.storage import failure, is_url, open_store, temporary

Dead: TypeAlias = "pa.Table | Iterable[Mapping[str, Any]]"

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
    return query(sink, outputs, "FROM results")


def _query(
    sink: Sink, outputs: list[Output], sql: str, dead: pa.Table, limit: int | None, memory: str | None
) -> pa.Table:
    kind, places = sink.committed(outputs)
    manifest = sink.manifest()
    with temporary.folder("query") as spill, duckdb.connect(":memory:") as connection:
        paths = [str(plain_path(_local(place), spill, number)) for number, place in enumerate(places)]
        connection.execute(f"SET temp_directory = {sql_text(spill)}")
        if memory is not None:
            connection.execute(f"SET memory_limit = {sql_text(memory)}")
        connection.execute("SET autoinstall_known_extensions = false; SET autoload_known_extensions = false")
        connection.execute("SET enable_external_file_cache = false")  # a file may be replaced between two queries
        connection.execute(f"SET python_enable_replacements = false; SET allowed_paths = {_list(paths)}")
        connection.execute("SET enable_external_access = false")
        try:
            _views(connection, kind, paths, dict((manifest or {}).get("schema", {})), dead)
        except duckdb.Error as error:
            raise failure("read", "the results", error) from None
        connection.execute("SET lock_configuration = true")
        return _answer(connection, sql, limit)


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
    connection.execute(f"CREATE VIEW results AS FROM {_reader(connection, kind, paths, types)}")


def _dead_table(dead: Dead) -> pa.Table:
    if isinstance(dead, pa.Table):
        return dead
    schema = schema_of(_DEAD)
    assert schema is not None
    rows = list(dead)
    return pa.table({name: [printable(str(row[name])) for row in rows] for name in schema.names}, schema=schema)


def _reader(connection: duckdb.DuckDBPyConnection, kind: str, paths: list[str], types: dict[str, str]) -> str:
    if kind == "parquet":
        return f"read_parquet({_list(paths)}, union_by_name = true)"
    # The types are known. DuckDB would infer a number for the label "007".
    duck = _duck_types(connection, types) if types else {}
    if kind == "csv":
        duck = {n: "VARCHAR" if t.endswith(("]", ")")) or t in ("BLOB", '"NULL"') else t for n, t in duck.items()}
        return f"read_csv({_list(paths)}, {CSV}, union_by_name = true, types = {_struct(duck)})"
    return f"read_json({_list(paths)}, format = 'newline_delimited', columns = {_struct(duck)})"


def _duck_types(connection: duckdb.DuckDBPyConnection, types: dict[str, str]) -> dict[str, str]:
    fields = []
    for name, kind in types.items():
        try:
            fields.append(pa.field(name, type_named(kind)))
        except SpecError:
            fields.append(pa.field(name, pa.string()))
    connection.register("described", pa.schema(fields).empty_table())
    found = connection.execute("DESCRIBE described").fetchall()
    connection.unregister("described")
    return {row[0]: row[1] for row in found}


def _answer(connection: duckdb.DuckDBPyConnection, sql: str, limit: int | None) -> pa.Table:
    try:
        statements = connection.extract_statements(sql)
    except duckdb.Error as error:
        raise _wrong(connection, error) from None
    if len(statements) != 1:
        what = "no statement" if not statements else f"{len(statements)} statements"
        raise SpecError(f"the query holds {what}", hint="Give one, such as: select * from results limit 10")
    if statements[0].type not in (duckdb.StatementType.SELECT, duckdb.StatementType.EXPLAIN):
        raise SpecError(
            f"results can only be read, and the query is a statement of the kind {statements[0].type.name}",
            hint="Use select.",
        )
    try:
        answer = connection.sql(sql)
        return (answer if limit is None else answer.limit(limit)).to_arrow_table()
    except duckdb.IOException as error:
        raise failure("read", "the results", error) from None
    except duckdb.Error as error:
        raise _wrong(connection, error) from None


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
