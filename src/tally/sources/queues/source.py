"""Messages of a queue as items: an endless source.

A message that names several items is settled once, after all of them are committed. A message that cannot be understood
is rejected at once, as it names no item that could be dead.

Where messages choose their models, the coordinator looks these up in the registry, and a chunk has items of one model.
What a message calls its model is part of its items' keys: another message may have the same item scored by another.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, ClassVar

from tally.errors import DatabaseAwayError, ItemError, JobError, SpecError, StorageAwayError, error_line
from tally.models.reference import ModelRef
from tally.models.route import Route
from tally.scorers.base import Input, Scorer
from tally.sources.base import Batch, Chunk, ChunkLimit, Source, Timings
from tally.sources.queues.base import Message, Queue
from tally.sources.queues.bodies import FORMS, HOW_TO_READ, BodyReader, Named
from tally.sources.queues.factory import check, open_queue
from tally.sources.queues.metadata import Metadata
from tally.sources.queues.routing import Router, Routing
from tally.sources.values import read_values
from tally.storage import open_store, temporary
from tally.text import did_you_mean

log = logging.getLogger("tally")

PREFETCH = 1000
"""Messages in hand, at most, unless the job says otherwise."""
WAIT_SECONDS = 1.0
"""How long one request for messages waits."""
IDLE_SECONDS = 5.0
"""A queue that gives nothing for so long, while nothing is in hand, may be empty: it is asked."""


AWAY_SECONDS = 1.0
"""Until a registry that is away is asked again."""

_OPTIONS = ("body", "key", "template", "base", "prefetch", "meta", "models")
_CHOSEN = {"item": "string", "model": "string", "model_version": "int64", "model_hash": "string"}
"""Columns of the results where messages choose their models."""
_MODEL = "model"
"""What a chunk's payload holds of its model; all else there is a list with something for each item."""


