"""Messages of a queue as items: an endless source.

A message that names several items is settled once, after all of them are committed. A message that cannot be understood
is rejected at once, as it names no item that could be dead.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

from tally.errors import ItemError, SpecError, StorageAwayError
from tally.scorers.base import Input, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.sources.queues.base import Message, Queue
from tally.sources.queues.bodies import FORMS, BodyReader, Named
from tally.sources.queues.factory import check, open_queue
from tally.sources.values import read_values
from tally.storage import open_store, temporary
from tally.text import did_you_mean

log = logging.getLogger("tally")

PREFETCH = 1000
"""Messages in hand, at most, unless the job says otherwise."""
WAIT_SECONDS = 1.0
"""How long one request for messages waits."""
IDLE_SECONDS = 5.0
"""A queue that gives nothing for so long, while nothing is in hand, is empty."""


_OPTIONS = ("body", "key", "template", "base", "prefetch")


@dataclass(slots=True)
class _Delivery:
    """A message in hand, the keys of its items that are not settled yet, and why some of them are dead."""

    message: Message
    open: set[str]
    dead: dict[str, str] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        return "\n".join(f"{key}: {reason}" for key, reason in self.dead.items())


class QueueSource(Source):
    """The messages of one queue as items; see the module. Pickles to what it was made from.

    until_empty: planning ends when the queue is empty. prefetch: messages in hand, at most.
    """

    accepts: ClassVar = frozenset[Input]({"image", "bytes", "path"})
    bounded: ClassVar = False

    def __init__(
        self,
        url: str,
        input: Input,  # noqa: A002
        reader: BodyReader,
        *,
        until_empty: bool = False,
        prefetch: int = 1000,
    ) -> None:
        self._given = (url, input, reader, until_empty, prefetch)
        self._url, self._input, self._reader = url, input, reader
        self._until_empty, self._prefetch = until_empty, prefetch
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._queue: Queue | None = None
        self._in_hand: dict[str, list[_Delivery]] = {}
        """By key, the deliveries that name it."""
        self._messages = 0

    @classmethod
    def describe(
        cls,
        url: str,
        input: Input,  # noqa: A002
        options: Mapping[str, Any],
        *,
        until_empty: bool = False,
    ) -> QueueSource:
        """The source of the queue at ``url``; the broker is not asked yet.

        options: of ``body`` (the form of bodies), ``key``, ``template`` and ``base`` as in
        :mod:`tally.sources.queues.bodies`, and ``prefetch``. Raises SpecError with what is wrong with them.
        """
        if input not in cls.accepts:
            raise SpecError(f"messages name pictures and files, and the model is given {input}")
        unknown = sorted(options.keys() - _OPTIONS)
        problems = [f"queue: there is no option {name!r}{did_you_mean(name, _OPTIONS)}" for name in unknown]
        form, prefetch = options.get("body", "auto"), options.get("prefetch", PREFETCH)
        if form not in FORMS:
            problems.append(f"queue: body should be one of {', '.join(FORMS)}, not {form!r}")
        if not isinstance(prefetch, int) or not 1 <= prefetch <= 100_000:
            problems.append(f"queue: prefetch should be a number from 1 to 100,000, not {prefetch!r}")
        if problems:
            raise SpecError(problems)
        check(url)
        texts = {name: options[name] for name in ("key", "template", "base") if options.get(name) is not None}
        return cls(url, input, BodyReader(form, **texts), until_empty=until_empty, prefetch=prefetch)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, self._given

    # -- in the coordinator ------------------------------------------------------------------------

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        """See :meth:`Source.plan`. The cursor says nothing: the broker knows what is left."""
        queue = self._open()
        renewer = threading.Thread(target=self._renew, args=(queue,), name="tally-queue-locks", daemon=True)
        renewer.start()
        idle, bound = 0.0, None
        while not self._closed.is_set():
            bound = bound or limit()
            room = self._prefetch - self._messages
            if room <= 0:
                self._closed.wait(0.05)
                continue
            received = queue.receive(min(bound.items, room), WAIT_SECONDS)
            fresh = self._take(queue, received)
            if not fresh:
                idle = 0.0 if received or self._messages else idle + WAIT_SECONDS
                if self._until_empty and idle >= IDLE_SECONDS:
                    return
                continue
            idle = 0.0
            yield self._chunk(first, fresh)
            first, bound = first + len(fresh), None

    def acknowledge(self, chunks: Sequence[Chunk], dead: Mapping[str, str]) -> None:
        """See :meth:`Source.acknowledge`."""
        settled: list[_Delivery] = []
        with self._lock:
            for key in (key for chunk in chunks for key in self.keys(chunk)):
                for delivery in self._in_hand.get(key, ()):
                    delivery.open.discard(key)
                    if key in dead:
                        delivery.dead[key] = dead[key]
                    if not delivery.open:
                        settled.append(delivery)
        if not settled:
            return
        queue = self._open()
        queue.acknowledge([each.message for each in settled if not each.dead])
        if spoilt := [(each.message, each.reason) for each in settled if each.dead]:
            queue.reject(spoilt)
        with self._lock:
            gone = {id(each) for each in settled}
            self._messages -= len(gone)
            for key in list(self._in_hand):
                kept = [each for each in self._in_hand[key] if id(each) not in gone]
                if kept:
                    self._in_hand[key] = kept
                else:
                    del self._in_hand[key]

    def close(self) -> None:
        """See :meth:`Source.close`."""
        self._closed.set()
        with self._lock:
            if self._queue is not None:
                self._queue.close()

    def _open(self) -> Queue:
        with self._lock:
            if self._queue is None:
                self._queue = open_queue(self._url)
            return self._queue

    def _take(self, queue: Queue, received: Sequence[Message]) -> list[tuple[Named, Message]]:
        """Take messages in hand; returns their items that nothing in hand waits for yet."""
        fresh: list[tuple[Named, Message]] = []
        unreadable: list[tuple[Message, str]] = []
        for message in received:
            try:
                items = self._reader.items(message)
            except ItemError as error:
                log.warning("%s", error)
                unreadable.append((message, str(error)))
                continue
            with self._lock:
                delivery = _Delivery(message, {each.key for each in items})
                self._messages += 1
                for item in items:
                    # One whose item is committed is planned again: the coordinator knows it, and acknowledges it.
                    if not any(item.key in each.open for each in self._in_hand.get(item.key, ())):
                        fresh.append((item, message))
                    self._in_hand.setdefault(item.key, []).append(delivery)
        try:  # after the others are in hand, so that their locks are kept meanwhile
            if unreadable:
                queue.reject(unreadable)
        except StorageAwayError as away:  # they will be delivered again
            log.warning("%s", away)
        return fresh

    def _renew(self, queue: Queue) -> None:
        """Keep the locks of what is in hand."""
        if queue.lock_seconds is None:
            return
        while not self._closed.wait(queue.lock_seconds / 3):
            with self._lock:
                held = {id(each): each.message for each in chain.from_iterable(self._in_hand.values())}
            try:
                queue.extend(list(held.values()))
            except StorageAwayError as error:
                log.warning("%s", error)

    def _chunk(self, first: int, fresh: Sequence[tuple[Named, Message]]) -> Chunk:
        payload = {
            "keys": [item.key for item, _ in fresh],
            "urls": [item.url for item, _ in fresh],
            "bodies": [
                base64.b64encode(message.body).decode() if item.url is None else None for item, message in fresh
            ],
        }
        return Chunk(first, len(fresh), payload)

    # -- in workers --------------------------------------------------------------------------------

    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        """See :meth:`Source.read`."""
        urls, bodies = chunk.payload["urls"], chunk.payload["bodies"]
        with temporary.folder("messages") as folder:

            def fetch(position: int) -> Any:
                url = urls[position]
                if url is None:
                    content = base64.b64decode(bodies[position])
                else:
                    root, _, name = url.rpartition("/")
                    content = open_store(root).read(name)
                if self._input != "path":
                    return content
                path = Path(folder, f"{position}-{(url or 'message').rpartition('/')[2]}")
                path.write_bytes(content)
                return path

            yield from read_values(self.keys(chunk), fetch, scorer, timings)

    def keys(self, chunk: Chunk) -> list[str]:
        """See :meth:`Source.keys`."""
        return list(chunk.payload["keys"])

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """See :meth:`Source.slice`."""
        payload = {name: values[start:stop] for name, values in chunk.payload.items()}
        return Chunk(chunk.first + start, stop - start, payload, chunk.cursor)


def _rebuilt(url: str, input: Input, reader: BodyReader, until_empty: bool, prefetch: int) -> QueueSource:  # noqa: A002
    return QueueSource(url, input, reader, until_empty=until_empty, prefetch=prefetch)
