"""Types of columns that a file holds as text, inferred by DuckDB from all of their values.

A sample says what a column seems to hold. The other rows are tested for that, which costs little; only values that do
not pass are looked at closely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from tally.sql import sql_text

if TYPE_CHECKING:
    import pyarrow as pa

SAMPLE_ROWS = 20_000
"""Rows of each file that are sampled."""

LOOKED_AT = 64
"""The most files whose types are inferred. Further ones have to be like them."""

MOSTLY, FEW = 0.9, 3
"""A column that should hold numbers or times is accepted if this share of its values, or all but a few, are such, and
more than half in any case. The others are faults."""

_FLOAT = "(?:(?:0|[1-9][0-9]*)(?:[.][0-9]*)?|[.][0-9]+)(?:[eE][-+]?[0-9]+)?"
_DATE = "[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}"
_TIME = f"{_DATE}[ T][0-9]{{1,2}}:[0-9]{{2}}(?::[0-9]{{2}}(?:[.][0-9]{{1,6}}0*)?)?"
_ZONED = f"{_TIME} ?(?:Z|[-+][0-9]{{2}}(?::?[0-9]{{2}})?)"

_KINDS = {
    # What begins with a zero or a plus sign, such as 08123, may be a code: a number would not tell.
    "BIGINT": "regexp_full_match({number}, '0|-?[1-9][0-9]{{0,14}}')",
    "LONG": "regexp_full_match({number}, '-?[1-9][0-9]{{15,18}}') AND TRY_CAST({number} AS BIGINT) IS NOT NULL",
    "HUGE": "regexp_full_match({number}, '[+]?(0|[1-9][0-9]*)|-?[1-9][0-9]*')",
    "DOUBLE": "regexp_full_match({number}, '-?{float}|(?i:nan|[-+]?inf(inity)?)') AND {held}",
    "NUMBER": "regexp_full_match({number}, '[-+]?{float}')",
    "BOOLEAN": "lower({plain}) IN ('true', 'false')",
    "DATE": "{date}",
    "TIMESTAMPTZ": "{zoned}",
    "TIMESTAMP": "{time}",
}
"""For each kind of value, the test for it, if it is of none of the kinds before.

LONG: an integer whose last digits a float64 may lose. HUGE: one that int64 does not hold, or that has a plus sign.
NUMBER: a fraction whose last digits a float64 loses. The others are types of DuckDB."""
_HELD = (
    "(regexp_full_match({number}, '[-0-9.]{{1,16}}|(?i:[-+]?[a-z]+)') "
    "OR TRY_CAST({number} AS DOUBLE)::VARCHAR = {number} OR {digits} = "
    "regexp_replace(format('{{:.{{}}e}}', TRY_CAST({number} AS DOUBLE), greatest(length({digits}), 1) - 1), "
    "'[eE].*|[^0-9]', '', 'g'))"
)
"""Whether a float64 tells all digits of a number: rounded to as many, it has the same ones."""
_DIGITS = "ltrim(regexp_replace({number}, '[eE].*|[^0-9]', '', 'g'), '0')"


@dataclass(frozen=True, slots=True)
class Kinds:
    """How many values of a column are of each kind; VARCHAR are those of no other. They add up over files."""

    counts: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Kinds) -> Kinds:
        return Kinds(Counter(self.counts) + Counter(other.counts))

    def __bool__(self) -> bool:
        return any(self.counts.values())

    @property
    def usual(self) -> str | None:
        """The kind of most values."""
        return max(self.counts, key=self.counts.__getitem__, default=None)

    @property
    def numbers(self) -> bool:
        """Whether there are numbers."""
        return any(self.counts.get(kind) for kind in _ALIKE["DOUBLE"])

    @property
    def exact(self) -> str:
        """The DuckDB type that holds all values to the last digit; VARCHAR if no other does, or there is no value."""
        return self._type("BIGINT", "DOUBLE")

    @property
    def rounded(self) -> str:
        """As :attr:`exact`, with fractions as float64 however many digits they have."""
        return self._type("BIGINT", "DOUBLE", "NUMBER")

    @property
    def differs_in_zones(self) -> bool:
        """Whether some times have a zone, and others have none: it is not known when those were."""
        return bool(self.counts.get("TIMESTAMPTZ")) and any(self.counts.get(each) for each in _ALIKE["TIMESTAMP"])

    @property
    def mostly(self) -> str | None:
        """DOUBLE, TIMESTAMP or TIMESTAMPTZ if most values are such. Times with a zone are none of those without."""
        if self.differs_in_zones:
            return None
        total = sum(self.counts.values())
        least = max(min(MOSTLY * total, total - FEW), total / 2 + 0.5)
        for kind, alike in _ALIKE.items():
            if sum(self.counts.get(each, 0) for each in alike) >= least:
                return kind
        return None

    def _type(self, *floats: str) -> str:
        found = {kind for kind, count in self.counts.items() if count}
        if len(found) == 1 and found <= {"BOOLEAN", "DATE", "TIMESTAMP", "TIMESTAMPTZ"}:
            return next(iter(found))
        for kind, held in (
            ("BIGINT", {"BIGINT", "LONG"}),
            ("DOUBLE", set(floats)),
            ("TIMESTAMP", {"DATE", "TIMESTAMP"}),
        ):
            if found and found <= held:
                return kind
        return "VARCHAR"


_ALIKE = {
    "DOUBLE": ("BIGINT", "LONG", "HUGE", "DOUBLE", "NUMBER"),
    "TIMESTAMP": ("DATE", "TIMESTAMP"),
    "TIMESTAMPTZ": ("TIMESTAMPTZ",),
}


@dataclass(frozen=True, slots=True)
class Text:
    """A column as SQL. text: its text, NULL without a value. unquoted: the same, but NULL also if the file marks the
    value as text."""

    text: str
    unquoted: str


@dataclass(frozen=True, slots=True)
class Notation:
    """How a file writes numbers and times; None is ISO 8601."""

    decimal: str = "."
    thousands: str = ""
    timestampformat: str | None = None
    dateformat: str | None = None


def _batched(names: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    rest = iter(names)
    while part := tuple(islice(rest, size)):
        yield part


def infer(
    connection: Any,
    relation: str,
    columns: Mapping[str, Text],
    notation: Notation,
    *,
    expected: Mapping[str, str | None] | None = None,
) -> dict[str, Kinds]:
    """The kinds of values in a relation's text columns. expected: the kind that most of a column's values are of."""
    found: dict[str, Kinds] = {}
    for part in _batched(columns, 100):  # the size of a query is bounded, also for wide tables
        kinds = [f"histogram({_kind(columns[name], notation, (expected or {}).get(name))})" for name in part]
        row = connection.execute(f"SELECT {', '.join(kinds)} FROM {relation}").fetchone()  # noqa: S608
        found |= {name: Kinds(counts or {}) for name, counts in zip(part, row, strict=True)}
    return found


def unlike(
    connection: Any, relation: str, columns: Mapping[str, Text], kinds: Mapping[str, Kinds], notation: Notation
) -> dict[str, str]:
    """Of the columns that hold text: the first value that is not of the kind that most are of, or else no number."""
    asked = {
        name: f"first({text.text}) FILTER (WHERE {_kind(text, notation)} NOT IN ({alike}))"
        for name, text in columns.items()
        if kinds[name] and kinds[name].exact == "VARCHAR"
        for alike in [", ".join(map(sql_text, _ALIKE[kinds[name].mostly or "DOUBLE"]))]
    }
    found: dict[str, str] = {}
    for part in _batched(asked, 100):
        row = connection.execute(f"SELECT {', '.join(asked[name] for name in part)} FROM {relation}").fetchone()  # noqa: S608
        found |= {name: value for name, value in zip(part, row, strict=True) if value is not None}
    return found


def _kind(column: Text, notation: Notation, expected: str | None = None) -> str:
    """An SQL expression for the kind of a column's values. Each test is made only if those before it fail."""
    tests = [
        (test, kind) for kind, test in _tests(f"trim({column.text})", f"trim({column.unquoted})", notation).items()
    ]
    if expected is not None and expected in _KINDS:
        # Most values have no blanks around them: to look for some costs as much as the test.
        tests.insert(0, (_tests(column.text, column.unquoted, notation)[expected], expected))
    cases = " ".join(f"WHEN {test} THEN {sql_text(kind)}" for test, kind in tests)
    return f"CASE WHEN {column.text} IS NULL THEN NULL {cases} ELSE 'VARCHAR' END"


