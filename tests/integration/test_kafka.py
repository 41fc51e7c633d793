"""What only a log has: offsets, gaps, partitions that go to another consumer."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.kafka import MockKafka, mock_kafka

pytest.importorskip("confluent_kafka")

from confluent_kafka import Consumer, TopicPartition

from tally.errors import SpecError
from tally.sources.queues.base import Message, Queue
from tally.sources.queues.factory import open_queue


@pytest.fixture(scope="module")
def cluster() -> Iterator[MockKafka]:
    with mock_kafka() as kafka:
        yield kafka


@pytest.fixture
def topic(cluster: MockKafka) -> str:
    name = f"tally-test-{secrets.token_hex(6)}"
    cluster.make(name)
    return name


def url(cluster: MockKafka, topic: str) -> str:
    return f"kafka://{cluster.servers}/{topic}?lock=6&group={topic}"


def receive(queue: Queue, count: int) -> list[Message]:
    found: list[Message] = []
    while len(found) < count:
        found += queue.receive(count - len(found), 1.0)
    return found


def committed(cluster: MockKafka, topic: str) -> tuple[int, str | None]:
    with closing(Consumer({"bootstrap.servers": cluster.servers, "group.id": topic})) as reader:
        [found] = reader.committed([TopicPartition(topic, 0)], timeout=30)
    return found.offset, found.metadata


def test_a_gap_is_not_passed(cluster: MockKafka, topic: str) -> None:
    with closing(open_queue(url(cluster, topic))) as queue:
        queue.send([Message(str(number).encode()) for number in range(6)])
        messages = receive(queue, 6)
        queue.acknowledge([messages[number] for number in (0, 2, 3, 5)])
        assert committed(cluster, topic) == (1, "2-3,5-5")
        assert queue.depth().waiting == 2
        queue.acknowledge([messages[1]])
        assert committed(cluster, topic) == (4, "5-5")
        queue.acknowledge([messages[4]])
        assert committed(cluster, topic)[0] == 6


def test_what_went_to_another_consumer_is_not_committed(cluster: MockKafka, topic: str) -> None:
    with closing(open_queue(url(cluster, topic))) as first, closing(open_queue(url(cluster, topic))) as second:
        first.send([Message(b"a"), Message(b"b")])
        old = receive(first, 2)
        first.close()  # leaves the group; what it had in hand is another's
        [a, b] = receive(second, 2)
        first.acknowledge(old)
        assert committed(cluster, topic)[0] < 1
        second.acknowledge([a, b])
        second.acknowledge(old)
        assert committed(cluster, topic)[0] == 2


def test_a_message_keeps_its_key(cluster: MockKafka, topic: str) -> None:
    with closing(open_queue(url(cluster, topic))) as queue:
        queue.send([Message(b"a", {"key": "device-1", "from": "a test"})])
        [message] = receive(queue, 1)
        assert message.headers == {"key": "device-1", "from": "a test"}
        queue.reject([(message, "bad")])
        assert queue.replay(5) == 1
        assert receive(queue, 1)[0].headers == message.headers
        assert queue.replay(5) == 0


@pytest.mark.parametrize("written", ["kafka://", "kafka://host:9092", "kafka://host:9092/a/b", "kafkas://me@host/a"])
def test_urls_that_name_no_topic(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TALLY_QUEUE_PASSWORD", raising=False)
    with pytest.raises(SpecError):
        open_queue(written)
