"""Kafka, and Event Hubs through its Kafka endpoint, by confluent-kafka: ``kafka://HOST:PORT,HOST:PORT/TOPIC``, with TLS
``kafkas://USER@HOST:PORT/TOPIC``.

A topic is a log: nothing leaves it. The consumer group ``tally`` (``?group=``) has committed how far each partition is
done. What is done beyond a message that is not is committed, too, beside that offset, so that it does not come again.
Offsets are committed only of what came since this consumer was given the partition: after a rebalance, they are
another's. A consumer without a sign of life for the lock (``?lock=`` seconds, 30) loses its partitions.

A rebalance waits for every member of the group to ask for messages; so a consumer asks also while it has enough of
them, with its partitions paused. What it has in hand then may go to another consumer, and comes again if it does not.

Dead messages are in ``TOPIC.dead`` with their reason as a header; the group ``tally.dead`` has committed how far they
were replayed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka import Message as Record

from tally.config import variable
from tally.errors import SourceNotFoundError, SpecError, StorageAwayError, StorageError
from tally.masking import mask
from tally.sources.queues.base import AWAY, REASON, Depth, Message, PolledQueue, Queue, iso_time, lock_of, options_of
from tally.sources.queues.factory import LOGIN, PASSWORD

log = logging.getLogger("tally")

LOCK_SECONDS = 30.0
ANSWER_SECONDS = 30.0
KEY = "key"
"""The header of a message that is its record's key: which partition it is in."""
_POLL_SECONDS = 0.1
"""A client waits for all messages that it is asked for; so it is asked for a short time only."""
_TURN_SECONDS = 0.005
"""Between two requests for messages, so that what was done can be committed: a client does one at a time."""
_SERVED_SECONDS = 1.0
"""Since a consumer has asked for messages, so that nobody has waited for it."""
_STUCK_SECONDS = 300.0
"""Until the group goes on without a consumer that asks for nothing any more, however alive it is."""
_METADATA = 4000
"""Bytes that a broker keeps beside an offset."""

T = TypeVar("T")


def open_queue(url: str) -> Queue:
    """The queue of this URL."""
    parts = urlsplit(url)
    user, _, servers = parts.netloc.rpartition("@")
    topic = unquote(parts.path.strip("/"))
    if not servers or not topic or "/" in topic:
        raise SpecError(f"{mask(url)} names no topic", hint="Write kafka://HOST:PORT/TOPIC, or kafkas:// for TLS.")
    options = options_of(url, "group", "lock")
    lock = lock_of(url, options, LOCK_SECONDS, least=6, longest=1800)
    tls = parts.scheme.lower() == "kafkas"
    settings: dict[str, Any] = {
        "bootstrap.servers": servers,
        "security.protocol": ("SASL_" if user else "") + ("SSL" if tls else "PLAINTEXT"),
        "reconnect.backoff.max.ms": 30_000,
        "log_level": 0,
    }
    if user:
        password = variable(PASSWORD)
        if not password:
            raise SpecError(f"{mask(url)} names a user", hint=f"Put the password into the environment: {PASSWORD}")
        settings |= {"sasl.mechanism": "PLAIN", "sasl.username": unquote(user), "sasl.password": password}
    return KafkaQueue(settings, topic, options.get("group", "tally"), lock=lock, shown=mask(url))


@dataclass(slots=True)
class _Progress:
    """How far a partition is done, by whom it was given to us. done: offsets beyond ``next`` that are done."""

    next: int
    done: set[int] = field(default_factory=set)

    def finish(self, offset: int) -> None:
        if offset >= self.next:
            self.done.add(offset)
        while self.next in self.done:
            self.done.remove(self.next)
            self.next += 1

    def text(self) -> str:
        """What is done beyond the gap: ``5-9,12``; as much as a broker keeps."""
        runs = []
        for _, run in groupby(enumerate(sorted(self.done)), key=lambda pair: pair[1] - pair[0]):
            offsets = [offset for _, offset in run]
            runs.append(f"{offsets[0]}-{offsets[-1]}")
        while runs and len(",".join(runs)) > _METADATA:
            runs.pop()
        return ",".join(runs)

    @classmethod
    def of(cls, committed: TopicPartition) -> _Progress:
        progress = cls(max(0, committed.offset))
        try:
            for run in filter(None, (committed.metadata or "").split(",")):
                first, last = map(int, run.split("-"))
                progress.done.update(range(max(first, progress.next), last + 1))
        except ValueError:
            pass  # another program's
        return progress