def _tests(text: str, plain: str, notation: Notation) -> dict[str, str]:
    """The test for each kind. text, plain: as in :class:`Text`."""
    number = plain
    if notation.thousands:
        number = f"replace({number}, {sql_text(notation.thousands)}, '')"
    if notation.decimal != ".":
        number = f"replace({number}, {sql_text(notation.decimal)}, '.')"
    date, time = notation.dateformat, notation.timestampformat
    parts = {
        "plain": plain,
        "number": number,
        "float": _FLOAT,
        "date": f"try_strptime({text}, {sql_text(date)}) IS NOT NULL" if date else _cast(text, _DATE, "DATE"),
        "time": f"try_strptime({text}, {sql_text(time)}) IS NOT NULL" if time else _cast(text, _TIME, "TIMESTAMP"),
        "zoned": "false" if time else _cast(text, _ZONED, "TIMESTAMPTZ"),
    }
    parts["digits"] = _DIGITS.format_map(parts)
    parts["held"] = _HELD.format_map(parts)
    return {kind: test.format_map(parts) for kind, test in _KINDS.items()}


def _cast(text: str, pattern: str, kind: str) -> str:
    # By itself, DuckDB takes 12-3-4 for a date of the year 12, and cuts nanoseconds off.
    return f"regexp_full_match({text}, {sql_text(pattern)}) AND TRY_CAST({text} AS {kind}) IS NOT NULL"


def arrow_type(connection: Any, kind: str) -> pa.DataType:
    """The Arrow type of a DuckDB type. Raises duckdb.Error for an unknown one."""
    import pyarrow as pa

    if kind in INFERRED:
        return {"TIMESTAMP": pa.timestamp("us"), "TIMESTAMPTZ": pa.timestamp("us", "UTC")}.get(kind) or (
            pa.type_for_alias(INFERRED[kind])
        )
    return connection.sql(f"SELECT CAST(NULL AS {kind}) AS x").to_arrow_table().schema.field(0).type


INFERRED = {
    "BIGINT": "int64",
    "DOUBLE": "float64",
    "BOOLEAN": "bool",
    "DATE": "date32",
    "TIMESTAMP": "timestamp[us]",
    "TIMESTAMPTZ": "timestamp[us, tz=UTC]",
    "VARCHAR": "string",
}
"""The DuckDB types that are inferred, and the names of Arrow's."""
