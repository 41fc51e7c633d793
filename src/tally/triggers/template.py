"""What a schedule does: the file of a job, a training, a pipeline or a clean-up, with placeholders for each interval.

``{interval_start}`` and ``{interval_end}`` are the interval's times on the clock of the schedule's zone; with ``_utc``
appended, on UTC's. They are written in ISO 8601 with the offset, or in a format of ``strftime``:
``{interval_start:%Y/%m/%d}``. Other braces mean nothing here: ``{Device}`` belongs to a job.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC
from pathlib import Path
from typing import Any

from tally.errors import SpecError
from tally.jobs.spec import load
from tally.text import did_you_mean
from tally.triggers.cron import Cron, Interval
from tally.triggers.works.base import Work
from tally.triggers.works.kinds import kind_of

NAMES = ("interval_start", "interval_end", "interval_start_utc", "interval_end_utc")

_PLACEHOLDER = re.compile(r"\{(interval\w*)(?::([^{}]*))?\}")
_ARGO = re.compile(r"""^(?:\s*\{)?\s*["']?apiVersion["']?\s*:\s*["']?argoproj\.io/""", re.MULTILINE)
_MOST_LOOKED_AT = 1 << 20
_DAY = 86_400
_DISTANCES = (0, 0.5, 1, 7, 28, 29, 30, 31, 365, 366)
"""Days after which a format that omits something, such as the year, repeats itself."""
_NEIGHBOURS = 50


def read(path: str) -> dict[str, Any]:
    """The fields of a file, with absolute paths, as the file may go away. Raises SpecError or StorageError."""
    try:
        fields = {"pipeline": Path(path).name} if _is_argo(path) else load(path, "file")
        return settled(fields, Path(path).resolve().parent)
    except SpecError as error:
        if "{'interval" in error.message:
            error.hint = "In YAML a value that begins with a brace needs quotes: '{interval_start}'"
        raise


def settled(fields: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The fields of a file in this folder as they are kept. Raises SpecError."""
    return kind_of(fields).read(fields, folder)


def timing(fields: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """What the file itself says of when it is run, but for what is given otherwise. Raises SpecError."""
    return kind_of(fields).timing(fields, given)


def fill(fields: Mapping[str, Any], interval: Interval, cron: Cron) -> Work:
    """What is to be done for this interval. Raises SpecError with every problem."""
    kind = kind_of(fields)
    return kind.make(
        {name: value if name in kind.verbatim else _fill(value, interval, cron) for name, value in fields.items()}
    )


def is_the_same(fields: Mapping[str, Any]) -> bool:
    """Whether all intervals' are: no placeholder is in it."""
    return not any(True for _ in _placeholders(_open(fields)))


def _open(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields in which placeholders may stand."""
    return {name: value for name, value in fields.items() if name not in kind_of(fields).verbatim}


def _is_argo(path: str) -> bool:
    """Whether a file holds documents of Argo's."""
    try:
        with open(path, encoding="utf-8") as file:
            return _ARGO.search(file.read(_MOST_LOOKED_AT)) is not None
    except (OSError, UnicodeDecodeError):
        return False  # which who reads it tells


def check(fields: Mapping[str, Any], cron: Cron | None, moment: float) -> list[str]:
    """Every problem of runs after ``moment`` that can be found without running one.

    cron: None where it is not known; then it is not checked whether intervals are told apart.
    """
    problems = [
        f"{field}: there is no placeholder {name!r}{did_you_mean(name, NAMES)}"
        for field, name in _placeholders(_open(fields))
        if name not in NAMES
    ]
    kind = kind_of(fields)
    problems += kind.refusals(fields)
    clock = cron or Cron("0 * * * *", "UTC")
    sample, *others = _sample(clock, moment)
    try:
        fill(fields, sample, clock)
    except SpecError as error:
        problems += error.problems
    if problems or cron is None or (name := kind.distinct) is None:
        return problems
    if not any(field == name for field, _ in _placeholders(fields)):
        needs = "put {interval_start} into it, for example as {interval_start:%Y-%m-%dT%H%M}"
        return [
            f"{name}: names no interval ({fields[name]}): each run would write where the one before it did; {needs}"
        ]
    places = {_fill(fields[name], sample, cron): sample}
    for interval in others:
        place = _fill(fields[name], interval, cron)
        if (earlier := places.setdefault(place, interval)) != interval:
            return [f"{name}: two intervals would write to {place}: {_clash(earlier, interval, cron)}"]
    return []


def _sample(cron: Cron, moment: float) -> list[Interval]:
    """Intervals that an incomplete format may confuse: neighbours, the same time on other days, a repeated hour."""
    found = cron.next(moment, _NEIGHBOURS)
    begin = found[0].start
    for days in _DISTANCES:
        found += cron.next(begin + days * _DAY - 1, 1)
    at: float = begin
    for _ in range(2):
        if (change := cron.clock_change(at)) is not None:
            at = change[0]
            found += cron.starting(at - _DAY / 8, at + _DAY / 8)
    return list(dict.fromkeys(found))


def _clash(one: Interval, other: Interval, cron: Cron) -> str:
    first, second = sorted((one.start, other.start))
    text = f"those that begin at {cron.text(first)} and at {cron.text(second)}"
    if cron.local(first).replace(tzinfo=None, fold=0) == cron.local(second).replace(tzinfo=None, fold=0):
        return text + ", when the clock is set back; use {interval_start_utc:...}, or add %z to the format"
    return text + "; the format has to tell them apart"


def _placeholders(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """The field of each placeholder, and its name."""
    if isinstance(value, str):
        yield from ((field, found[1]) for found in _PLACEHOLDER.finditer(value))
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _placeholders(inner, f"{field}.{name}" if field else str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _placeholders(inner, field)


def _fill(value: Any, interval: Interval, cron: Cron) -> Any:
    if isinstance(value, str):
        return _PLACEHOLDER.sub(lambda found: _text(found[1], found[2], interval, cron), value)
    if isinstance(value, Mapping):
        return {name: _fill(inner, interval, cron) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_fill(inner, interval, cron) for inner in value]
    return value


def _text(name: str, form: str | None, interval: Interval, cron: Cron) -> str:
    local = cron.local(interval.start if "start" in name else interval.end)
    if name.endswith("_utc"):
        local = local.astimezone(UTC)
    if not form:
        return local.isoformat()
    # Python does not define %s; where the platform does, it depends on this host's time zone.
    form = re.sub("%(%|s)", lambda found: "%%" if found[1] == "%" else str(int(local.timestamp())), form)
    try:
        return local.strftime(form)
    except ValueError as error:
        raise SpecError(f"{{{name}:{form}}} cannot be written: {error}") from None
