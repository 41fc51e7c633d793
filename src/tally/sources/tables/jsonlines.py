"""JSON Lines: one object a line, read by DuckDB line by line, so that a bad line is a fault of that line alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tally.sources.tables.delimited import Fault, converted, forget_faults
from tally.sources.tables.type_inference import SAMPLE_ROWS, Kinds, Notation, Text, infer, unlike
from tally.sql import distinct_names, json_place, sql_name, sql_text

_LINE_BYTES = 16 << 20
_BUFFER_BYTES = 32 << 20
_PLAIN = "('BIGINT', 'UBIGINT', 'HUGEINT', 'DOUBLE', 'DECIMAL', 'BOOLEAN')"
_OBJECT = "coalesce(json_valid(text) AND ltrim(text, ' \t')[1] = '{', false)"


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


def _paths(names: Sequence[str]) -> str:
    """The columns' paths within an object, as a list of SQL."""
    return f"[{', '.join(sql_text(json_place(name)) for name in names)}]::VARCHAR[]"


def _values(relation: str, names: Sequence[str]) -> str:
    """The lines with their columns' values as text, in the list ``v``; null for a line that is no object."""
    return f"(SELECT *, CASE WHEN {_OBJECT} THEN json_extract_string(text, {_paths(names)}) END AS v FROM {relation})"  # noqa: S608


def infer_types(
    connection: Any, path: Path, closely: Callable[[str, Kinds], bool]
) -> tuple[dict[str, Kinds], dict[str, str]]:
    """The file's columns, in order of first appearance, with the kinds of their values.

    And of columns of text, most of whose values are something else, the first value that makes them so.
    closely: whether all values of a column have to be looked at, given those of the first rows.
    """
    connection.execute(
        f"CREATE OR REPLACE TEMP TABLE sample AS SELECT * FROM {_lines(path)} LIMIT {SAMPLE_ROWS}"  # noqa: S608
    )
    forget_faults(connection)
    count = connection.execute("SELECT count(*) FROM sample").fetchone()[0]
    keys = f"SELECT record, json_keys(text) AS keys FROM sample WHERE {_OBJECT}"  # noqa: S608
    named = f"SELECT record, unnest(keys) AS name, generate_subscripts(keys, 1) AS place FROM ({keys})"  # noqa: S608
    ordered = f"SELECT name FROM ({named}) GROUP BY name ORDER BY min(record), min(place)"  # noqa: S608
    names = [row[0] for row in connection.execute(ordered).fetchall()]
    found = _kinds(connection, "sample", names, {})
    odd = _odd(connection, "sample", names, found)
    connection.execute("DROP TABLE sample")
    if count < SAMPLE_ROWS:
        return found, odd
    every = f"SELECT DISTINCT unnest(json_keys(text)) FROM {_lines(path)} WHERE {_OBJECT}"  # noqa: S608
    later = sorted(row[0] for row in connection.execute(every).fetchall() if row[0] not in found)
    found |= dict.fromkeys(later, Kinds())
    looked = {name: kinds for name, kinds in found.items() if closely(name, kinds)}
    found |= _kinds(connection, _lines(path), list(looked), {name: kinds.usual for name, kinds in looked.items()})
    odd |= _odd(connection, _lines(path), [name for name in looked if name not in odd], found)
    forget_faults(connection)
    return found, odd


def _kinds(
    connection: Any, relation: str, names: Sequence[str], expected: Mapping[str, str | None]
) -> dict[str, Kinds]:
    if not names:
        return {}
    return infer(connection, *_typed(relation, names), Notation(), expected=expected)


def _odd(connection: Any, relation: str, names: Sequence[str], kinds: Mapping[str, Kinds]) -> dict[str, str]:
    mixed = [name for name in names if kinds[name] and kinds[name].exact == "VARCHAR" and kinds[name].mostly]
    return unlike(connection, *_typed(relation, mixed), kinds, Notation()) if mixed else {}


def _typed(relation: str, names: Sequence[str]) -> tuple[str, dict[str, Text]]:
    """The lines with their columns' values and types, and the columns."""
    typed = f"(SELECT *, json_type(text, {_paths(names)}) AS t FROM {_values(relation, names)} WHERE v IS NOT NULL)"  # noqa: S608
    return typed, {
        name: Text(f"v[{at}]", f"CASE WHEN t[{at}] IN {_PLAIN} THEN v[{at}] END") for at, name in enumerate(names, 1)
    }


def rows(path: Path, types: Mapping[str, str]) -> str:
    """The file's good rows, in order, with these columns. Names are as in :func:`distinct_names`."""
    called = distinct_names(list(types))
    cast = _casts(types)
    columns = ", ".join(f"{cast[name]} AS {sql_name(called[name])}" for name in types)
    return f"SELECT {columns} FROM {_values(_lines(path), list(types))} WHERE {_good(types)} ORDER BY record"  # noqa: S608


def faults(connection: Any, path: Path, types: Mapping[str, str], lines: str, good: int) -> Iterator[Fault]:
    """The lines that are not objects, or hold values of a wrong type. good: the number of the file's other lines.
    lines: what to call them in messages, before their number."""
    [records] = connection.execute(f"SELECT count(*) FROM {_lines(path)}").fetchone()  # noqa: S608
    if records == good:
        return
    cast = _casts(types)
    tests = [
        f"WHEN v[{at}] IS NOT NULL AND {cast[column]} IS NULL "
        f"THEN {{'column': {sql_text(column)}, 'value': v[{at}], 'kind': {sql_text(kind)}}}"
        for at, (column, kind) in enumerate(types.items(), 1)
    ]
    nothing = "{'column': NULL::VARCHAR, 'value': NULL::VARCHAR, 'kind': NULL::VARCHAR}"
    reason = f"CASE WHEN v IS NULL THEN {nothing} {' '.join(tests)} END"
    found = connection.execute(
        f"SELECT line, record, {reason} AS reason FROM {_values(_lines(path), list(types))} "  # noqa: S608
        f"WHERE NOT {_good(types)} ORDER BY record"
    ).fetchall()
    forget_faults(connection)
    for index, (line, record, reason) in enumerate(found):
        if reason is None or reason["column"] is None:
            message = f"{lines} {line}, column 1: not a JSON object"
        else:
            message = f"{lines} {line}, column {reason['column']}: {converted(reason['value'], reason['kind'])}"
        yield Fault(line, record - 1 - index, message)


def _casts(types: Mapping[str, str]) -> dict[str, str]:
    return {
        name: f"v[{at}]" if kind == "VARCHAR" else f"TRY_CAST(v[{at}] AS {kind})"
        for at, (name, kind) in enumerate(types.items(), 1)
    }


def _good(types: Mapping[str, str]) -> str:
    cast = _casts(types)
    checks = "".join(
        f" AND (v[{at}] IS NULL OR {cast[name]} IS NOT NULL)"
        for at, (name, kind) in enumerate(types.items(), 1)
        if kind != "VARCHAR"
    )
    return f"(v IS NOT NULL{checks})"
