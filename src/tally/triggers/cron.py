"""When a schedule ticks: cron's five fields, read on the clock of a time zone.

Local times that the clock skips or repeats are treated as Debian's cron does:

- If minutes and hours are both numbers, lists or ranges (``30 2 * * *``), they name times of day. Each ticks once a
  day: a skipped time ticks at the first moment after the gap, a repeated one only the first time.
- If one of them begins with ``*`` (``0 * * * *``, ``*/15 * * * *``), every matching time that the clock shows is a
  tick: a skipped time has none, and a repeated one has two.

All ticks of a day are computed together, so that different questions never get contradicting answers. The intervals
between neighbouring ticks tile time, without gap or overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from itertools import pairwise
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from tally.errors import SpecError
from tally.text import did_you_mean

GRACE_SECONDS = 60.0
"""A tick that is noticed later than this was missed: catch-up decides about it."""
_DAY = 86_400
_SPANS = (_DAY, 8 * _DAY, 70 * _DAY, 1500 * _DAY, 30_000 * _DAY)
"""Seconds in which to look for a neighbouring tick, in turn. 29 February on a Monday comes every 28 or 40 years."""
_YEARS = (1971, 2200)
"""There are no ticks outside these years."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The time from one tick to the next, in epoch seconds. It is run at its end."""

    start: int
    end: int


def zone(name: str) -> ZoneInfo:
    """The time zone by its IANA name. Raises SpecError."""
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, LookupError):  # not a path, a folder of zones, nothing at all
        from zoneinfo import available_timezones

        raise SpecError(
            f"timezone: there is no time zone {name!r}" + did_you_mean(name, available_timezones()),
            hint="Zones have the names of the IANA database, such as UTC, Europe/Berlin or America/New_York.",
        ) from None


