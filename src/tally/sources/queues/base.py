"""The queue contract: what a source of messages asks of a broker.

A queue delivers each message to one consumer at a time, and again to another if this one is gone or lets its lock run
out. A message leaves the queue when it is acknowledged, or when it is rejected: then it goes to the queue's
dead-letter queue, with the reason.

Implementations reconnect by themselves, with backoff. A message that was received over a connection that is gone
cannot be settled any more; that is no error, as the broker delivers it again. All methods may be called from several
threads.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from tally.errors import SpecError, StorageAwayError, StorageError
from tally.masking import mask

log = logging.getLogger("tally")

REASON = "tally-reason"
"""The header (or property) of a dead message that says why it is dead."""

AWAY = "Check that the broker runs, and that its host and port can be reached from here. Jobs wait for it."
"""The next step where a broker does not answer."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Message:
    """A message as this consumer has it.

    handle: what settles this delivery; only the queue that delivered it understands it. headers: what the sender added.
    id, time: by which the broker knows it, and when it was sent (ISO 8601); None where the broker does not tell.
    """

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    handle: Any = field(default=None, compare=False, repr=False)
    id: str | None = field(default=None, compare=False)
    time: str | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class Depth:
    """How many messages there are. in_hand: delivered and not settled. None where the broker does not tell."""

    waiting: int
    in_hand: int | None = None
    dead: int | None = None


def iso_time(seconds: float | None) -> str | None:
    """A time in seconds since the epoch as ISO 8601, in UTC; None for what is none, whoever wrote it."""
    try:
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return None


class Queue(ABC):
    """One queue of one broker.

    lock_seconds: after which a delivered message that was not :meth:`extend`-ed may be delivered to another consumer;
        None where that happens only when this consumer's connection ends.
    """

    lock_seconds: float | None = None

    @abstractmethod
    def receive(self, most: int, seconds: float) -> list[Message]:
        """At most so many messages; waits for the first one, at most so long. None may mean that the broker is away."""

    @abstractmethod
    def acknowledge(self, messages: Sequence[Message]) -> None:
        """Have the broker forget these. Raises StorageAwayError where it does not answer."""

    @abstractmethod
    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        """Move messages to the dead-letter queue, each with its reason. Raises StorageAwayError."""

    def extend(self, messages: Sequence[Message]) -> None:  # noqa: B027 - most brokers have no locks
        """Keep these for :attr:`lock_seconds` from now."""

    @abstractmethod
    def send(self, messages: Sequence[Message]) -> None:
        """Put these into the queue; returns once the broker has them. Raises StorageAwayError."""

    @abstractmethod
    def depth(self) -> Depth:
        """How many messages there are."""

    @abstractmethod
    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        """The oldest messages of the queue, or of its dead-letter queue; they stay where they are."""

    @abstractmethod
    def replay(self, most: int) -> int:
        """Move the oldest dead messages back into the queue, without their reasons; how many it were."""

    @abstractmethod
    def close(self) -> None:
        """Give back what is not settled, and release connections. Idempotent."""


class Outage:
    """Says once that a broker is away, and once that it is back: who waits has to know what for."""

    def __init__(self) -> None:
        self._said = False

    def begins(self, away: StorageAwayError) -> None:
        if not self._said:
            log.warning("%s; it is tried again\n  %s", away.message.rstrip("."), away.hint or AWAY)
        self._said = True

    def ends(self) -> None:
        if self._said:
            log.warning("the broker answers again")
        self._said = False


class PolledQueue(Queue):
    """A queue that is asked for messages. Between attempts to reach a broker that is away there are pauses."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._polling = threading.Lock()
        self._away, self._again_at, self._outage = pauses(), 0.0, Outage()

    @abstractmethod
    def _poll(self, most: int, seconds: float) -> list[Message]:
        """As :meth:`receive`. Raises StorageAwayError while the broker is away."""

    @abstractmethod
    def _give_back(self) -> None:
        """Let others have at once what this consumer has not settled. Raises StorageError."""

    def _release(self) -> None:
        """Give connections back."""

    def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        with self._polling:  # or what is being received would be nobody's until its lock has run out
            try:
                self._give_back()
            except StorageError:
                pass  # the locks run out
        self._release()

    def receive(self, most: int, seconds: float) -> list[Message]:
        pause = self._again_at - time.monotonic()
        if pause > 0:
            self._closed.wait(min(pause, seconds))
            if pause > seconds:
                return []
        try:
            with self._polling:
                found = [] if self._closed.is_set() else self._poll(most, seconds)
        except StorageAwayError as away:
            if not self._closed.is_set():
                self._outage.begins(away)
            self._again_at = time.monotonic() + next(self._away)
            return []
        self._outage.ends()
        self._away = pauses()
        return found


def options_of(url: str, *names: str) -> dict[str, str]:
    """The options in a queue's URL. Raises SpecError for others than these."""
    options = dict(parse_qsl(urlsplit(url).query))
    if unknown := options.keys() - set(names):
        known = f"{', '.join(names[:-1])} and {names[-1]}" if names[1:] else f"only {names[0]}"
        raise SpecError(f"{mask(url)}: there is no option {min(unknown)!r}; there are {known}")
    return options


def lock_of(url: str, options: Mapping[str, str], usual: float, *, least: float = 1, longest: float = 86_400) -> float:
    """The option ``lock``, in seconds. Raises SpecError where it is none."""
    given = options.get("lock", str(usual))
    try:
        lock = float(given)
    except ValueError:
        lock = 0.0
    if not least <= lock <= longest:
        raise SpecError(f"{mask(url)}: lock should be from {least:g} to {longest:.0f} seconds, not {given!r}")
    return lock


def pauses() -> Iterator[float]:
    """Seconds between attempts to reach a broker: longer each time, never the same for two consumers."""
    pause = _FIRST_PAUSE
    while True:
        yield random.uniform(pause / 2, pause)  # noqa: S311
        pause = min(pause * 2, _LONGEST_PAUSE)
