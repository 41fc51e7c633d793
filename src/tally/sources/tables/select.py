"""Which columns of a table a job takes, and as what: features, key, kept, time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tally.sources.tables.formats import is_numeric
from tally.text import did_you_mean

if TYPE_CHECKING:
    import pyarrow as pa

ORDER = "_order"
"""The column that tells where in the whole input a row stood, from 0."""

RESERVED = (ORDER, "_first", "_rows")

AGGREGATES = ("mean", "min", "max", "last", "count")


@dataclass(frozen=True)
class TableRequest:
    """What is asked for. features: names; n: the n numeric columns that there are; None: all columns.

    window: microseconds that a window takes; None: rows are scored as they are.
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
    """What was found for it.

    features: their names, in order. info: columns that results carry, name to Arrow type name. inputs: the columns
    that are read, name to plain type, but for those that only ``where`` names. aggregates: with a window, feature
    name to (column, what is made of it).
    """

    features: tuple[str, ...]
    info: Mapping[str, str]
    inputs: Mapping[str, pa.DataType]
    aggregates: Mapping[str, tuple[str, str]] = field(default_factory=dict)


def select(schema: pa.Schema, request: TableRequest) -> tuple[Selection, list[str]]:
    """The columns that are wanted of a table, and every problem that there is with them."""
    from tally.sinks.columns import name_of

    problems: list[str] = []
    names = schema.names
    kinds = dict(zip(names, schema.types, strict=True))

    def known(what: str, name: str) -> bool:
        if name in kinds:
            return True
        problems.append(f"{what}: there is no column {name!r}{did_you_mean(name, names)} (there are {_listed(names)})")
        return False

    for what, given in (("by", request.by), ("keep", request.keep)):
        twice = dict.fromkeys(name for name in given if given.count(name) > 1)
        problems += [f"{what}: {name!r} is named twice" for name in twice]
    by = [name for name in dict.fromkeys(request.by) if known("by", name)]
    problems += [
        f"by: column {name!r} holds {kinds[name]}, which cannot be a key" for name in by if _nested(kinds[name])
    ]
    time = request.time if request.time is not None and known("time", request.time) else None
    if time is not None and not _is_time(kinds[time]):
        problems.append(f"time: column {time!r} is {kinds[time]}, not a timestamp")
    if request.window is not None and request.time is None:
        problems.append("window: needs 'time', the column of timestamps")
    problems += [
        f"aggregate: there is no {name!r}{did_you_mean(name, AGGREGATES)}"
        for name in request.aggregate
        if name not in AGGREGATES
    ]
    if "*" in request.keep:
        keep = [name for name in names if name not in by]
    else:
        keep = [name for name in dict.fromkeys(request.keep) if name not in by and known("keep", name)]

    aggregates: dict[str, tuple[str, str]] = {}
    if request.window is not None:
        keep = _with_window(keep, by, time, request, problems)
        candidates = _aggregated(kinds, by, time, request.aggregate)
        features = _of(request.features, list(candidates), list(candidates), [], problems)
        aggregates = {name: candidates[name] for name in features}
        inputs = [*by, *([time] if time else []), *(column for column, made in aggregates.values() if made != "count")]
    else:
        numeric = [name for name in names if is_numeric(kinds[name]) and name not in by and name != time]
        features = _of(request.features, names, numeric, keep, problems)
        inputs = [*by, *features, *keep]
    info = {name: name_of(kinds[name]) for name in [*by, *keep]}
    if request.window is not None and time in info:
        info[time] = "timestamp[us, tz=UTC]" if "tz=" in info[time] else "timestamp[us]"
    if "key" in info:
        problems.append("column 'key' cannot be kept: the results have a column of that name of their own")
    reserved = [name for name in RESERVED if name in inputs]
    problems += [f"column {name!r} has a name that is used inside of Tally" for name in reserved]
    return Selection(tuple(features), info, {name: kinds[name] for name in dict.fromkeys(inputs)}, aggregates), problems


def _of(
    request: Sequence[str] | int | None,
    names: Sequence[str],
    numeric: Sequence[str],
    keep: Sequence[str],
    problems: list[str],
) -> list[str]:
    """The features: names that are asked for, or as many numeric columns as there have to be."""
    if request is None:
        return list(names)
    if not isinstance(request, int):
        for name in request:
            if name not in names:
                suggestion = did_you_mean(name, names)
                problems.append(f"the model takes a column {name!r}{suggestion} (there are {_listed(names)})")
        return [name for name in request if name in names]
    found = list(numeric)
    if len(found) != request:
        found = [name for name in numeric if name not in keep]
    if len(found) != request:
        columns = "1 numeric column" if request == 1 else f"{request} numeric columns"
        there = f"there are {len(numeric)}: {_listed(numeric)}" if numeric else f"there are none ({_listed(names)})"
        problems.append(f"the model takes {columns}, and {there}; name them with --set features=a,b")
    return found


def _aggregated(
    kinds: Mapping[str, pa.DataType], by: Sequence[str], time: str | None, aggregate: Sequence[str]
) -> dict[str, tuple[str, str]]:
    made: dict[str, tuple[str, str]] = {}
    for name, kind in kinds.items():
        if is_numeric(kind) and name not in by and name != time:
            made |= {f"{name}_{each}": (name, each) for each in aggregate if each != "count"}
    if "count" in aggregate:
        made["count"] = ("*", "count")
    return made


def _with_window(
    keep: list[str], by: Sequence[str], time: str | None, request: TableRequest, problems: list[str]
) -> list[str]:
    """What results of windows carry besides the key: the time at which each begins."""
    if "*" not in request.keep and (others := [name for name in keep if name != time]):
        problems.append(f"keep: {_listed(others)}: a window has many values of it; with 'window', only keys are kept")
    if time is not None and time in by:
        problems.append(f"time: column {time!r} is part of the key, too")
    return [time] if time is not None and time not in by else []


def _nested(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_nested(kind))


def _is_time(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _listed(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
