"""Redis, by redis-py: ``redis://HOST:PORT/DB/NAME`` is a stream; ``...?kind=list`` a list.

Of a stream, messages are read by the consumer group ``tally`` (``?group=``). What a consumer leaves for longer than the
lock (``?lock=`` seconds, 60) is claimed by another. Of a list, messages are moved to a list of the consumer's own,
which others take over when its sign of life is gone, after as long. Dead messages are in ``NAME:dead``, of the same
kind, with their reason.

Redis keeps what it has promised only as well as it is configured to: see ``appendfsync``.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

import redis
from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError

from tally import network
from tally.config import variable
from tally.errors import SpecError, StorageAwayError, StorageError
from tally.masking import mask
from tally.sources.queues.base import AWAY, REASON, Depth, Message, PolledQueue, Queue, iso_time, lock_of, options_of
from tally.sources.queues.factory import LOGIN, PASSWORD

LOCK_SECONDS = 60.0
ANSWER_SECONDS = 30.0
BODY = b"body"
_POLL_SECONDS = 0.05
_AT_ONCE = 100
"""Messages of a list that are asked for with one request, at most."""
_KINDS = "?kind=list after the URL says that it is a list; without that, it is a stream."
_NOBODY = "nobody"
"""The consumer of a stream that has what was given back."""

T = TypeVar("T")


def open_queue(url: str) -> Queue:
    """The queue of this URL."""
    parts = urlsplit(url)
    database, _, name = parts.path.removeprefix("/").partition("/")
    if not name or not database.isdecimal():
        raise SpecError(
            f"{mask(url)} names no queue", hint="Write redis://HOST/0/NAME, with the number of the database."
        )
    options = options_of(url, "kind", "group", "lock")
    lock = lock_of(url, options, LOCK_SECONDS)
    client = redis.Redis.from_url(
        f"{parts.scheme}://{parts.netloc}/{database}",
        password=variable(PASSWORD),
        socket_timeout=ANSWER_SECONDS,
        socket_connect_timeout=5,
    )
    client.connection_pool.connection_class = _TlsConnection if parts.scheme == "rediss" else _Connection
    kind = options.get("kind", "stream")
    if kind == "stream":
        return RedisStream(client, unquote(name), options.get("group", "tally"), lock=lock, shown=mask(url))
    if kind == "list":
        return RedisList(client, unquote(name), lock=lock, shown=mask(url))
    raise SpecError(f"{mask(url)}: kind should be stream or list, not {kind!r}")


class _Connection(redis.Connection):
    """One that connects to allowed addresses only."""

    def _connect(self) -> Any:
        if network.is_allowed(self.host):
            return super()._connect()  # type: ignore[no-untyped-call]
        found = network.create_connection((self.host, self.port), self.socket_connect_timeout)
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        found.settimeout(self.socket_timeout)
        return found


class _TlsConnection(redis.SSLConnection, _Connection):
    """The same with TLS: the certificate is that of the name."""


class _RedisQueue(PolledQueue):
    """What streams and lists share."""

    def __init__(self, client: Any, name: str, *, lock: float, shown: str) -> None:
        super().__init__()
        self.lock_seconds = self._lock = lock
        self._client, self._name, self._shown = client, name, shown
        self._dead = f"{name}:dead"
        self._consumer = secrets.token_hex(8)

    def _ask(self, what: Callable[[], T]) -> T:
        try:
            return what()
        except (AuthenticationError, AuthorizationError, NoPermissionError) as error:
            raise StorageError(f"{self._shown} refuses: {error}", hint=LOGIN) from None
        except (RedisConnectionError, redis.TimeoutError, OSError) as error:
            raise StorageAwayError(f"{self._shown} does not answer: {error}", hint=AWAY) from None
        except RedisError as error:
            if "WRONGTYPE" in str(error):
                raise StorageError(f"{self._shown} refuses: {error}", hint=_KINDS) from None
            raise StorageAwayError(f"{self._shown} refuses: {error}", hint="A job waits until it does not.") from None
        except Exception:
            if self._closed.is_set():  # by another thread, while this one waited for an answer
                raise StorageAwayError(f"{self._shown} is closed") from None
            raise

    def _release(self) -> None:
        self._client.close()


class RedisStream(_RedisQueue):
    """A stream, read by a consumer group. What is acknowledged is also removed from it."""

    def __init__(self, client: Any, name: str, group: str, *, lock: float, shown: str) -> None:
        super().__init__(client, name, lock=lock, shown=shown)
        self._group = group
        self._claimed_at = 0.0

    def _poll(self, most: int, seconds: float) -> list[Message]:
        def read() -> list[Message]:
            self._make_group()
            return self._claim(most) or self._read(most, seconds)

        return self._ask(read)

    def _make_group(self) -> None:
        try:
            self._client.xgroup_create(self._name, self._group, id="0", mkstream=True)
        except ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def _claim(self, most: int) -> list[Message]:
        """What other consumers have left; looked for once in a while."""
        if time.monotonic() < self._claimed_at + self._lock / 4:
            return []
        answer = self._client.xautoclaim(
            self._name, self._group, self._consumer, min_idle_time=int(self._lock * 1000), count=most
        )
        found = [_message(each) for each in answer[1] if each[1]]
        if not found:
            self._claimed_at = time.monotonic()
        return found

    def _read(self, most: int, seconds: float) -> list[Message]:
        block = max(1, int(seconds * 1000))
        answer = self._client.xreadgroup(self._group, self._consumer, {self._name: ">"}, count=most, block=block)
        return [_message(each) for _, entries in _pairs(answer) for each in _entries(entries)]

    def acknowledge(self, messages: Sequence[Message]) -> None:
        ids = [each.handle for each in messages]
        if ids:
            self._ask(lambda: self._pipeline(ids).execute())

    def _pipeline(self, ids: Sequence[bytes]) -> Any:
        pipeline = self._client.pipeline(transaction=True)
        pipeline.xack(self._name, self._group, *ids)
        pipeline.xdel(self._name, *ids)
        return pipeline

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        def move() -> None:
            pipeline = self._pipeline([message.handle for message, _ in rejected])
            for message, reason in rejected:
                pipeline.xadd(self._dead, _fields(message, {REASON: reason}))
            pipeline.execute()

        if rejected:
            self._ask(move)

    def extend(self, messages: Sequence[Message]) -> None:
        ids = [each.handle for each in messages]
        if ids:
            self._ask(
                lambda: self._client.xclaim(
                    self._name, self._group, self._consumer, min_idle_time=0, message_ids=ids, justid=True
                )
            )

    def send(self, messages: Sequence[Message]) -> None:
        def add() -> None:
            pipeline = self._client.pipeline(transaction=False)
            for each in messages:
                pipeline.xadd(self._name, _fields(each, {}))
            pipeline.execute()

        self._ask(add)

    def _give_back(self) -> None:
        def give() -> None:
            while True:
                held = self._client.xpending_range(self._name, self._group, "-", "+", 1000, self._consumer)
                ids = [each["message_id"] for each in held]
                if ids:
                    long_ago = int(self._lock * 1000)
                    self._client.xclaim(self._name, self._group, _NOBODY, 0, ids, idle=long_ago, justid=True)
                else:
                    return

        self._ask(give)

    def depth(self) -> Depth:
        def count() -> Depth:
            self._make_group()
            held = int(self._client.xpending(self._name, self._group)["pending"])
            return Depth(int(self._client.xlen(self._name)) - held, held, int(self._client.xlen(self._dead)))

        return self._ask(count)

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        name = self._dead if dead else self._name
        return self._ask(lambda: [_message(each) for each in self._client.xrange(name, count=most)])

    def replay(self, most: int) -> int:
        def move() -> int:
            entries = [_message(each) for each in self._client.xrange(self._dead, count=most)]
            pipeline = self._client.pipeline(transaction=True)
            for each in entries:
                headers = {name: value for name, value in each.headers.items() if name != REASON}
                pipeline.xadd(self._name, _fields(Message(each.body, headers), {}))
                pipeline.xdel(self._dead, each.handle)
            pipeline.execute()
            return len(entries)

        return self._ask(move)


class RedisList(_RedisQueue):
    """A list. Each consumer moves what it takes to a list of its own, and shows that it lives by a key that expires."""

    def __init__(self, client: Any, name: str, *, lock: float, shown: str) -> None:
        super().__init__(client, name, lock=lock, shown=shown)
        self._held: Counter[bytes] = Counter()
        self._unsure = False
        """Whether a request failed that may have moved messages all the same."""

    def _poll(self, most: int, seconds: float) -> list[Message]:
        def take() -> list[Message]:
            self._show_life()
            self._take_over()
            if self._unsure:
                found = list((Counter(self._client.lrange(self._mine, 0, -1)) - self._held).elements())
                self._unsure = False
                if found:
                    return [Message(body, {}, body) for body in found]
            self._unsure = True
            found = move()
            self._unsure = False
            return [Message(body, {}, body) for body in found]

        def move() -> list[bytes]:
            deadline = time.monotonic() + seconds
            while True:
                pipeline = self._client.pipeline(transaction=False)
                for _ in range(min(most, _AT_ONCE)):
                    pipeline.lmove(self._name, self._mine, "LEFT", "RIGHT")
                found = [body for body in pipeline.execute() if body is not None]
                if found or time.monotonic() >= deadline:
                    return found
                time.sleep(_POLL_SECONDS)

        messages = self._ask(take)
        self._held.update(each.body for each in messages)
        return messages

    @property
    def _mine(self) -> str:
        return f"{self._name}:taken:{self._consumer}"

    def _show_life(self) -> None:
        self._client.set(f"{self._name}:alive:{self._consumer}", "1", ex=int(self._lock))

    def _take_over(self) -> None:
        """Put back what consumers have taken that are gone."""
        for taken in self._client.scan_iter(match=f"{_escaped(self._name)}:taken:*", count=1000):
            consumer = taken.decode().rpartition(":")[2]
            if consumer != self._consumer and not self._client.exists(f"{self._name}:alive:{consumer}"):
                while self._client.lmove(taken, self._name, "RIGHT", "LEFT") is not None:
                    pass

    def acknowledge(self, messages: Sequence[Message]) -> None:
        def remove() -> None:
            pipeline = self._client.pipeline(transaction=False)
            for each in messages:
                pipeline.lrem(self._mine, 1, each.handle)
            pipeline.execute()

        if messages:
            self._ask(remove)
            self._held.subtract(each.body for each in messages)
            self._held = +self._held

    def reject(self, rejected: Sequence[tuple[Message, str]]) -> None:
        def move() -> None:
            pipeline = self._client.pipeline(transaction=True)
            for message, reason in rejected:
                pipeline.rpush(self._dead, json.dumps({"body": message.body.decode("latin-1"), REASON: reason}))
                pipeline.lrem(self._mine, 1, message.handle)
            pipeline.execute()

        if rejected:
            self._ask(move)
            self._held -= Counter(message.body for message, _ in rejected)

    def extend(self, messages: Sequence[Message]) -> None:
        self._ask(self._show_life)

    def send(self, messages: Sequence[Message]) -> None:
        if messages:
            self._ask(lambda: self._client.rpush(self._name, *(each.body for each in messages)))

    def _give_back(self) -> None:
        def give() -> None:
            while self._client.lmove(self._mine, self._name, "RIGHT", "LEFT") is not None:
                pass
            self._client.delete(f"{self._name}:alive:{self._consumer}")

        self._ask(give)

    def depth(self) -> Depth:
        def count() -> Depth:
            taken = self._client.scan_iter(match=f"{_escaped(self._name)}:taken:*", count=1000)
            held = sum(int(self._client.llen(each)) for each in taken)
            return Depth(int(self._client.llen(self._name)), held, int(self._client.llen(self._dead)))

        return self._ask(count)

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        found = self._ask(lambda: self._client.lrange(self._dead if dead else self._name, 0, most - 1))
        return [_dead_message(each) if dead else Message(each, {}) for each in found]

    def replay(self, most: int) -> int:
        def move() -> int:
            entries = self._client.lrange(self._dead, 0, most - 1)
            pipeline = self._client.pipeline(transaction=True)
            for each in entries:
                pipeline.rpush(self._name, _dead_message(each).body)
                pipeline.lrem(self._dead, 1, each)
            pipeline.execute()
            return len(entries)

        return self._ask(move)


def _escaped(name: str) -> str:
    """The name in a pattern of SCAN."""
    return "".join(f"\\{each}" if each in "*?[]\\^" else each for each in name)


def _dead_message(content: bytes) -> Message:
    held = json.loads(content)
    return Message(held["body"].encode("latin-1"), {REASON: held[REASON]})


def _pairs(answer: Any) -> list[tuple[Any, Any]]:
    """Streams and their entries: a list in the older protocol of Redis, a mapping in the newer."""
    if not answer:
        return []
    return list(answer.items()) if isinstance(answer, Mapping) else [tuple(each) for each in answer]


def _entries(entries: Any) -> list[tuple[bytes, Mapping[bytes, bytes]]]:
    """The newer protocol puts entries into a list of one."""
    nested = entries and isinstance(entries[0], list) and entries[0] and isinstance(entries[0][0], (list, tuple))
    return list(entries[0] if nested else entries)


def _message(entry: tuple[bytes, Mapping[bytes, bytes]]) -> Message:
    number, fields = entry
    headers = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items() if name != BODY}
    body = fields.get(BODY)
    if body is None:  # of another sender: its fields are the message
        body = json.dumps(headers).encode()
    return Message(body, headers, number, number.decode(), iso_time(int(number.partition(b"-")[0]) / 1000))


def _fields(message: Message, more: Mapping[str, str]) -> dict[Any, Any]:
    return {BODY: message.body, **message.headers, **more}
