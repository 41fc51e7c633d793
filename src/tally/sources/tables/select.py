"""Which columns of a table a job uses, and for what: features, key, kept columns, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tally.sources.tables.formats import is_numeric
from tally.sql import sql_name
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

ORDER = "_order"
"""The column that holds a row's position in the whole input, from 0."""

RESERVED = (ORDER, "_first", "_rows")

AGGREGATES = ("mean", "min", "max", "last", "count")


@dataclass(frozen=True)
class TableRequest:
    """The columns asked for. features: names; n: the only n numeric columns; None: all columns.

    window: the length of windows in microseconds; None: rows are scored as they are.
    """

    features: tuple[str, ...] | int | None = None
    by: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    where: str | None = None
    time: str | None = None
    window: int | None = None
    aggregate: tuple[str, ...] = ("mean",)


@dataclass(frozen=True)
class Selection:
    """The columns found for a request.

    features: their names, in order. info: the columns that results carry, name to Arrow type name. inputs: the columns
    that are read, name to plain type, without those that only ``where`` names. aggregates: with a window, feature name
    to (column, aggregate).
    """

    features: tuple[str, ...]
    info: Mapping[str, str]
    inputs: Mapping[str, pa.DataType]
    aggregates: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def select(schema: pa.Schema, request: TableRequest) -> tuple[Selection, list[str]]:
    """The columns of a table that are asked for, and every problem with them."""
    columns = _Columns(schema)
    by = _key(columns, request)
    time = _time(columns, request)
    _check_aggregates(columns, request)
    keep = _kept(columns, request, by)
    if request.window is None:
        aggregates: dict[str, tuple[str, str]] = {}
        features = _features_of_rows(columns, request, by, time, keep)
        inputs = [*by, *features, *keep]
    else:
        keep = _kept_of_windows(columns, request, by, time, keep)
        aggregates = _features_of_windows(columns, request, by, time)
        features = list(aggregates)
        read = [column for column, how in aggregates.values() if how != "count"]
        inputs = [*by, *([time] if time else []), *read]
    info = _info(columns, [*by, *keep], time if request.window is not None else None)
    _check_reserved(columns, inputs)
    _check_held(columns, inputs, request)
    kinds = {name: columns.kinds[name] for name in dict.fromkeys(inputs)}
    return Selection(tuple(features), info, kinds, aggregates), columns.problems


class _Columns:
    """The columns of the table, and the problems found with a request."""

    def __init__(self, schema: pa.Schema) -> None:
        self.names: list[str] = schema.names
        self.kinds: dict[str, pa.DataType] = dict(zip(schema.names, schema.types, strict=True))
        self.problems: list[str] = []

    def has(self, option: str, name: str) -> bool:
        """Whether there is such a column. If not, that is a problem of the option."""
        if name in self.kinds:
            return True
        suggestion = did_you_mean(name, self.names)
        self.problems.append(f"{option}: there is no column {name!r}{suggestion} (there are {_listed(self.names)})")
        return False

    def numeric(self, *, besides: Sequence[str | None]) -> list[str]:
        """The numeric columns, without those in ``besides``."""
        return [name for name in self.names if is_numeric(self.kinds[name]) and name not in besides]


def _key(columns: _Columns, request: TableRequest) -> list[str]:
    """The columns that make a key. Checks also that none is named twice, in ``by`` or in ``keep``."""
    for option, given in (("by", request.by), ("keep", request.keep)):
        twice = dict.fromkeys(name for name in given if given.count(name) > 1)
        columns.problems += [f"{option}: {name!r} is named twice" for name in twice]
    by = [name for name in dict.fromkeys(request.by) if columns.has("by", name)]
    columns.problems += [
        f"by: column {name!r} holds {columns.kinds[name]}, which cannot be a key"
        for name in by
        if _nested(columns.kinds[name])
    ]
    return by


def _time(columns: _Columns, request: TableRequest) -> str | None:
    """The column of timestamps, if there is one."""
    time = request.time if request.time is not None and columns.has("time", request.time) else None
    if time is not None and not _is_time(columns.kinds[time]):
        columns.problems.append(
            f"time: column {time!r} is {columns.kinds[time]}, not a timestamp" + _made(columns, time)
        )
    if request.window is not None and request.time is None:
        columns.problems.append("window: needs 'time', the column of timestamps")
    return time


def _made(columns: _Columns, time: str) -> str:
    """How numbers since 1970 become times."""
    if not is_numeric(columns.kinds[time]):
        return ""
    made = f"REPLACE (to_timestamp({sql_name(time)}) AS {sql_name(time)})"
    how = f"COPY (SELECT * {made} FROM 'FILE') TO 'FILE.parquet'"  # noqa: S608  # to be read
    return f"; seconds since 1970 become times by DuckDB: {how}"