class Cron:
    """The ticks of ``expression`` on the clock of ``timezone``. Times are whole epoch seconds.

    Raises SpecError with everything that is wrong with either.
    """

    def __init__(self, expression: str, timezone: str) -> None:
        problems, hints = [], []
        self.expression = " ".join(expression.split())
        try:
            self.zone = zone(timezone)
        except SpecError as error:
            problems += error.problems
            hints.append(error.hint)
        fields = self.expression.split()
        try:
            if len(fields) != 5:
                raise CronSimError(f"it has {len(fields)} fields, not 5")
            self._fields = CronSim(self.expression, datetime(2000, 1, 1))  # noqa: DTZ001 - only its fields are used
        except CronSimError as error:
            problem = str(error)
            problems.append(f"cron: {expression!r} cannot be understood: {problem[:1].lower()}{problem[1:]}")
            hints.append("The fields are minute, hour, day, month and weekday: '0 * * * *' is every full hour.")
        if problems:
            raise SpecError(problems, hint="\n  ".join(hint for hint in hints if hint))
        self._elapsed = fields[0].startswith("*") or fields[1].startswith("*")
        # Consecutive questions are about the same days.
        self._on = lru_cache(maxsize=64)(self._ticks_on)

    def ticks(self, start: float, end: float) -> list[int]:
        """The ticks in ``start <= tick < end``, in order."""
        first, last = (_clipped(moment) for moment in (start, end))
        # Local days begin and end within a day of UTC's.
        day = datetime.fromtimestamp(first, UTC).date() - timedelta(days=1)
        stop = datetime.fromtimestamp(last, UTC).date() + timedelta(days=1)
        found: set[int] = set()
        while day <= stop:
            found.update(tick for tick in self._on(day) if start <= tick < end)
            day += timedelta(days=1)
        return sorted(found)

    def after(self, moment: float) -> int:
        """The first tick after it. Raises SpecError if there is none."""
        for span in _SPANS:
            if found := self.ticks(int(moment) + 1, moment + span):
                return found[0]
        raise SpecError(f"cron: {self.expression!r} never comes to pass after {self.text(moment)}")

    def before(self, moment: float) -> int:
        """The last tick before it. Raises SpecError if there is none."""
        for span in _SPANS:
            if found := self.ticks(moment - span, moment):
                return found[-1]
        raise SpecError(f"cron: {self.expression!r} never came to pass before {self.text(moment)}")

    def ending(self, after: float, until: float) -> list[Interval]:
        """The intervals that are to be run in ``after < end <= until``: those that end then."""
        return self._between(self.ticks(int(after) + 1, int(until) + 1), back=True)

    def starting(self, start: float, stop: float) -> list[Interval]:
        """The intervals that begin in ``start <= t < stop``. Of ranges that tile time, each interval is in one."""
        return self._between(self.ticks(start, stop), back=False)

    def next(self, moment: float, count: int) -> list[Interval]:
        """The intervals of the next runs after ``moment``."""
        found = [self.before(tick := self.after(moment)), tick]
        while len(found) <= count:
            found.append(self.after(found[-1]))
        return [Interval(*pair) for pair in pairwise(found)]

    def clock_change(self, moment: float) -> tuple[int, timedelta] | None:
        """The next moment within 400 days at which the zone's clock is set forward or back, and by how much."""
        begin = int(moment)
        for day in range(begin, begin + 400 * _DAY, _DAY):
            before, after = self._offset(day), self._offset(day + _DAY)
            if before != after:
                low, high = day, day + _DAY
                while high - low > 1:
                    middle = (low + high) // 2
                    low, high = (middle, high) if self._offset(middle) == before else (low, middle)
                return high, after - before
        return None

    def local(self, moment: float) -> datetime:
        """The moment on the zone's clock."""
        return datetime.fromtimestamp(moment, self.zone)

    def text(self, moment: float) -> str:
        """The moment as people write it, with the zone's abbreviation."""
        return f"{self.local(moment):%Y-%m-%d %H:%M %Z}"

    def span(self, interval: Interval) -> str:
        """The interval as people write it."""
        same = self.local(interval.start).date() == self.local(interval.end).date()
        return f"{self.text(interval.start)} to {self.text(interval.end)[11 if same else 0 :]}"

    def moment(self, text: str, flag: str) -> int:
        """A date or time as a user writes it, on the zone's clock unless it has an offset; as epoch seconds.

        A repeated time is the first of the two; a skipped one is the first moment after the gap.
        Raises SpecError that names ``flag``.
        """
        try:
            given = datetime.fromisoformat(text.strip())
            if given.tzinfo is not None:
                return int(given.timestamp())
            return self._instants(given, elapsed=False)[0]
        except (ValueError, OverflowError):
            raise SpecError(
                f"{flag}: {text!r} is neither a date nor a time", hint="For example: 2026-01-31 or 2026-01-31T06:00"
            ) from None

    def _between(self, ticks: Sequence[int], *, back: bool) -> list[Interval]:
        if not ticks:
            return []
        whole = [self.before(ticks[0]), *ticks] if back else [*ticks, self.after(ticks[-1])]
        return [Interval(*pair) for pair in pairwise(whole)]

    def _offset(self, moment: float) -> timedelta:
        return self.local(moment).utcoffset() or timedelta()

    def _ticks_on(self, day: date) -> tuple[int, ...]:
        """All ticks of this date on the zone's clock, those for its skipped times included."""
        if day.month not in self._fields.months or not self._fields.match_day(day):
            return ()
        times = (time(hour, minute) for hour in self._fields.hours for minute in self._fields.minutes)
        clock = (datetime.combine(day, each) for each in times)
        return tuple(tick for local in clock for tick in self._instants(local, elapsed=self._elapsed))

    def _instants(self, local: datetime, *, elapsed: bool) -> list[int]:
        """When the clock shows ``local``: one moment, or as the rules above say."""
        first, second = (int(local.replace(tzinfo=self.zone, fold=fold).timestamp()) for fold in (0, 1))
        if first == second:
            return [first]
        if first < second:
            return [first, second] if elapsed else [first]
        if elapsed:
            return []
        # Skipped. The two moments read the clock as it is set after and before the gap, whose end is between them.
        low, high = second, first
        before = self._offset(low)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._offset(middle) == before else (low, middle)
        return [high]


def _clipped(moment: float) -> float:
    low, high = (datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in _YEARS)
    return min(max(moment, low), high)
