"""JSON Lines: one object a line, read by DuckDB line by line, so that a bad line is a fault of that line alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tally.sources.tables.delimited import Fault, forget_faults
from tally.sources.tables.type_inference import InferredType, Text, infer
from tally.sql import sql_name, sql_text

_LINE_BYTES = 16 << 20
_BUFFER_BYTES = 32 << 20
_PLAIN = "('BIGINT', 'UBIGINT', 'HUGEINT', 'DOUBLE', 'DECIMAL', 'BOOLEAN')"


def _lines(path: Path) -> str:
    """The lines that are not empty, with their line and record numbers, from 1."""
    packed = ", compression = 'gzip'" if path.suffix.lower() == ".gz" else ""
    read = (
        f"read_csv({sql_text(path)}, auto_detect = false, columns = {{'text': 'VARCHAR'}}, delim = '\x01', "
        f"quote = '', escape = '', header = false, max_line_size = {_LINE_BYTES}, "
        f"buffer_size = {_BUFFER_BYTES}, store_rejects = true{packed})"
    )
    numbered = f"SELECT text, row_number() OVER () AS line FROM {read}"  # noqa: S608
    return f"(SELECT *, row_number() OVER () AS record FROM ({numbered}) WHERE trim(text, ' \t\r') <> '')"  # noqa: S608


def _value(name: str) -> str:
    return f"json_extract_string(text, {_path(name)})"


def _path(name: str) -> str:
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return sql_text(f'$."{escaped}"')


def infer_types(connection: Any, path: Path, rows: int) -> tuple[dict[str, InferredType], bool]:
    """The file's columns, in order of first appearance, with their types from its first rows; and whether those are all
    of its rows."""
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE sample AS SELECT * FROM {_lines(path)} LIMIT {rows}"  # noqa: S608
    )
    forget_faults(connection)
    count = connection.execute("SELECT count(*) FROM sample").fetchone()[0]
    connection.execute(
        "DELETE FROM sample WHERE NOT coalesce(json_valid(text), false) OR "
        "CASE WHEN json_valid(text) THEN json_type(text) <> 'OBJECT' ELSE true END"
    )
    names = [
        row[0]
        for row in connection.execute(
            "SELECT name FROM (SELECT record, unnest(json_keys(text)) AS name, "
            "generate_subscripts(json_keys(text), 1) AS place FROM sample) "
            "GROUP BY name ORDER BY min(record), min(place)"
        ).fetchall()
    ]
    columns = {
        name: Text(
            _value(name),
            f"CASE WHEN json_type(text, {_path(name)}) IN {_PLAIN} THEN {_value(name)} END",
        )
        for name in names
    }
    found = infer(connection, "sample", columns) if names else {}
    connection.execute("DROP TABLE sample")
    return found, count < rows


def rows(path: Path, types: Mapping[str, str]) -> str:
    """The file's good rows, in order, with these columns."""
    columns = ", ".join(f"{_cast(name, kind)} AS {sql_name(name)}" for name, kind in types.items())
    return f"SELECT {columns} FROM {_lines(path)} WHERE {_good(types)} ORDER BY record"  # noqa: S608


def faults(connection: Any, path: Path, types: Mapping[str, str], name: str) -> Iterator[Fault]:
    """The lines that are not objects, or hold values of a wrong type."""
    tests = [
        f"WHEN {_value(column)} IS NOT NULL AND {_cast(column, kind)} IS NULL "
        f"THEN {{'column': {sql_text(column)}, 'value': {_value(column)}, 'kind': {sql_text(kind)}}}"
        for column, kind in types.items()
    ]
    nothing = "{'column': NULL::VARCHAR, 'value': NULL::VARCHAR, 'kind': NULL::VARCHAR}"
    reason = f"CASE WHEN NOT {_object()} THEN {nothing} {' '.join(tests)} END"
    found = connection.execute(
        f"SELECT line, record, {reason} AS reason FROM {_lines(path)} "  # noqa: S608
        f"WHERE NOT {_good(types)} ORDER BY record"
    ).fetchall()
    forget_faults(connection)
    for index, (line, record, reason) in enumerate(found):
        if reason is None or reason["column"] is None:
            message = f"{name}, line {line}, column 1: not a JSON object"
        else:
            message = (
                f"{name}, line {line}, column {reason['column']}: "
                f"could not convert {reason['value'][:100]!r} to {reason['kind']}"
            )
        yield Fault(line, record - 1 - index, message)


def _cast(name: str, kind: str) -> str:
    return _value(name) if kind == "VARCHAR" else f"TRY_CAST({_value(name)} AS {kind})"


def _object() -> str:
    return "(CASE WHEN json_valid(text) THEN json_type(text) = 'OBJECT' ELSE false END)"


def _good(types: Mapping[str, str]) -> str:
    checks = "".join(
        f" AND ({_value(name)} IS NULL OR {_cast(name, kind)} IS NOT NULL)"
        for name, kind in types.items()
        if kind != "VARCHAR"
    )
    return f"({_object()}{checks})" if not checks else f"(CASE WHEN {_object()} THEN true{checks} ELSE false END)"
