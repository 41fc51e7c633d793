"""The queue contract: what a source of messages asks of a broker.

A queue delivers each message to one consumer at a time, and again to another if this one is gone or lets its lock run
out. A message leaves the queue when it is acknowledged, or when it is rejected: then it goes to the queue's
dead-letter queue, with the reason.

Implementations reconnect by themselves, with backoff. A message that was received over a connection that is gone
cannot be settled any more; that is no error, as the broker delivers it again. All methods may be called from several
threads.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

REASON = "tally-reason"
"""The header (or property) of a dead message that says why it is dead."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Message:
    """A message as this consumer has it.

    handle: what settles this delivery; only the queue that delivered it understands it. headers: what the sender added.
    """

    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    handle: Any = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Depth:
    """How many messages there are. in_hand: delivered and not settled. None where the broker does not tell."""

    waiting: int
    in_hand: int | None = None
    dead: int | None = None


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
    def reject(self, message: Message, reason: str) -> None:
        """Move the message to the dead-letter queue, with the reason. Raises StorageAwayError."""

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


def pauses() -> Iterator[float]:
    """Seconds between attempts to reach a broker: longer each time, never the same for two consumers."""
    pause = _FIRST_PAUSE
    while True:
        yield random.uniform(pause / 2, pause)  # noqa: S311
        pause = min(pause * 2, _LONGEST_PAUSE)
