"""Which columns of a table a job uses, and for what: features, key, kept columns, time."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tally.sources.tables.formats import is_numeric
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

ORDER = "_order"
"""The column that holds a row's position in the whole input, from 0."""

RESERVED = (ORDER, "_first", "_rows")

AGGREGATES = ("mean", "min", "max", "last", "count", "std", "median")

UNITS = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}
"""Of times that are numbers since 1970: how many make a second."""


def quantile(aggregate: str) -> float | None:
    """The share of readings that an aggregate such as ``p95`` or ``p99.9`` lies above; None for another one."""
    match = re.fullmatch(r"p(\d{1,2}(?:\.\d{1,6})?)", aggregate)
    return float(match[1]) / 100 if match and float(match[1]) > 0 else None


@dataclass(frozen=True)
class TableRequest:
    """The columns asked for. features: names; n: the only n numeric columns; None: all columns.

    window: the length of windows in microseconds; None: rows are scored as they are.
    unit: of times that are numbers since 1970; None: their values tell. zone: whose days windows are.
    called: of kept columns that have another name in the results, that name.
    exact: features are no numbers of a model: they are read as they are written, zeros in front and all digits.
    """

    features: tuple[str, ...] | int | None = None
    by: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    where: str | None = None
    time: str | None = None
    window: int | None = None
    aggregate: tuple[str, ...] = ("mean",)
    unit: str | None = field(default=None, repr=False)
    zone: str | None = field(default=None, repr=False)
    called: Mapping[str, str] = field(default_factory=dict, repr=False)
    exact: bool = field(default=False, repr=False)

    @property
    def exact_features(self) -> tuple[str, ...]:
        """The names of features that are no numbers of a model."""
        return self.features if self.exact and isinstance(self.features, tuple) else ()

    @classmethod
    def of(
        cls,
        features: Sequence[str] | int | None,
        by: Sequence[str],
        keep: Sequence[str],
        where: str | None,
        time: str | None,
        window: float | None,
        aggregate: Sequence[str],
        unit: str | None = None,
        zone: str | None = None,
    ) -> TableRequest:
        """From what a user gives. window: in seconds. keep: ``NEW=COLUMN`` for another name in the results."""
        parts = [(each.rpartition("=")[2].strip(), each.rpartition("=")[0].strip()) for each in keep]
        return cls(
            features if features is None or isinstance(features, int) else tuple(features),
            tuple(by),
            tuple(old for old, _ in parts),
            where,
            time,
            None if window is None else round(window * 1_000_000),
            tuple(aggregate),
            unit,
            zone,
            {old: new for old, new in parts if new},
        )


@dataclass(frozen=True)
class Selection:
    """The columns found for a request.

    features: their names, in order. info: the columns that results carry, name to Arrow type name. inputs: the columns
    that are read, name to plain type, without those that only ``where`` names. aggregates: with a window, feature name
    to (column, aggregate). number: of windows over times that are numbers since 1970, the type of those.
    origin: of the columns in ``info`` that have another name than in the table, that name.
    """

    features: tuple[str, ...]
    info: Mapping[str, str]
    inputs: Mapping[str, pa.DataType]
    aggregates: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    number: pa.DataType | None = field(default=None, repr=False)
    origin: Mapping[str, str] = field(default_factory=dict, repr=False)


def select(schema: pa.Schema, request: TableRequest, *, paths: Collection[str] = ()) -> tuple[Selection, list[str]]:
    """The columns of a table that are asked for, and every problem with them.

    paths: those that stand in the paths of the files. If a model takes so many numeric columns, they are none of them.
    """
    import pyarrow as pa

    columns = _Columns(schema, paths)
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
    names = _names(columns, request, by, keep)
    info = _info(columns, names, time if request.window is not None else None)
    _check_reserved(columns, inputs)
    _check_held(columns, inputs, request)
    kinds = {name: columns.kinds[name] for name in dict.fromkeys(inputs)}
    number = None
    if request.window is not None and time is not None and is_numeric(kinds[time]):
        number, kinds[time] = kinds[time], pa.timestamp("us", "UTC")
    origin = {new: old for new, old in names.items() if new != old}
    return Selection(tuple(features), info, kinds, aggregates, number, origin), columns.problems


