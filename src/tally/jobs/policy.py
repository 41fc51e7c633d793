"""What to do about a lost chunk, a slow one, a large one near the end, and too many dead items: pure decisions."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias, TypeVar

from tally.errors import (
    ModelError,
    SourceChangedError,
    StorageError,
    WorkerError,
    WorkerMemoryError,
    WorkerSpentError,
    WorkerTimeoutError,
)

STRAGGLER_SECONDS = 10.0
"""A chunk that has run for less time than this is never started a second time."""
STRAGGLER_FACTOR = 3.0
"""How many times the usual time a chunk may take before it is a straggler."""
LAST_SHARES = 4
"""Near the end, each slot has at least so many chunks left to do, so that all slots end at about the same time."""
SHORT_SECONDS = 0.5
"""A chunk that takes no longer is not cut to share it out."""
UNSETTLED_ATTEMPTS = 10
"""A chunk that was handed out more often without any outcome is halved: it may be what kills its coordinator."""
LOADING_LOSSES = 10
"""Workers per slot that may be lost one after the other while they load the model, before the job fails."""


# ------------------------------------------------------------------------------------------------- lost chunks


@dataclass(frozen=True, slots=True)
class Part:
    """Positions ``start <= p < stop`` of a chunk, to be run again. losses: those that count against it."""

    start: int
    stop: int
    losses: int


@dataclass(frozen=True, slots=True)
class RunAgain:
    """The parts take the chunk's place."""

    parts: list[Part]


@dataclass(frozen=True, slots=True)
class LoadAgain:
    """The worker was lost while it loaded the model: no item is to blame, and the chunk is run again as it was."""


@dataclass(frozen=True, slots=True)
class ItemIsDead:
    """The chunk is one item, and that item is to blame."""


@dataclass(frozen=True, slots=True)
class JobFails:
    """Neither an item nor a worker is at fault: the output, the model or Tally itself is."""


Decision: TypeAlias = RunAgain | LoadAgain | ItemIsDead | JobFails


def had_begun(error: WorkerError) -> bool:
    """Whether the lost worker was at items of its chunk."""
    return error.suspects is not None and error.suspects[0] < error.suspects[1]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """attempts: how often what fails without a certain cause is tried. batch_size: items that are scored together."""

    attempts: int
    batch_size: int

    def decide(self, count: int, error: BaseException, *, losses: int, handed_out: int) -> Decision:
        """What becomes of a chunk whose last attempt failed.

        count: its items. losses: those that counted against it before. handed_out: how often it was, this time too.
        """
        if isinstance(error, WorkerError) and not had_begun(error) and handed_out <= UNSETTLED_ATTEMPTS:
            return LoadAgain()
        certain = isinstance(error, (WorkerTimeoutError, WorkerMemoryError, WorkerSpentError))
        if certain and isinstance(error, WorkerError) and not error.fresh and handed_out <= UNSETTLED_ATTEMPTS:
            # It may hold what earlier items have left behind: these are not blamed before a fresh worker has tried.
            return RunAgain(self._apart(count, losses, error.suspects) or [Part(0, count, losses)])
        losses += 1
        if not isinstance(error, WorkerError):
            # What changed while it was read is found to be changed at once the next time.
            final = isinstance(error, (ModelError, StorageError)) and not isinstance(error, SourceChangedError)
            if final or losses >= self.attempts:
                return JobFails()
            return RunAgain([Part(0, count, losses)])
        if count > 1:
            return RunAgain(self._bisect(count, losses, error.suspects, certain=certain))
        if certain or losses >= self.attempts:
            return ItemIsDead()
        return RunAgain([Part(0, count, losses)])

    def halves(self, count: int, losses: int) -> list[Part]:
        """Two parts, cut between batches where there are several: items stay with those they were scored with."""
        batches = -(-count // self.batch_size)
        cut = (batches // 2) * self.batch_size if batches > 1 else count // 2
        return [Part(0, cut, losses), Part(cut, count, losses)]

    def _bisect(self, count: int, losses: int, suspects: tuple[int, int] | None, *, certain: bool) -> list[Part]:
        """Cut out what the worker was busy with; if that was all of the chunk already, halve it.

        A loss without a certain cause may have come from outside (kill -9, a lost machine): such suspects
        are first run again as they were, ``attempts`` times in all.
        """
        if parts := self._apart(count, losses, suspects):
            return parts
        if not certain and losses < self.attempts:
            return [Part(0, count, losses)]
        # From here on every loss halves, and an item alone has to be lost twice.
        last = self.attempts - 1
        halves = self.halves(count, last)
        return [
            part if part.stop - part.start > 1 else Part(part.start, part.stop, max(0, last - 1)) for part in halves
        ]

    def _apart(self, count: int, losses: int, suspects: tuple[int, int] | None) -> list[Part]:
        """The suspects, and what is before and after them; nothing if they are all that there is."""
        start, stop = suspects or (0, count)
        start, stop = max(0, start), min(stop, count)
        if start >= stop or (start, stop) == (0, count):
            return []
        cuts = sorted({0, start, stop, count})
        return [Part(a, b, losses if a == start else 0) for a, b in pairwise(cuts)]


class LoadingLosses:
    """Counts workers that were lost one after the other while they started or loaded the model."""

    def __init__(self) -> None:
        self.count = 0

    def reset(self) -> None:
        """A worker has loaded the model."""
        self.count = 0

    def add(self, most: int) -> bool:
        """Count one more; whether that is still an accident, as fewer than ``most`` were lost in a row."""
        self.count += 1
        return self.count < most


# ------------------------------------------------------------------------------------------------ near the end


def is_too_large_a_share(count: int, *, left: int, slots: int, batch_size: int, seconds: float) -> bool:
    """Whether, near the end, a chunk would keep one slot busy while the others have run out of work.

    count: its items. left: items of the job that are not done. seconds: how long it should take.
    """
    return count > batch_size and seconds > SHORT_SECONDS and count * LAST_SHARES * slots > left


class Attempted(Protocol):
    """A chunk in the engine's hands. since: when it was handed out. doubled: whether it runs a second time."""

    since: float
    doubled: bool


A = TypeVar("A", bound=Attempted)


class Stragglers:
    """Finds what takes much longer than usual, so that idle slots run it a second time; the first commit wins.

    No chunk is run a third time: if each attempt began before the last one was lost, no loss would ever count.
    """

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=64)

    def observe(self, seconds: float) -> None:
        """A chunk took so many seconds."""
        self._durations.append(seconds)

    def pick(self, running: Iterable[A], *, idle: int, now: float) -> list[A]:
        """At most ``idle`` of the running chunks, those that have run longest first."""
        if idle <= 0 or not self._durations:
            return []
        patience = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(self._durations))
        slow = [each for each in running if not each.doubled and now - each.since > patience]
        return sorted(slow, key=lambda each: each.since)[:idle]


# -------------------------------------------------------------------------------------------------- dead items


@dataclass(frozen=True, slots=True)
class DeadLimit:
    """When a job has too many dead items. share: of those done, 0 to 1. after: items that must be done first.
    strict: none at all are allowed."""

    share: float
    after: int
    strict: bool

    def reached(self, done: int, dead: int) -> str | None:
        """``strict`` or ``share``, or None while the job may go on."""
        if self.strict and dead:
            return "strict"
        return "share" if done >= self.after and dead > self.share * done else None
