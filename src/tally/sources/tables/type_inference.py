"""Types of columns that a file holds as text, inferred from a sample by DuckDB."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tally.sql import sql_text

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_CELLS = 1_000_000
"""Values that are sampled over all files; at least ``SAMPLE_ROWS`` rows of each file."""
SAMPLE_ROWS = 20_000

MOSTLY, FEW = 0.9, 3
"""A column that should hold numbers or times is accepted if this share of its values, or all but a few, are such, and
more than half in any case. The others are faults."""

_KINDS = {
    # A value that begins with a zero, such as 08123, is a code and not a number.
    "BIGINT": "regexp_full_match({number}, '[-+]?(0|[1-9][0-9]{{0,17}})')",
    "DOUBLE": "regexp_full_match({number}, '[-+]?((0|[1-9][0-9]{{0,17}})([.][0-9]*)?|[.][0-9]+)([eE][-+]?[0-9]+)?"
    "|(?i:nan|[-+]?inf(inity)?)')",
    "BOOLEAN": "lower({plain}) IN ('true', 'false')",
    "DATE": "{date} IS NOT NULL",
    "TIMESTAMPTZ": "{zoned}",
    "TIMESTAMP": "{time} IS NOT NULL",
}
"""For each type, the test that a value is of it, if it is of none of the types before."""
_ZONED = (
    "regexp_matches({text}, '[0-9]:[0-9.:]+ ?(Z|[-+][0-9]{{2}}(:?[0-9]{{2}})?)$') "
    "AND TRY_CAST({text} AS TIMESTAMPTZ) IS NOT NULL"
)


@dataclass(frozen=True, slots=True)
class InferredType:
    """strict: the DuckDB type of all sampled values (VARCHAR if they have none in common; empty without values).
    mostly: DOUBLE, TIMESTAMP or TIMESTAMPTZ if most of them are such."""

    strict: str
    mostly: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A column as SQL. text: its text, NULL without a value. unquoted: the same, but NULL also if the file marks the
    value as text."""

    text: str
    unquoted: str


def infer(
    connection: Any,
    relation: str,
    columns: Mapping[str, Text],
    *,
    decimal: str = ".",
    timestampformat: str | None = None,
    dateformat: str | None = None,
) -> dict[str, InferredType]:
    """The types of a relation's text columns."""
    found: dict[str, InferredType] = {}
    names = list(columns)
    for start in range(0, len(names), 100):  # the size of a query is bounded, also for wide tables
        part = names[start : start + 100]
        kinds = [f"histogram({_kind(columns[name], decimal, timestampformat, dateformat)})" for name in part]
        row = connection.execute(f"SELECT {', '.join(kinds)} FROM {relation}").fetchone()  # noqa: S608
        found |= {name: _decide(counts or {}) for name, counts in zip(part, row, strict=True)}
    return found


def _kind(column: Text, decimal: str, timestampformat: str | None, dateformat: str | None) -> str:
    """An SQL expression for the type of a column's values. Each test is made only if those before it fail."""
    text, plain = f"trim({column.text})", f"trim({column.unquoted})"
    parts = {
        "text": text,
        "plain": plain,
        "number": plain if decimal == "." else f"replace({plain}, {sql_text(decimal)}, '.')",
        "date": f"try_strptime({text}, {sql_text(dateformat)})"
        if dateformat
        else f"CASE WHEN length({text}) <= 10 THEN TRY_CAST({text} AS DATE) END",
        "time": f"try_strptime({text}, {sql_text(timestampformat)})"
        if timestampformat
        else f"TRY_CAST({text} AS TIMESTAMP)",
        "zoned": "false" if timestampformat else _ZONED.format(text=text),
    }
    tests = " ".join(f"WHEN {test.format_map(parts)} THEN {sql_text(kind)}" for kind, test in _KINDS.items())
    return f"CASE WHEN {column.text} IS NULL THEN NULL {tests} ELSE 'VARCHAR' END"


def _decide(counts: Mapping[str, int]) -> InferredType:
    total = sum(counts.values())
    if not total:
        return InferredType("")
    numbers = {kind: counts.get(kind, 0) for kind in _KINDS}
    numbers["DOUBLE"] += numbers["BIGINT"]
    numbers["TIMESTAMP"] += numbers["DATE"]
    strict = next((kind for kind, number in numbers.items() if number == total), "VARCHAR")
    least = max(min(MOSTLY * total, total - FEW), total / 2 + 0.5)
    mostly = next((kind for kind in ("DOUBLE", "TIMESTAMP", "TIMESTAMPTZ") if numbers[kind] >= least), None)
    return InferredType(strict, mostly)


def arrow_type(connection: Any, kind: str) -> pa.DataType:
    """The Arrow type of a DuckDB type. Raises duckdb.Error for an unknown one."""
    import pyarrow as pa

    simple = {
        "BIGINT": pa.int64(),
        "DOUBLE": pa.float64(),
        "BOOLEAN": pa.bool_(),
        "DATE": pa.date32(),
        "TIMESTAMP": pa.timestamp("us"),
        "TIMESTAMPTZ": pa.timestamp("us", "UTC"),
        "VARCHAR": pa.string(),
    }
    if kind in simple:
        return simple[kind]
    return connection.sql(f"SELECT CAST(NULL AS {kind}) AS x").to_arrow_table().schema.field(0).type