class _Columns:
    """The columns of the table, and the problems found with a request."""

    def __init__(self, schema: pa.Schema, paths: Collection[str]) -> None:
        self._paths = paths
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
        return [
            name
            for name in self.names
            if is_numeric(self.kinds[name]) and name not in besides and name not in self._paths
        ]


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
    numbers = time is not None and is_numeric(columns.kinds[time])
    if time is not None and not numbers and not _is_time(columns.kinds[time]):
        columns.problems.append(f"time: column {time!r} is {columns.kinds[time]}, not a timestamp")
    if request.unit is not None and not (numbers and request.window):
        columns.problems.append("time_unit: is for windows over times that are numbers since 1970")
    if request.zone is not None:
        columns.problems += _zone(request, zoned=numbers or time is None or "tz=" in str(columns.kinds[time]))
    if request.window is not None and request.time is None:
        columns.problems.append("window: needs 'time', the column of timestamps")
    return time


def _zone(request: TableRequest, *, zoned: bool) -> list[str]:
    """The problems with the time zone whose days windows are. zoned: whether it is known when times are."""
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(request.zone or "")
    except (OSError, ValueError, KeyError):  # what is not found is a KeyError
        return [f"timezone: there is no {request.zone!r}; an example is Europe/Berlin"]
    if request.window is None or request.window % _DAY:
        return ["timezone: is for windows of whole days, such as 1d; shorter ones are the same everywhere"]
    if not zoned:
        return [f"timezone: {request.time!r} has no zone, so its days are those of its own clock; leave timezone out"]
    return []


_DAY = 86_400_000_000


def _check_aggregates(columns: _Columns, request: TableRequest) -> None:
    columns.problems += [
        f"aggregate: there is no {name!r}{did_you_mean(name, AGGREGATES)} (quantiles are p5, p95, p99.9)"
        for name in request.aggregate
        if name not in AGGREGATES and quantile(name) is None
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
        there = f"there are {len(numeric)}: {_listed(numeric)}" if numeric else "there are none"
        others = {name: columns.kinds[name] for name in names if name not in numeric and name in columns.kinds}
        shown = _listed([f"{name} is {'text' if 'string' in str(kind) else kind}" for name, kind in others.items()])
        more = len(numeric) > asked
        named = "name them with --set features=a,b" if more else "is this a table such as it was made for?"
        columns.problems.append(f"the model takes {taken}, and {there}{f' ({shown})' if others else ''}; {named}")
    return found


def _names(columns: _Columns, request: TableRequest, by: Sequence[str], keep: Sequence[str]) -> dict[str, str]:
    """The columns that results carry: their names there, and in the table."""
    columns.problems += [
        f"keep: {old!r} is a column of the key, which keeps its name" for old in request.called if old in by
    ]
    names = {name: name for name in by}
    for old in keep:
        new = request.called.get(old, old)
        if new in names:
            columns.problems.append(f"keep: two columns would be called {new!r}")
        names[new] = old
    return names


def _info(columns: _Columns, names: Mapping[str, str], time: str | None) -> dict[str, str]:
    """The columns that results carry, and their types. time: of windows, the column that says when each begins."""
    from tally.sinks.columns import name_of, stored_type

    info = {new: name_of(stored_type(columns.kinds[old])) for new, old in names.items()}
    for new, old in names.items():
        if old == time:
            zoned = "tz=" in info[new] or is_numeric(columns.kinds[old])
            info[new] = "timestamp[us, tz=UTC]" if zoned else "timestamp[us]"
    if "key" in info:
        old = names["key"]
        columns.problems.append(
            f"column {old!r} cannot be kept as 'key': the results have a column of that name of their own; "
            f"--keep NEW={old} gives it another name"
        )
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