class KafkaQueue(PolledQueue):
    """A topic. ``_lock`` is held while the consumer is used; its callbacks run in the thread that polls."""

    def __init__(self, settings: Mapping[str, Any], topic: str, group: str, *, lock: float, shown: str) -> None:
        super().__init__()
        self._settings, self._topic, self._dead, self._shown = settings, topic, f"{topic}.dead", shown
        self._group = {
            **settings,
            "group.id": group,
            "enable.auto.commit": False,
            "auto.offset.reset": "earliest",
            "session.timeout.ms": int(lock * 1000),
            "heartbeat.interval.ms": int(lock * 300),
            "max.poll.interval.ms": int(max(lock, _STUCK_SECONDS) * 1000),
        }
        self.lock_seconds = lock
        self._lock = threading.RLock()
        self._consumer: Consumer | None = None
        self._producer: Producer | None = None
        self._given: dict[int, _Progress] = {}
        """What this consumer has, by partition."""
        self._asked_at, self._paused = 0.0, False

    # -- the contract ------------------------------------------------------------------------------

    def _poll(self, most: int, seconds: float) -> list[Message]:
        if self._consumer is None:
            self._exists(self._topic)
            self._consumer = Consumer(self._group)
            self._consumer.subscribe([self._topic], on_assign=self._take, on_revoke=self._leave, on_lost=self._leave)
        consumer = self._consumer
        deadline, found = time.monotonic() + seconds, list[Message]()
        while True:
            self._closed.wait(_TURN_SECONDS)
            left = deadline - time.monotonic()
            wait = max(0.0, min(left, _POLL_SECONDS))
            with self._lock:
                if self._paused:
                    self._paused = False
                    self._ask(lambda: consumer.resume(consumer.assignment()))
                records = self._ask(lambda wait=wait: consumer.consume(most, wait))  # type: ignore[misc]
                self._asked_at = time.monotonic()
            found += [message for record in records if (message := self._received(record)) is not None]
            if found or left <= 0 or self._closed.is_set():
                return found

    def _received(self, record: Record) -> Message | None:
        if (error := record.error()) is not None:
            if error.fatal() or not error.retriable():
                raise self._refused(error)
            return None
        partition, offset = record.partition(), record.offset()
        assert partition is not None
        assert offset is not None
        with self._lock:
            progress = self._given.get(partition)
            if progress is None or offset < progress.next or offset in progress.done:
                return None
        return _message(record, (partition, offset, progress))

    def acknowledge(self, messages: Sequence[Message]) -> None:
        with self._lock:
            changed: dict[int, _Progress] = {}
            for each in messages:
                partition, offset, came_with = each.handle
                progress = self._given.get(partition)
                if progress is not None and progress is came_with:  # it was not given to another since
                    progress.finish(offset)
                    changed[partition] = progress
            if changed and self._consumer is not None:
                consumer = self._consumer
                self._ask(lambda: consumer.commit(offsets=self._offsets(changed), asynchronous=False))

    def extend(self, messages: Sequence[Message]) -> None:
        """See :meth:`Queue.extend`. They are kept as long as their partitions are this consumer's."""
        with self._lock:
            consumer = self._consumer
            if consumer is None or time.monotonic() - self._asked_at < _SERVED_SECONDS:
                return
            self._paused, self._asked_at = True, time.monotonic()
            self._ask(lambda: consumer.pause(consumer.assignment()))
            self._ask(lambda: consumer.consume(1, 0))  # nothing comes of paused partitions; rebalances do

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        self._produce(self._dead, [_with(message, {REASON: reason[:10_000]}) for message, reason in rejected])
        self.acknowledge([message for message, _ in rejected])

    def send(self, messages: Sequence[Message]) -> None:
        self._produce(self._topic, messages)

    def depth(self) -> Depth:
        """See :meth:`Queue.depth`. Those in hand are counted among those that wait."""
        return Depth(self._behind(self._topic), None, self._behind(self._dead))

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        topic = self._dead if dead else self._topic
        with closing(self._reader(topic)) as reader:
            return self._read(reader, topic, most)

    def replay(self, most: int) -> int:
        with closing(self._reader(self._dead)) as reader:
            found = self._read(reader, self._dead, most)
            self._produce(self._topic, [_without_reason(each) for each in found])
            after: dict[int, _Progress] = {}
            for each in found:
                partition, offset, _ = each.handle
                after[partition] = _Progress(offset + 1)
            if after:
                offsets = [TopicPartition(self._dead, partition, each.next) for partition, each in after.items()]
                self._ask(lambda: reader.commit(offsets=offsets, asynchronous=False))
            return len(found)

    def _give_back(self) -> None:
        pass  # what is not committed comes again

    def _release(self) -> None:
        leaving = threading.Thread(target=self._leave_group, name="tally-queue-leaves", daemon=True)
        leaving.start()
        leaving.join(ANSWER_SECONDS)
        if leaving.is_alive():
            log.warning("%s does not let this consumer go: others take over once its lock has run out", self._shown)
        elif self._producer is not None:
            self._producer.flush(ANSWER_SECONDS)

    def _leave_group(self) -> None:
        """May take for ever: in the midst of a rebalance, a client waits for a broker that need not answer."""
        with self._lock:
            if self._consumer is not None:
                with suppress(StorageError):  # the lock runs out
                    self._ask(self._consumer.close)
                self._consumer = None

    # -- partitions --------------------------------------------------------------------------------

    def _take(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """These partitions are ours now."""
        committed = consumer.committed(partitions, timeout=ANSWER_SECONDS)
        with self._lock:
            for each in committed:
                self._given[each.partition] = _Progress.of(each)
                if each.offset < 0:  # nothing is committed: from where the log begins
                    first, _ = consumer.get_watermark_offsets(each, timeout=ANSWER_SECONDS)
                    self._given[each.partition].next = first
                each.offset = self._given[each.partition].next
        consumer.assign(committed)
        # A partition that was paused when it was lost is so when it comes back.
        (consumer.pause if self._paused else consumer.resume)(committed)

    def _leave(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        with self._lock:
            for each in partitions:
                self._given.pop(each.partition, None)

    def _offsets(self, progresses: Mapping[int, _Progress]) -> list[TopicPartition]:
        return [
            TopicPartition(self._topic, partition, each.next, metadata=each.text())
            for partition, each in progresses.items()
        ]

    def _exists(self, topic: str) -> list[TopicPartition]:
        """The topic's partitions."""
        found = self._ask(lambda: self._writer().list_topics(topic, timeout=ANSWER_SECONDS)).topics[topic]
        if found.error is not None or not found.partitions:
            if found.error is None or found.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                hint = "Make it first, or mend its name."
                raise SourceNotFoundError(f"{self._shown}: there is no topic {topic}", hint=hint)
            raise self._refused(found.error)
        return [TopicPartition(topic, each) for each in found.partitions]

    def _ends(self, reader: Consumer, topic: str) -> list[tuple[TopicPartition, _Progress, int]]:
        """Of each partition: how far it is done, and where it ends."""
        try:
            partitions = self._exists(topic)
        except SourceNotFoundError:
            if topic == self._dead:
                return []
            raise
        ends = []
        for each in self._ask(lambda: reader.committed(partitions, timeout=ANSWER_SECONDS)):
            first, end = self._ask(lambda each=each: reader.get_watermark_offsets(each, timeout=ANSWER_SECONDS))  # type: ignore[misc]
            progress = _Progress.of(each)
            progress.next = max(progress.next, first)
            ends.append((each, progress, end))
        return ends

    def _behind(self, topic: str) -> int:
        with closing(self._reader(topic)) as reader:
            ends = self._ends(reader, topic)
        return sum(max(0, end - progress.next - len(progress.done)) for _, progress, end in ends)

    def _reader(self, topic: str) -> Consumer:
        """A client that is no member of the group. Dead messages have one of their own, which has no members: they
        alone may say how far a group is."""
        group = self._group["group.id"]
        return Consumer({**self._group, "group.id": f"{group}.dead" if topic == self._dead else group})

    def _read(self, reader: Consumer, topic: str, most: int) -> list[Message]:
        """The oldest messages of each partition that are not done."""
        ends = {each.partition: (progress, end) for each, progress, end in self._ends(reader, topic)}
        open_ = {partition for partition, (progress, end) in ends.items() if progress.next < end}
        found: list[Message] = []
        reader.assign([TopicPartition(topic, partition, ends[partition][0].next) for partition in open_])
        deadline = time.monotonic() + ANSWER_SECONDS
        while open_ and len(found) < most:
            if time.monotonic() > deadline:
                raise StorageAwayError(f"{self._shown} does not answer", hint=AWAY)
            for record in self._ask(lambda: reader.consume(most - len(found), 0.2)):
                if record.error() is not None:
                    continue
                partition, offset = record.partition(), record.offset()
                assert partition is not None
                assert offset is not None
                progress, end = ends[partition]
                if offset not in progress.done and offset < end:
                    found.append(_message(record, (partition, offset, progress)))
                if offset >= end - 1:
                    open_.discard(partition)
        return found

    # -- requests ----------------------------------------------------------------------------------

    def _writer(self) -> Producer:
        with self._lock:
            if self._producer is None:
                self._producer = Producer({**self._settings, "enable.idempotence": True, "linger.ms": 5})
            return self._producer

    def _produce(self, topic: str, messages: Sequence[Message]) -> None:
        """Returns once the brokers have them."""
        failed: list[KafkaError] = []
        written: list[None] = []

        def told(error: KafkaError | None, _: Record) -> None:
            if error is None:
                written.append(None)
            else:
                failed.append(error)

        producer = self._writer()
        for each in messages:
            headers = [(name, value.encode()) for name, value in each.headers.items() if name != KEY]
            key = each.headers.get(KEY)
            self._ask(
                lambda each=each, key=key, headers=headers: producer.produce(  # type: ignore[misc]
                    topic, each.body, key=key, headers=headers, on_delivery=told
                )
            )
        deadline = time.monotonic() + ANSWER_SECONDS
        while len(written) + len(failed) < len(messages) and time.monotonic() < deadline:
            self._ask(lambda: producer.flush(0.5))
        if failed:
            raise self._refused(failed[0])
        if len(written) < len(messages):
            raise StorageAwayError(f"{self._shown} does not answer", hint=AWAY)

    def _ask(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except KafkaException as error:
            raise self._refused(error.args[0]) from None
        except BufferError:
            raise StorageAwayError(f"{self._shown} takes no more messages at present") from None
        except RuntimeError as error:  # closed by another thread
            raise StorageAwayError(f"{self._shown} is closed: {error}") from None

    def _refused(self, error: KafkaError) -> StorageError:
        if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            hint = "Make it first, or mend its name."
            return SourceNotFoundError(f"{self._shown}: there is no such topic", hint=hint)
        if error.code() in _REFUSALS:
            hint = "Send smaller messages." if error.code() == KafkaError.MSG_SIZE_TOO_LARGE else LOGIN
            return StorageError(f"{self._shown} refuses: {error.str()}", hint=hint)
        return StorageAwayError(f"{self._shown} does not answer: {error.str()}", hint=AWAY)


_REFUSALS = (
    KafkaError.TOPIC_AUTHORIZATION_FAILED,
    KafkaError.GROUP_AUTHORIZATION_FAILED,
    KafkaError.CLUSTER_AUTHORIZATION_FAILED,
    KafkaError.SASL_AUTHENTICATION_FAILED,
    KafkaError._AUTHENTICATION,
    KafkaError.MSG_SIZE_TOO_LARGE,
)


def _message(record: Record, handle: tuple[int, int, _Progress]) -> Message:
    headers = record.headers() or []
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    shown = {str(name): _text(value) for name, value in pairs if value is not None}
    if (key := record.key()) is not None:
        shown.setdefault(KEY, _text(key))
    kind, milliseconds = record.timestamp()
    sent = None if kind == TIMESTAMP_NOT_AVAILABLE else iso_time(milliseconds / 1000)
    return Message(record.value() or b"", shown, handle, f"{record.partition()}/{record.offset()}", sent)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _with(message: Message, more: Mapping[str, str]) -> Message:
    return Message(message.body, {**message.headers, **more}, message.handle)


def _without_reason(message: Message) -> Message:
    return Message(message.body, {name: value for name, value in message.headers.items() if name != REASON})
