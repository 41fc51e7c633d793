"""A message broker and an endless source of its messages, for tests that kill the processes that work on them.

The broker is one SQLite file: it outlives every process that uses it, and notes everything that happens, in order.
It does what brokers do: a message is delivered to one consumer, with a handle for this delivery alone; what a consumer
that is gone had not acknowledged is delivered again, with another handle; an acknowledgement with an old handle is
refused; a message may be published twice under one key.
"""

from __future__ import annotations

import base64
import fcntl
import json
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from tally.scorers.base import Input, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.sources.values import read_values

POLL_SECONDS = 0.02

_TABLES = """
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, body BLOB NOT NULL,
    consumer TEXT, handle TEXT, acknowledged INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS waiting ON messages (acknowledged, consumer, id);
CREATE TABLE IF NOT EXISTS events (
    number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL DEFAULT ((julianday('now') - 2440587.5) * 86400.0),
    kind TEXT NOT NULL, key TEXT NOT NULL, handle TEXT, consumer TEXT
);
"""


class Delivery(NamedTuple):
    """A message as one consumer has it. handle: of this delivery; what acknowledges it."""

    handle: str
    key: str
    body: bytes


class BrokerEvent(NamedTuple):
    """What happened, in order of ``number``. kind: ``published``, ``delivered``, ``acknowledged`` or ``refused``.

    at: seconds since the epoch.
    """

    number: int
    at: float
    kind: str
    key: str
    handle: str | None
    consumer: str | None


class Broker:
    """The queue in a file. Each call is one transaction; safe between threads and processes."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.transaction() as connection:
            for statement in filter(str.strip, _TABLES.split(";")):
                connection.execute(statement)

    def publish(self, messages: Iterable[tuple[str, bytes]]) -> None:
        """Put messages, keys and bodies, into the queue."""
        given = list(messages)
        with self.transaction() as connection:
            connection.executemany("INSERT INTO messages (key, body) VALUES (?, ?)", given)
            connection.executemany(
                "INSERT INTO events (kind, key) VALUES ('published', ?)", [(key,) for key, _ in given]
            )

    def consume(self) -> Consumer:
        """A new consumer. It is gone when it is closed, or when its process ends, however that ends."""
        return Consumer(self)

    def waiting(self) -> int:
        """How many messages are not acknowledged."""
        with self.transaction() as connection:
            return int(connection.execute("SELECT count(*) FROM messages WHERE NOT acknowledged").fetchone()[0])

    def events(self, kind: str | None = None) -> list[BrokerEvent]:
        """Everything that happened, or what is of one kind."""
        with self.transaction() as connection:
            rows = connection.execute(
                "SELECT number, at, kind, key, handle, consumer FROM events "
                "WHERE ?1 IS NULL OR kind = ?1 ORDER BY number",
                (kind,),
            )
            return [BrokerEvent(*row) for row in rows.fetchall()]

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One at a time, over all processes."""
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()

    def lock_of(self, consumer: str) -> Path:
        """The file that a consumer locks while it is there."""
        return self.path.with_name(f"{self.path.name}.{consumer}.lock")


