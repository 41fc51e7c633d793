"""What happens in a job, as typed events.

The terminal, the log, alerts and traces subscribe to them. Subscribers are
called in the order in which they subscribed, in the thread where the event happens: mostly the coordinator's, sometimes
that of its lease. They should return quickly. If one raises, that is logged, and the job continues.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

log = logging.getLogger("tally")
_told = logging.getLogger("tally.events")
_told.addHandler(logging.NullHandler())  # a terminal shows them anyway: Python's handler of last resort is not needed


@dataclass(frozen=True, slots=True)
class Started:
    """A coordinator drives the job from now on. unit: what its items are called."""

    job_id: str
    unit: str


@dataclass(frozen=True, slots=True)
class Note:
    """A line that the user should read."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned:
    """Something that may make results wrong or incomplete. It is shown in any case, and kept with the job."""

    text: str


@dataclass(frozen=True, slots=True)
class Assumed:
    """Something that was taken for granted about the model or the data. As :class:`Warned`; the manifest lists it."""

    text: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the job stands. planned: ``items`` are all there are. rate: items per second, lately."""

    state: str
    items: int
    planned: bool
    done: int
    dead: int
    rate: float


@dataclass(frozen=True, slots=True)
class Planned:
    """The source is listed to its end: so many items are all that there are."""

    items: int


@dataclass(frozen=True, slots=True)
class ChunkDone:
    """A chunk is committed. first, count: which items. dead: how many of them failed.

    seconds: in the worker. stages: seconds of each (read, decode, score, write), summed over threads.
    """

    first: int
    count: int
    dead: int
    rows: int
    seconds: float
    stages: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class ItemDead:
    """An item failed for good, and that is committed."""

    key: str
    stage: str
    error: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """A worker crashed or was killed while it had these items."""

    first: int
    count: int
    error: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something that the job needs (the database, the cluster) is away, and the job waits for it; or it is back."""

    text: str


@dataclass(frozen=True, slots=True)
class StateChanged:
    """The job was paused or resumed. state: paused or running."""

    state: str


@dataclass(frozen=True, slots=True)
class Finalizing:
    """All is scored, and what was committed becomes the output."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The coordinator has put the job down. state: finished, interrupted, failed or cancelled; error: why it failed."""

    job_id: str
    state: str
    error: Exception | None = None


Event: TypeAlias = (
    Started
    | Note
    | Warned
    | Assumed
    | Progress
    | Planned
    | ChunkDone
    | ItemDead
    | WorkerLost
    | Waiting
    | StateChanged
    | Finalizing
    | Finished
)
Subscriber: TypeAlias = Callable[[Event], None]


class Events:
    """Passes each event on to all subscribers. Call it with the event."""

    def __init__(self, *subscribers: Subscriber) -> None:
        self._subscribers = list(subscribers)

    def subscribe(self, subscriber: Subscriber) -> None:
        """Have it called from now on; once, however often it subscribes."""
        if subscriber not in self._subscribers:
            self._subscribers.append(subscriber)

    def __bool__(self) -> bool:
        """Whether anybody subscribes."""
        return bool(self._subscribers)

    def __call__(self, event: Event) -> None:
        for subscriber in self._subscribers:
            try:
                subscriber(event)
            except Exception:
                log.exception("a subscriber failed at %r", event)

    def note(self, text: str) -> None:
        self(Note(text))

    def warn(self, text: str) -> None:
        self(Warned(text))

    def waiting(self, text: str) -> None:
        self(Waiting(text))


def writing_to(logger: logging.Logger) -> Subscriber:
    """A subscriber that writes down what is worth reading later."""

    def write(event: Event) -> None:
        match event:
            case Started(job_id, _):
                logger.info("job %s begins or goes on", job_id)
            case ChunkDone(first, count, dead, rows, seconds, _):
                logger.debug("%d rows in %.2f s; %d items failed", rows, seconds, dead, extra={"chunk": (first, count)})
            case WorkerLost(first, count, error):
                items = f"item {first}" if count == 1 else f"items {first} to {first + count - 1}"
                logger.info("%s: %s", items, error, extra={"chunk": (first, count)})
            case ItemDead(key, stage, error):
                logger.debug("%s: %s failed: %s", key, stage, error)
            case Finalizing():
                logger.info("the output is made")
            case Waiting(text) | Warned(text) | Assumed(text):
                logger.warning("%s", text)
            case Finished(job_id, state, error):
                logger.info("job %s is %s%s", job_id, state, "" if error is None else f": {error}")
            case _:
                pass

    return write


write_to_log = writing_to(_told)
"""A subscriber that writes to the log of this process."""
