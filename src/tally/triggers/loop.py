"""The loop that runs schedules: it turns ticks into runs, and starts a process for each run that may begin.

Its whole state is in the store. The processes have the leases of their runs, and continue if the loop is killed. The
next loop, or another one beside it, takes over runs whose process is gone. So any number of loops may work at once, on
any number of hosts with one database. No model is opened in this process, and no user's code is imported.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from tally.config import settings
from tally.database.waiting import Patience
from tally.errors import DatabaseAwayError, OwnershipLostError, SpecError
from tally.jobs.children import Children
from tally.triggers.cron import GRACE_SECONDS, Cron, Interval
from tally.triggers.store import Run, Schedule, ScheduleStore

log = logging.getLogger("tally")

LOOK_SECONDS = 2.0
"""Seconds between two looks at what other processes have changed."""
_MISSED_SHOWN = 1000
"""Missed intervals, at most, that are noted at a time."""


def log_of(name: str) -> Path:
    """The output of the processes that drive the schedule's runs."""
    return settings().home / "logs" / f"schedule-{name}.log"


class Loop:
    """Runs schedules until it is stopped, or until nothing is left to do. :meth:`stop` may be called by any thread.

    names: only these schedules. within: only runs that exist already and begin within this interval.
    say: gets a line for each event. listen: is called after each turn.
    """

    def __init__(
        self,
        store: ScheduleStore,
        *,
        names: Sequence[str] = (),
        within: Interval | None = None,
        say: Callable[[str], None] = lambda line: None,
        listen: Callable[[], None] = lambda: None,
    ) -> None:
        self._store, self._names, self._within, self._say, self._listen = store, set(names), within, say, listen
        self._clocks: dict[tuple[str, str], Cron] = {}
        self._refused: set[str] = set()
        self._patience = Patience(say, what="the schedule")
        self._wake = threading.Event()
        self._children: Children[Run] = Children(self._wake)
        self._stops = 0
        self.begun = self.failed = 0
        """How many runs were started, and how many of them failed."""

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stops > 0

    def stop(self) -> None:
        """Start no more runs; what runs saves what it has. Called twice, it kills them."""
        self._stops += 1
        self._wake.set()

    def run(self, *, forever: bool = False) -> None:
        """Run what is due, with ``forever`` also what will be; returns when all has ended, or after :meth:`stop`."""
        try:
            while not self.stopped:
                pause = LOOK_SECONDS
                try:
                    pause = self._turn(forever)
                    self._patience.is_back()
                except DatabaseAwayError as error:
                    self._patience.is_away(error)
                except OSError as error:  # StorageError is one
                    if not forever:
                        raise
                    log.warning("%s", error)  # such as a full disk, which may have room again later
                if pause <= 0:
                    return
                self._wake.wait(pause)
                self._wake.clear()
        finally:
            self._end()

    def _turn(self, forever: bool) -> float:
        """Do everything that is due now; returns the seconds until there may be more, or 0 if there will be none."""
        schedules = [each for each in self._store.all() if not self._names or each.name in self._names]
        at = self._store.clock()
        pause = LOOK_SECONDS
        self._reap()
        for schedule in schedules:
            try:
                clock = self._clock(schedule)
                if self._within is None and not schedule.paused:
                    self._plan(schedule, clock, at)
                    pause = min(pause, clock.after(at) - at)
            except SpecError as error:  # a zone that this host does not know
                if schedule.name not in self._refused:
                    self._refused.add(schedule.name)
                    self._say(f"{schedule.name}: {error}")
                continue
            while not self.stopped and (run := self._store.claim(schedule.name, within=self._within)) is not None:
                self._begin(run, clock)
        self._listen()
        if forever or self._children:
            return max(pause, 0.01)
        return LOOK_SECONDS if self._store.unsettled([each.name for each in schedules], within=self._within) else 0

    def _clock(self, schedule: Schedule) -> Cron:
        key = (schedule.cron, schedule.timezone)
        if key not in self._clocks:
            self._clocks[key] = schedule.clock()
        return self._clocks[key]

    def _plan(self, schedule: Schedule, clock: Cron, at: float) -> None:
        """Turn the ticks that have passed into runs."""
        ended = clock.ending(schedule.planned_until, at)
        if not ended:
            return
        late = [each for each in ended if each.end < at - GRACE_SECONDS]
        due, missed = ended[len(late) :], late
        if schedule.catch_up == "all":
            missed = []
        elif schedule.catch_up == "latest" and not due:
            missed, late = late[:-1], late[-1:]
        else:
            late = []
        planned = self._store.plan(
            schedule, until=ended[-1].end, due=due, late=late, missed=missed[-_MISSED_SHOWN:]
        )  # fmt: skip
        if planned and missed:
            self._say(
                f"{schedule.name}: {len(missed):,} intervals were missed, from {clock.text(missed[0].start)} on; "
                f"catch-up is {schedule.catch_up}, and a backfill makes up for them"
            )

    def _begin(self, run: Run, clock: Cron) -> None:
        assert run.token is not None
        try:
            self._children.start(run, "tally.triggers.drive", str(run.id), run.token, log=log_of(run.schedule))
        except OSError:
            self._store.put_back(run.id, run.token, counted=False)
            raise
        self.begun += 1
        self._say(
            f"{run.schedule}: {clock.span(run.interval)} begins" + (f" ({run.reason})" if run.reason != "cron" else "")
        )

    def _reap(self) -> None:
        """Settle the runs whose process has ended."""
        for child in self._children.ended():
            with suppress(OwnershipLostError):  # its process has settled it, as it should
                self._store.put_back(child.id, child.token or "", counted=not self.stopped)
            with suppress(OwnershipLostError, SpecError):  # removed meanwhile
                run = self._store.run(child.id)
                self.failed += run.state == "failed"
                what = self._clock(self._store.get(run.schedule)).span(run.interval)
                job = f" ({run.by})" if run.by else ""
                ended = {"pending": "continues later", "running": "continues in another process"}
                line = f"{run.schedule}: {what} {ended.get(run.state, run.state)}{job}"
                self._say(f"{line}: {more}" if (more := run.error or run.outcome) else line)
            self._children.forget(child)  # last: if the database is away, the next turn tries again

    def _end(self) -> None:
        """Stop the processes, which save what they have."""
        self._children.stop(self._reap_if_possible, at_once=lambda: self._stops > 1)

    def _reap_if_possible(self) -> None:
        try:
            self._reap()
        except DatabaseAwayError:  # their leases run out, and another loop takes over
            for run in self._children.ended():
                self._children.forget(run)