class Consumer:
    """Receives and acknowledges messages. It holds a locked file: the lock ends with the process."""

    def __init__(self, broker: Broker) -> None:
        self.name = secrets.token_hex(6)
        self._broker = broker
        self._lock = broker.lock_of(self.name).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def receive(self, most: int) -> list[Delivery]:
        """At most so many messages that nobody else has, oldest first; at once, and none if there are none."""
        with self._broker.transaction() as connection:
            self._take_from_the_dead(connection)
            rows = connection.execute(
                "SELECT id, key, body FROM messages WHERE NOT acknowledged AND consumer IS NULL ORDER BY id LIMIT ?",
                (most,),
            ).fetchall()
            delivered = []
            for number, key, body in rows:
                handle = secrets.token_hex(8)
                connection.execute(
                    "UPDATE messages SET consumer = ?, handle = ? WHERE id = ?", (self.name, handle, number)
                )
                self._note(connection, "delivered", key, handle)
                delivered.append(Delivery(handle, key, body))
        return delivered

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        """Have the broker forget these messages. One that was delivered again since is not forgotten."""
        with self._broker.transaction() as connection:
            for each in deliveries:
                done = connection.execute(
                    "UPDATE messages SET acknowledged = 1 WHERE handle = ? AND NOT acknowledged", (each.handle,)
                ).rowcount
                self._note(connection, "acknowledged" if done else "refused", each.key, each.handle)

    def close(self) -> None:
        """Give back what was not acknowledged. Idempotent."""
        if not self._lock.closed:
            self._broker.lock_of(self.name).unlink(missing_ok=True)
            self._lock.close()

    def _note(self, connection: sqlite3.Connection, kind: str, key: str, handle: str) -> None:
        connection.execute(
            "INSERT INTO events (kind, key, handle, consumer) VALUES (?, ?, ?, ?)", (kind, key, handle, self.name)
        )

    def _take_from_the_dead(self, connection: sqlite3.Connection) -> None:
        """Put back the messages of consumers that are gone."""
        holding = "SELECT DISTINCT consumer FROM messages WHERE NOT acknowledged AND consumer IS NOT NULL"
        for (consumer,) in connection.execute(holding).fetchall():
            if consumer != self.name and self._is_gone(consumer):
                connection.execute(
                    "UPDATE messages SET consumer = NULL, handle = NULL WHERE consumer = ? AND NOT acknowledged",
                    (consumer,),
                )

    def _is_gone(self, consumer: str) -> bool:
        path = self._broker.lock_of(consumer)
        try:
            with path.open() as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
        return True


class MemoryQueueSource(Source):
    """The messages of a :class:`Broker` as items: bytes under their keys, in chunks of those that are there.

    path: of the broker's file. Pickles to that; planning, acknowledging and closing are for the process that made it.
    """

    accepts: ClassVar = frozenset[Input]({"bytes"})
    bounded: ClassVar = False

    def __init__(self, path: str | Path) -> None:
        self._path = str(path)
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._consumer: Consumer | None = None
        self._in_hand: dict[str, list[Delivery]] = {}
        """By key, what was delivered to this process and is not acknowledged."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._path,)

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        """See :meth:`Source.plan`. The cursor says nothing: the broker knows what is left."""
        bound: ChunkLimit | None = None
        while not self._closed.is_set():
            bound = bound or limit()
            fresh = self._receive(bound.items)
            if not fresh:
                self._closed.wait(POLL_SECONDS)
                continue
            keys = [each.key for each in fresh]
            bodies = [base64.b64encode(each.body).decode() for each in fresh]
            yield Chunk(first, len(fresh), {"keys": keys, "bodies": bodies}, json.dumps(first + len(fresh)))
            first, bound = first + len(fresh), None

    def _receive(self, most: int) -> list[Delivery]:
        """At most ``most`` messages that are waiting, without those whose key is in hand already."""
        with self._lock:
            if self._closed.is_set():
                return []
            if self._consumer is None:
                self._consumer = Broker(self._path).consume()
            received = self._consumer.receive(most)
            fresh = {each.key: each for each in received if each.key not in self._in_hand}
            for each in received:
                self._in_hand.setdefault(each.key, []).append(each)
            return list(fresh.values())

    def acknowledge(self, chunks: Sequence[Chunk], dead: Mapping[str, str]) -> None:
        """See :meth:`Source.acknowledge`."""
        with self._lock:
            keys = [key for chunk in chunks for key in self.keys(chunk)]
            deliveries = [each for key in keys for each in self._in_hand.pop(key, ())]
            if deliveries and self._consumer is not None:
                self._consumer.acknowledge(deliveries)

    def close(self) -> None:
        """See :meth:`Source.close`."""
        self._closed.set()
        with self._lock:
            if self._consumer is not None:
                self._consumer.close()

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        """See :meth:`Source.read`."""
        bodies = chunk.payload["bodies"]
        return read_values(self.keys(chunk), lambda position: base64.b64decode(bodies[position]), scorer, timings)

    def keys(self, chunk: Chunk) -> list[str]:
        """See :meth:`Source.keys`."""
        return list(chunk.payload["keys"])

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """See :meth:`Source.slice`."""
        payload = {name: values[start:stop] for name, values in chunk.payload.items()}
        return Chunk(chunk.first + start, stop - start, payload, chunk.cursor)
