"""Follows a job that another process drives: reads its row and turns changes into events."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from tally.database.waiting import Patience
from tally.errors import ClusterLostError, DatabaseAwayError, JobError, ServerAwayError, TallyError
from tally.jobs.events import Assumed, Events, Finished, Progress, Started, StateChanged, Warned
from tally.jobs.stop import Stop
from tally.jobs.store import JobRecord

LOOK_SECONDS = 0.5
"""Seconds between two looks at the job, at most; of one that has just begun they are fewer."""


class _Looked(Protocol):
    def get(self, job_id: str, /) -> JobRecord: ...


class Follower:
    """Follows one job; there are no events for what is in ``record`` already. Used by one thread.

    saw_it_driven: whether a coordinator had the job at one of the looks.
    """

    def __init__(self, store: _Looked, record: JobRecord, events: Events, stop: Stop | None = None) -> None:
        self._store, self._events, self._stop = store, events, stop or Stop()
        self.saw_it_driven = self._started = False
        self._first = True
        self._shown = record
        self._away: str | None = None
        self._patience = Patience(events.waiting, what="following")
        self._rates: deque[tuple[float, int]] = deque(maxlen=64)

    def until(self, ended: Callable[[JobRecord], JobRecord | None]) -> JobRecord:
        """Look at the job until ``ended`` returns it; that is called at each look while nobody drives the job.

        What is away (the database, the cluster) is waited for. Once ``stop`` is asked, returns the job as last seen.
        """
        began = time.monotonic()
        while not self._stop.wait(0 if self._first else min(LOOK_SECONDS, 0.05 + (time.monotonic() - began) / 10)):
            self._first = False
            try:
                record = self._store.get(self._shown.id)
                if is_driven(record):
                    self.saw_it_driven = True
                    self.is_back()
                    self.show(record)
                elif (last := ended(record)) is not None:
                    self.show(last)
                    error = JobError(last.error or "the job failed") if last.state == "failed" else None
                    self._events(Finished(last.id, last.state, error))
                    return last
                else:
                    self.is_back()
            except (ClusterLostError, DatabaseAwayError, ServerAwayError) as error:
                self.wait_for(error)
        return self._shown

    def show(self, record: JobRecord) -> None:
        """Send events for what has changed since the last look."""
        before, self._shown = self._shown, record
        if not self._started:
            self._started = True
            self._events(Started(record.id, record.unit))
        for line in record.remarks[len(before.remarks) :]:
            self._events(Warned(line))
        for line in record.assumed:
            if line not in before.assumed:
                self._events(Assumed(line))
        if record.state != before.state and "paused" in (before.state, record.state):
            self._events(StateChanged(record.state))
        now = time.monotonic()
        self._rates.append((now, record.done))
        then, done = self._rates[0]
        rate = (record.done - done) / (now - then) if now > then else 0.0
        self._events(Progress(record.state, record.items, record.planned, record.done, record.dead, rate))

    def wait_for(self, error: TallyError) -> None:
        """Something is away: say so once, and wait a little."""
        if isinstance(error, DatabaseAwayError):
            self._patience.is_away(error)
        else:
            if self._away is None:
                self._events.waiting(f"{error.message}; waiting until it is back (Ctrl-C stops waiting, not the job)")
            self._away = error.message
        self._stop.wait(random.uniform(0.5, 2.0))  # noqa: S311 - not all at the same time

    def is_back(self) -> None:
        """It answers again."""
        self._patience.is_back()
        if self._away is not None:
            self._events.waiting("it is back")
            self._away = None


def is_driven(record: JobRecord) -> bool:
    """Whether a coordinator has the job. The process that is creating it does not count."""
    return record.alive and record.state != "created"
