"""Types of columns that a file holds as text: found out from a sample, by DuckDB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_CELLS = 4_000_000
"""Values that are looked at to find out types, over all files; at least ``SAMPLE_ROWS`` rows of each file."""
SAMPLE_ROWS = 20_000

MOSTLY = 0.9
"""A column that has to hold numbers or times does, where this share of its values are such; the others are faults."""

_NUMBER = "[-+]?((0|[1-9][0-9]*)([.][0-9]*)?|[.][0-9]+)([eE][-+]?[0-9]+)?|(?i:nan|[-+]?inf(inity)?)"
_TESTS = {
    # What begins with a zero is a code and not a number: 08123.
    "BIGINT": (
        "regexp_full_match({text}, '[-+]?(0|[1-9][0-9]*)') AND TRY_CAST({text} AS BIGINT) IS NOT NULL",
        False,
    ),
    "DOUBLE": (
        f"regexp_full_match({{number}}, '{_NUMBER}') AND NOT (regexp_full_match({{text}}, '[-+]?[0-9]{{{{18,}}}}'))",
        False,
    ),
    "BOOLEAN": ("lower({text}) IN ('true', 'false')", False),
    "DATE": ("{date} IS NOT NULL AND length({text}) <= 10", True),
    "TIMESTAMP": ("{time} IS NOT NULL AND NOT ({zoned})", True),
    "TIMESTAMPTZ": ("TRY_CAST({text} AS TIMESTAMPTZ) IS NOT NULL", True),
}
_ZONED = "regexp_matches({text}, '[0-9] ?(Z|[-+][0-9]{{2}}(:?[0-9]{{2}})?)$') AND contains({text}, ':')"


@dataclass(frozen=True, slots=True)
class Guess:
    """strict: the DuckDB type that all sampled values have (VARCHAR if none; empty if there are no values). mostly:
    DOUBLE, TIMESTAMP or TIMESTAMPTZ where most of them are such."""

    strict: str
    mostly: str | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """A column as SQL. text: its text, NULL where it has no value. unquoted: NULL too where the file says that the
    value is a text and not a number."""

    text: str
    unquoted: str


def guess(
    connection: Any,
    relation: str,
    columns: Mapping[str, Text],
    *,
    decimal: str = ".",
    timestampformat: str | None = None,
    dateformat: str | None = None,
) -> dict[str, Guess]:
    """The types of a relation's columns of text."""
    found: dict[str, Guess] = {}
    names = list(columns)
    for start in range(0, len(names), 100):  # wide tables: a query's size is bounded
        part = names[start : start + 100]
        counts: list[str] = []
        for name in part:
            counts += _counts(columns[name], decimal, timestampformat, dateformat)
        row = connection.execute(f"SELECT {', '.join(counts)} FROM {relation}").fetchone()  # noqa: S608
        width = len(_TESTS) + 1
        for index, name in enumerate(part):
            found[name] = _decide(row[index * width : (index + 1) * width])
    return found


def _counts(column: Text, decimal: str, timestampformat: str | None, dateformat: str | None) -> list[str]:
    counts = [f"count({column.text})"]
    for test, times in _TESTS.values():
        text = f"trim({column.text if times else column.unquoted})"
        swapped = text if decimal == "." else f"replace({text}, {literal(decimal)}, '.')"
        date = f"try_strptime({text}, {literal(dateformat)})" if dateformat else f"TRY_CAST({text} AS DATE)"
        time = (
            f"try_strptime({text}, {literal(timestampformat)})" if timestampformat else f"TRY_CAST({text} AS TIMESTAMP)"
        )
        zoned = "false" if timestampformat else _ZONED.format(text=text)
        condition = test.format(text=text, number=swapped, date=date, time=time, zoned=zoned)
        counts.append(f"count(*) FILTER ({condition})")
    return counts


def _decide(counts: Sequence[Any]) -> Guess:
    total, numbers = counts[0], dict(zip(_TESTS, counts[1:], strict=True))
    # A date alone is a time, too; a time with a zone is read as one without it.
    numbers["DOUBLE"] = max(numbers["DOUBLE"], numbers["BIGINT"])
    numbers["TIMESTAMP"] = max(numbers["TIMESTAMP"], numbers["DATE"])
    if not total:
        return Guess("")
    strict = next((kind for kind in numbers if numbers[kind] == total), "VARCHAR")
    mostly = next((kind for kind in ("DOUBLE", "TIMESTAMP", "TIMESTAMPTZ") if numbers[kind] >= MOSTLY * total), None)
    return Guess(strict, mostly)


def arrow_type(connection: Any, kind: str) -> pa.DataType:
    """The Arrow type of a DuckDB type. Raises duckdb.Error for one that there is not."""
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


def identifier(name: str) -> str:
    """The name as SQL."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """The text as SQL."""
    return "'" + str(text).replace("'", "''") + "'"