@dataclass(frozen=True, slots=True)
class _Taken:
    """An item to score. name: as the message has it. meta: what is kept of the message. model: that it chose."""

    item: Named
    message: Message
    name: str
    meta: Mapping[str, str | None]
    model: ModelRef | None = None


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

    until_empty: planning ends when the queue is empty. prefetch: messages in hand, at most. metadata: what is kept of
    each message. routing: how messages choose their models, if they do.
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
        metadata: Metadata | None = None,
        routing: Routing | None = None,
    ) -> None:
        self._given = (url, input, reader, until_empty, prefetch, metadata, routing)
        self._metadata = Metadata(reader) if metadata is None else metadata
        self._routing, self._router = routing, None if routing is None else Router(routing)
        self._url, self._input, self._reader = url, input, reader
        self._until_empty, self._prefetch = until_empty, prefetch
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._queue: Queue | None = None
        self._in_hand: dict[str, list[_Delivery]] = {}
        """By key, the deliveries that name it."""
        self._messages, self._late = 0, False
        self._unreadable, self._first_unreadable = 0, ""

    @classmethod
    def describe(
        cls,
        url: str,
        input: Input,  # noqa: A002
        options: Mapping[str, Any],
        *,
        until_empty: bool = False,
        route: str | None = None,
        trusted: bool = False,
    ) -> QueueSource:
        """The source of the queue at ``url``; the broker is not asked yet.

        options: of ``body`` (the form of bodies), ``key``, ``template`` and ``base`` as in
        :mod:`tally.sources.queues.bodies`, ``prefetch``, ``meta`` (what is kept of each message, see
        :class:`Metadata`) and ``models`` (that messages may choose).
        route: the template by which messages choose their models; trusted: those may run code that they carry.
        Raises SpecError with what is wrong with them.
        """
        if input not in cls.accepts:
            hint = "Rows are read from files of tables and from databases; for messages, choose a model of pictures."
            raise SpecError(f"messages name pictures and files, and the model is given {input}", hint=hint)
        unknown = sorted(options.keys() - _OPTIONS)
        problems = [f"queue: there is no option {name!r}{did_you_mean(name, _OPTIONS)}" for name in unknown]
        form, prefetch = options.get("body", "auto"), options.get("prefetch", PREFETCH)
        if form not in FORMS:
            problems.append(f"queue: body should be one of {', '.join(FORMS)}, not {form!r}")
        if not isinstance(prefetch, int) or not 1 <= prefetch <= 100_000:
            problems.append(f"queue: prefetch should be a number from 1 to 100,000, not {prefetch!r}")
        meta, models = options.get("meta") or {}, options.get("models") or ()
        if not isinstance(meta, Mapping) or not all(isinstance(each, str) for pair in meta.items() for each in pair):
            problems.append(f"queue: meta should be names and places, such as device: header:device, not {meta!r}")
        if isinstance(models, str):
            models = [each.strip() for each in models.split(",")]
        if not isinstance(models, (list, tuple)) or not all(isinstance(each, str) and each for each in models):
            problems.append(f"queue: models should be names of registered models, not {models!r}")
        if models and route is None:
            problems.append("queue: models are those that messages may choose, and model: names one")
        if problems:
            raise SpecError(problems)
        check(url)
        texts = {name: options[name] for name in ("key", "template", "base") if options.get(name) is not None}
        reader = BodyReader(form, **texts)
        chosen = None if route is None else Route(route, tuple(models))
        metadata = Metadata(reader, dict(meta), () if chosen is None else chosen.names)
        routing = None
        if chosen is not None:
            routing = Routing(chosen, sorted(cls.accepts), (*_CHOSEN, *metadata.names), trusted)
        return cls(url, input, reader, until_empty=until_empty, prefetch=prefetch, metadata=metadata, routing=routing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, self._given

    @property
    def columns(self) -> Mapping[str, str]:
        """See :attr:`Source.columns`."""
        return {**({} if self._routing is None else _CHOSEN), **dict.fromkeys(self._metadata.names, "string")}

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
            if room <= 0 or self._late:
                self._closed.wait(0.05)
                continue
            received = queue.receive(min(bound.items, room), WAIT_SECONDS)
            fresh = self._take(queue, received)
            if not fresh:
                idle = 0.0 if received or self._messages else idle + WAIT_SECONDS
                if self._until_empty and idle >= IDLE_SECONDS:
                    if _is_empty(queue):
                        if self._unreadable and not first:
                            raise JobError(
                                f"none of {self._unreadable:,} messages could be read: {self._first_unreadable}",
                                hint=HOW_TO_READ,
                            )
                        return
                    idle = 0.0
                continue
            idle, bound = 0.0, None
            for chunk in self._chunks(first, fresh):
                yield chunk
                first += chunk.count

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

    def remark(self) -> str | None:
        """See :meth:`Source.remark`."""
        if not self._unreadable:
            return None
        count = f"{self._unreadable:,} messages" if self._unreadable > 1 else "a message"
        return f"{count} could not be read, and went to the dead of the queue; the first: {self._first_unreadable}"

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

    def _take(self, queue: Queue, received: Sequence[Message]) -> list[_Taken]:
        """Take messages in hand; returns their items that nothing in hand waits for yet."""
        fresh: list[_Taken] = []
        unreadable: list[tuple[Message, str]] = []
        for message in received:
            try:
                found = self._read_message(message)
            except _ClosedError:
                return fresh  # the rest is given back
            except ItemError as error:
                log.warning("%s", error)
                unreadable.append((message, str(error)))
                self._unreadable += 1
                self._first_unreadable = self._first_unreadable or error.message
                continue
            with self._lock:
                delivery = _Delivery(message, {each.item.key for each in found})
                self._messages += 1
                for taken in found:
                    key = taken.item.key
                    # One whose item is committed is planned again: the coordinator knows it, and acknowledges it.
                    if not any(key in each.open for each in self._in_hand.get(key, ())):
                        fresh.append(taken)
                    self._in_hand.setdefault(key, []).append(delivery)
        try:  # after the others are in hand, so that their locks are kept meanwhile
            if unreadable:
                queue.reject(unreadable)
        except StorageAwayError as away:  # they will be delivered again
            log.warning("%s", away)
        return fresh

    def _read_message(self, message: Message) -> list[_Taken]:
        """The items of a message, with what is kept of it, and its model. Raises ItemError."""
        try:
            items, meta = self._reader.items(message), self._metadata.kept(message)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # Nobody has thought of what this message holds: it costs itself, and not the job.
            what = f"the message {message.body[:80]!r} cannot be read: {error_line(error)}"
            raise ItemError(what, stage="read", hint=HOW_TO_READ) from None
        if self._router is None:
            return [_Taken(item, message, item.key, meta) for item in items]
        name, model = self._choose(self._router, message)
        return [_Taken(replace(item, key=f"{item.key}#{name}"), message, item.key, meta, model) for item in items]

    def _choose(self, router: Router, message: Message) -> tuple[str, ModelRef]:
        while True:
            try:
                return router.choose(self._metadata.of(message))
            except (StorageAwayError, DatabaseAwayError) as away:
                log.warning("a message waits, as its model cannot be looked up: %s", away)
                if self._closed.wait(AWAY_SECONDS):
                    raise _ClosedError from None

    def _renew(self, queue: Queue) -> None:
        """Keep the locks of what is in hand. While that takes too long, no more is taken in hand: it would be lost, and
        delivered again and again."""
        took = 0.0
        while queue.lock_seconds is not None and not self._closed.wait(max(0.0, queue.lock_seconds / 3 - took)):
            with self._lock:
                held = {id(each): each.message for each in chain.from_iterable(self._in_hand.values())}
            began = time.monotonic()
            try:
                queue.extend(list(held.values()))
            except StorageAwayError as error:
                log.warning("%s", error)
            took = time.monotonic() - began
            self._late = took > queue.lock_seconds / 3

    def _chunks(self, first: int, fresh: Sequence[_Taken]) -> Iterator[Chunk]:
        """The items in chunks, one for each model."""

        def chosen(taken: _Taken) -> tuple[str, int]:
            return ("", 0) if taken.model is None else (taken.model.name, taken.model.version or 0)

        for _, group in groupby(sorted(fresh, key=chosen), chosen):
            taken = list(group)
            payload: dict[str, Any] = {
                "keys": [each.item.key for each in taken],
                "urls": [each.item.url for each in taken],
                "bodies": [
                    base64.b64encode(each.message.body).decode() if each.item.url is None else None for each in taken
                ],
            }
            if self._metadata.names:
                payload["meta"] = [dict(each.meta) for each in taken]
            if (model := taken[0].model) is not None:
                payload |= {"items": [each.name for each in taken], _MODEL: model.to_dict()}
            yield Chunk(first, len(taken), payload)
            first += len(taken)

    def model(self, chunk: Chunk) -> ModelRef | None:
        """See :meth:`Source.model`."""
        found = chunk.payload.get(_MODEL)
        return None if found is None else ModelRef.from_dict(found)

    def info(self, chunk: Chunk) -> list[dict[str, Any]] | None:
        """See :meth:`Source.info`."""
        meta, model = chunk.payload.get("meta") or [{}] * chunk.count, self.model(chunk)
        if model is None:
            return meta if self.columns else None
        facts = {"model": model.name, "model_version": model.version, "model_hash": model.hash}
        return [{"item": item, **facts, **each} for item, each in zip(chunk.payload["items"], meta, strict=True)]

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
                if scorer.input != "path":
                    return content
                path = Path(folder, f"{position}-{(url or 'message').rpartition('/')[2]}")
                path.write_bytes(content)
                return path

            info = self.info(chunk)
            for batch in read_values(self.keys(chunk), fetch, scorer, timings):
                if info is not None:
                    batch.info = [info[position] for position in batch.positions]
                yield batch

    def keys(self, chunk: Chunk) -> list[str]:
        """See :meth:`Source.keys`."""
        return list(chunk.payload["keys"])

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """See :meth:`Source.slice`."""
        payload = {name: values if name == _MODEL else values[start:stop] for name, values in chunk.payload.items()}
        return Chunk(chunk.first + start, stop - start, payload, chunk.cursor)


def _is_empty(queue: Queue) -> bool:
    """Whether nothing waits, and nobody has anything in hand, which would come if they are gone. A broker that gives
    nothing may be away, or wait until it knows that an earlier consumer is dead."""
    try:
        depth = queue.depth()
    except StorageAwayError as away:
        log.warning("%s", away)
        return False
    return not depth.waiting and not depth.in_hand


class _ClosedError(Exception):
    """The source was closed meanwhile."""


def _rebuilt(
    url: str,
    input: Input,  # noqa: A002
    reader: BodyReader,
    until_empty: bool,
    prefetch: int,
    metadata: Metadata,
    routing: Routing | None,
) -> QueueSource:
    return QueueSource(
        url, input, reader, until_empty=until_empty, prefetch=prefetch, metadata=metadata, routing=routing
    )
