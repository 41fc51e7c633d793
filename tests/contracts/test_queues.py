"""Each broker's adapter keeps the contract of queues, and the source over it that of endless sources."""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests.services import require

pytest.importorskip("pika")
pytest.importorskip("redis")

from tally.sources.base import Source
from tally.sources.queues.base import REASON, Message, Queue
from tally.sources.queues.factory import open_queue
from tally.sources.queues.source import QueueSource
from tally.testing.sources import EndlessSourceContract

PATIENCE = 60.0
"""Seconds after which something will not happen any more."""

BROKERS = {
    "rabbitmq": ("RabbitMQ", 5672, "amqp://127.0.0.1/{name}"),
    "redis-stream": ("Redis", 6379, "redis://127.0.0.1/0/{name}"),
    "redis-list": ("Redis", 6379, "redis://127.0.0.1/0/{name}?kind=list"),
}


@pytest.fixture(params=list(BROKERS))
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A new queue; it is removed afterwards."""
    service, port, template = BROKERS[request.param]
    with contextlib.closing(socket.socket()) as probe:
        require(service, probe.connect_ex(("127.0.0.1", port)) == 0)
    name = f"tally-test-{secrets.token_hex(6)}"
    yield template.format(name=name)
    if service == "RabbitMQ":
        import pika

        with pika.BlockingConnection() as connection:
            channel = connection.channel()
            for each in (name, f"{name}.dead"):
                channel.queue_delete(each)
    else:
        import redis

        with redis.Redis() as client:
            for each in client.scan_iter(match=f"{name}*"):
                client.delete(each)


@pytest.fixture
def opened(url: str) -> Iterator[Callable[[], Queue]]:
    """Opens the queue, as another process would."""
    queues: list[Queue] = []

    def make() -> Queue:
        queues.append(open_queue(url))
        return queues[-1]

    yield make
    for each in queues:
        each.close()


def bodies(messages: Sequence[Message]) -> list[bytes]:
    return [each.body for each in messages]


def receive(queue: Queue, count: int) -> list[Message]:
    """So many messages, in order."""
    found: list[Message] = []
    until(lambda: found.extend(queue.receive(count - len(found), 0.2)) or len(found) == count)
    return found


def until(condition: Callable[[], object]) -> None:
    """Ask until it holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "this did not happen"


def test_what_is_sent_is_received_in_order_and_once(opened: Callable[[], Queue]) -> None:
    queue = opened()
    sent = [f"message {number} \u00e9".encode() for number in range(50)]
    queue.send([Message(each) for each in sent])
    assert bodies(receive(queue, 50)) == sent
    assert queue.receive(1, 0.05) == []
    assert opened().receive(1, 0.05) == []  # another consumer gets none of what is in hand


def test_what_is_acknowledged_is_gone_and_the_rest_comes_again(opened: Callable[[], Queue]) -> None:
    first = opened()
    first.send([Message(b"a"), Message(b"b"), Message(b"c")])
    first.acknowledge(receive(first, 3)[1:2])
    first.close()
    assert bodies(receive(opened(), 2)) == [b"a", b"c"]


def test_what_is_rejected_is_in_the_dead_letter_queue_with_its_reason(opened: Callable[[], Queue]) -> None:
    queue = opened()
    queue.send([Message(b"good"), Message(b"bad", {"from": "a test"})])
    good, bad = receive(queue, 2)
    queue.acknowledge([good])
    queue.reject(bad, "it cannot be read")
    until(lambda: queue.depth().dead == 1)
    [dead] = queue.peek(5, dead=True)
    assert (dead.body, dead.headers[REASON]) == (b"bad", "it cannot be read")
    assert queue.peek(5, dead=True) == [dead]  # looking takes nothing

    assert queue.replay(10) == 1
    [again] = receive(queue, 1)
    assert again.body == b"bad"
    assert REASON not in again.headers
    queue.acknowledge([again])
    depth = queue.depth()
    assert (depth.waiting, depth.dead) == (0, 0)


def test_depth_and_peek(opened: Callable[[], Queue]) -> None:
    queue = opened()
    queue.send([Message(b"a"), Message(b"b")])
    until(lambda: queue.depth().waiting == 2)
    assert bodies(queue.peek(1)) == [b"a"]
    until(lambda: queue.depth().waiting == 2)  # looking takes nothing; RabbitMQ takes its time to put it back


class TestQueueSource(EndlessSourceContract):
    @pytest.fixture
    def make(self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Source]:
        monkeypatch.setattr("tally.sources.queues.source.WAIT_SECONDS", 0.05)
        (tmp_path / "in").mkdir()
        for key in "abcde":
            (tmp_path / "in" / key).write_bytes(key.encode())
        return lambda: QueueSource.describe(url, "bytes", {"base": str(tmp_path / "in")})

    @pytest.fixture
    def send(self, opened: Callable[[], Queue]) -> Callable[[Sequence[str]], None]:
        queue = opened()
        return lambda keys: queue.send([Message(key.encode()) for key in keys])

    @pytest.fixture
    def acknowledged(self, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
        said: list[str] = []
        from tally.sources.queues.rabbitmq import RabbitQueue
        from tally.sources.queues.redis import RedisList, RedisStream

        for kind in (RabbitQueue, RedisStream, RedisList):
            before = kind.acknowledge

            def noting(self: Any, messages: Sequence[Message], before: Any = before) -> None:
                before(self, messages)
                said.extend(each.body.decode() for each in messages)

            monkeypatch.setattr(kind, "acknowledge", noting)
        return lambda: list(said)