def _check_aggregates(columns: _Columns, request: TableRequest) -> None:
    columns.problems += [
        f"aggregate: there is no {name!r}{did_you_mean(name, AGGREGATES)}"
        for name in request.aggregate
        if name not in AGGREGATES
    ]


def _kept(columns: _Columns, request: TableRequest, by: Sequence[str]) -> list[str]:
    """The columns that results carry besides the key, as asked for."""
    if "*" in request.keep:
        return [name for name in columns.names if name not in by]
    return [name for name in dict.fromkeys(request.keep) if name not in by and columns.has("keep", name)]


def _kept_of_windows(
    columns: _Columns, request: TableRequest, by: Sequence[str], time: str | None, keep: Sequence[str]
) -> list[str]:
    """The columns that results of windows carry besides the key: the time at which each begins."""
    if "*" not in request.keep and (others := [name for name in keep if name != time]):
        columns.problems.append(
            f"keep: {_listed(others)}: a window has many values of it; with 'window', only keys are kept"
        )
    if time is not None and time in by:
        columns.problems.append(f"time: column {time!r} is part of the key, too")
    return [time] if time is not None and time not in by else []


def _features_of_rows(
    columns: _Columns, request: TableRequest, by: Sequence[str], time: str | None, keep: Sequence[str]
) -> list[str]:
    return _features(columns, request.features, columns.names, columns.numeric(besides=[*by, time]), keep)


def _features_of_windows(
    columns: _Columns, request: TableRequest, by: Sequence[str], time: str | None
) -> dict[str, tuple[str, str]]:
    """Feature name to column and aggregate."""
    made = {
        f"{name}_{how}": (name, how)
        for name in columns.numeric(besides=[*by, time])
        for how in request.aggregate
        if how != "count"
    }
    if "count" in request.aggregate:
        made["count"] = ("*", "count")
    return {name: made[name] for name in _features(columns, request.features, list(made), list(made), [])}


def _features(
    columns: _Columns,
    asked: Sequence[str] | int | None,
    names: Sequence[str],
    numeric: Sequence[str],
    keep: Sequence[str],
) -> list[str]:
    """The features among ``names``: those asked for by name, or the numeric ones if their number is right."""
    if asked is None:
        return list(names)
    if not isinstance(asked, int):
        columns.problems += [
            f"the model takes a column {name!r}{did_you_mean(name, names)} (there are {_listed(names)})"
            for name in asked
            if name not in names
        ]
        return [name for name in asked if name in names]
    found = list(numeric)
    if len(found) != asked:
        found = [name for name in numeric if name not in keep]
    if len(found) != asked:
        taken = "1 numeric column" if asked == 1 else f"{asked} numeric columns"
        there = f"there are {len(numeric)}: {_listed(numeric)}" if numeric else f"there are none ({_listed(names)})"
        columns.problems.append(f"the model takes {taken}, and {there}; name them with --set features=a,b")
    return found


def _info(columns: _Columns, names: Sequence[str], time: str | None) -> dict[str, str]:
    """The columns that results carry, and their types. time: of windows, the column that says when each begins."""
    from tally.sinks.columns import name_of, stored_type

    info = {name: name_of(stored_type(columns.kinds[name])) for name in names}
    if time in info:
        info[time] = "timestamp[us, tz=UTC]" if "tz=" in info[time] else "timestamp[us]"
    if "key" in info:
        columns.problems.append("column 'key' cannot be kept: the results have a column of that name of their own")
    return info


def _check_reserved(columns: _Columns, inputs: Sequence[str]) -> None:
    columns.problems += [
        f"column {name!r} has a name that is used inside of Tally" for name in RESERVED if name in inputs
    ]


def _check_held(columns: _Columns, names: Sequence[str], request: TableRequest) -> None:
    """Columns of types that cannot be read, or not to the last digit."""
    import pyarrow as pa

    arranged = bool(request.by or request.where or request.window)
    for name in dict.fromkeys(names):
        kind = columns.kinds[name]
        if kind == pa.month_day_nano_interval():
            columns.problems.append(
                f"column {name!r} holds {kind}, which is not read; write it as text, or leave it out"
            )
        elif arranged and not name:
            columns.problems.append("a column has no name: with by, where or window it cannot be read; give it one")
        elif arranged and pa.types.is_decimal(kind) and kind.precision > 38:
            columns.problems.append(f"column {name!r} holds {kind}: with by, where or window it would lose digits")


def _nested(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_nested(kind))


def _is_time(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
