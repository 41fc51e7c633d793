"""Each broker's adapter keeps the contract of queues, and the source over it that of endless sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.extent import FULL
from tests.ports import free_ports
from tests.queues import MAKERS, new_queue
from tests.waiting import eventually

from tally.errors import SourceNotFoundError, SpecError, StorageAwayError, StorageError
from tally.sources.base import Source
from tally.sources.queues.base import REASON, Depth, Message, Queue
from tally.sources.queues.factory import open_queue
from tally.sources.queues.source import QueueSource
from tally.testing.sources import EndlessSourceContract

SHORT = {"redis-stream": "?lock=1", "sqs": "?lock=1", "azure-queue": "?lock=1", "servicebus": "-short"}
"""How URLs end that say that messages go to another consumer after a second or two, for brokers that keep a lock for
each message."""

UNORDERED = ("sqs", "sqs-fifo", "azure-queue")
"""Brokers that promise no order. SQS has one within a group only, and here each message is in a group of its own."""


# A subscription is a queue by another address; test_servicebus.py asks for what differs.
@pytest.fixture(params=[each for each in MAKERS if FULL or each != "servicebus-topic"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest) -> Iterator[str]:
    with new_queue(kind, request) as url:
        yield url


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
    eventually(lambda: found.extend(queue.receive(count - len(found), 0.2)) or len(found) == count)
    return found


def test_what_is_sent_is_received_in_order_and_once(opened: Callable[[], Queue], kind: str) -> None:
    queue = opened()
    sent = [f"message {number} \u00e9".encode() for number in range(50)]
    queue.send([Message(each) for each in sent])
    received = bodies(receive(queue, 50))
    assert sorted(received) == sorted(sent)
    assert received == sent or kind in UNORDERED
    assert queue.receive(1, 0.05) == []
    assert opened().receive(1, 0.05) == []  # another consumer gets none of what is in hand


def test_what_is_acknowledged_is_gone_and_the_rest_comes_again(opened: Callable[[], Queue]) -> None:
    first = opened()
    first.send([Message(b"a"), Message(b"b"), Message(b"c")])
    first.acknowledge([each for each in receive(first, 3) if each.body == b"b"])
    first.close()
    assert sorted(bodies(receive(opened(), 2))) == [b"a", b"c"]


def test_what_is_rejected_is_in_the_dead_letter_queue_with_its_reason(opened: Callable[[], Queue]) -> None:
    queue = opened()
    queue.send([Message(b"good"), Message(b"bad", {"from": "a test"})])
    bad, good = sorted(receive(queue, 2), key=lambda each: each.body)
    queue.acknowledge([good])
    queue.reject([(bad, "it cannot be read")])
    eventually(lambda: queue.depth().dead == 1)
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
    eventually(lambda: queue.depth().waiting == 2)
    assert bodies(queue.peek(1)) in ([b"a"], [b"b"])
    eventually(lambda: queue.depth().waiting == 2)  # looking takes nothing; RabbitMQ takes its time to put it back


@pytest.mark.parametrize("kind", ["rabbitmq"], indirect=True)
def test_looking_at_a_rabbitmq_queue_makes_none(url: str, opened: Callable[[], Queue]) -> None:
    queue = opened()
    for look in (queue.depth, partial(queue.peek, 1), partial(queue.peek, 1, dead=True)):
        with pytest.raises(SourceNotFoundError, match="there is no such queue"):
            look()
    assert queue.replay(1) == 0


@pytest.mark.parametrize("kind", ["rabbitmq"], indirect=True)
@pytest.mark.parametrize(
    "made", [{"durable": True, "arguments": {"x-queue-type": "quorum"}}, {"arguments": {"x-message-ttl": 3_600_000}}]
)
def test_a_rabbitmq_queue_that_others_made_is_taken_as_it_is(
    url: str, opened: Callable[[], Queue], made: dict[str, Any]
) -> None:
    import pika

    with pika.BlockingConnection() as connection:
        connection.channel().queue_declare(url.rpartition("/")[2], **made)
    queue = opened()
    queue.send([Message(b"a"), Message(b"b")])
    eventually(lambda: queue.depth() == Depth(2, dead=0))
    a, b = receive(queue, 2)
    queue.acknowledge([a])
    queue.reject([(b, "no such item")])
    eventually(lambda: queue.depth() == Depth(0, dead=1))
    assert queue.replay(5) == 1
    assert bodies(receive(queue, 1)) == [b"b"]


@pytest.mark.parametrize("kind", ["rabbitmq"], indirect=True)
def test_a_rabbitmq_queue_that_is_deleted_meanwhile_swallows_nothing(url: str, opened: Callable[[], Queue]) -> None:
    import pika

    queue, name = opened(), url.rpartition("/")[2]
    queue.send([Message(b"a")])
    (a,) = receive(queue, 1)
    queue.reject([(a, "no such item")])
    queue.send([Message(b"b")])
    (b,) = receive(queue, 1)
    with pika.BlockingConnection() as connection:
        connection.channel().queue_delete(f"{name}.dead")
    with pytest.raises(StorageAwayError):  # or the broker would throw away what is rejected
        queue.reject([(b, "no such item")])
    (b,) = receive(queue, 1)
    queue.reject([(b, "no such item")])
    eventually(lambda: queue.depth() == Depth(0, dead=1))


@pytest.mark.parametrize("kind", ["rabbitmq"], indirect=True)
def test_a_rabbitmq_server_that_is_away_is_told_with_the_reason(url: str, kind: str) -> None:
    (port,) = free_ports(1)
    with (
        closing(open_queue(f"amqp://127.0.0.1:{port}/none")) as queue,
        pytest.raises(StorageAwayError, match="Connection refused"),
    ):
        queue.depth()


def ours(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "tally"]


@pytest.mark.parametrize("address", ["amqp://127.0.0.1:{}/none", "redis://127.0.0.1:{}/0/none"])
def test_who_waits_for_a_broker_is_told_once_what_for(address: str, caplog: pytest.LogCaptureFixture) -> None:
    (port,) = free_ports(1)
    with closing(open_queue(address.format(port))) as queue:
        eventually(lambda: queue.receive(1, 0.1) or ours(caplog))
        assert queue.receive(1, 0.1) == []
    [said] = ours(caplog)
    assert said.startswith(f"{address.format(port)} does not answer: ")
    assert "onnection refused; it is tried again\n  Check that the broker runs" in said


@pytest.mark.parametrize("kind", ["redis-stream"], indirect=True)
def test_a_key_of_another_kind_ends_the_job_instead_of_being_waited_for(url: str, opened: Callable[[], Queue]) -> None:
    opened().send([Message(b"a")])
    with closing(open_queue(f"{url}?kind=list")) as queue, pytest.raises(StorageError, match="WRONGTYPE") as refused:
        queue.receive(1, 0.1)
    assert not isinstance(refused.value, StorageAwayError)
    assert "?kind=list after the URL says that it is a list" in str(refused.value)


@pytest.mark.parametrize("kind", list(SHORT), indirect=True)
def test_a_lock_holds_as_long_as_it_is_extended(url: str, kind: str) -> None:
    with closing(open_queue(url + SHORT[kind])) as first, closing(open_queue(url + SHORT[kind])) as second:
        first.send([Message(b"a"), Message(b"b")])
        a, _ = receive(first, 2)
        others: list[Message] = []

        def again() -> bool:
            first.extend([a])
            others.extend(second.receive(2, 0.1))
            return bool(others)

        eventually(again)
        assert bodies(others) == [b"b"]
        first.acknowledge([a])
        second.acknowledge(others)
        eventually(lambda: (second.depth().waiting, second.depth().in_hand or 0) == (0, 0))


@pytest.mark.parametrize("kind", list(SHORT), indirect=True)
def test_settling_what_another_has_meanwhile_is_no_error(opened: Callable[[], Queue]) -> None:
    first = opened()
    first.send([Message(b"a"), Message(b"b")])
    lost = receive(first, 2)
    first.acknowledge(lost)
    first.acknowledge(lost)
    first.extend(lost)
    assert first.depth().waiting == 0


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

        def noting(url: str) -> Queue:
            queue = open_queue(url)
            before = queue.acknowledge

            def acknowledge(messages: Sequence[Message]) -> None:
                before(messages)
                said.extend(each.body.decode() for each in messages)

            monkeypatch.setattr(queue, "acknowledge", acknowledge)
            return queue

        monkeypatch.setattr("tally.sources.queues.source.open_queue", noting)
        return lambda: list(said)


def test_a_message_tells_its_id_and_when_it_was_sent(opened: Callable[[], Queue], kind: str) -> None:
    queue, begun = opened(), datetime.now(UTC)
    sent = begun.isoformat(timespec="seconds")
    given = [Message(f"{n}".encode(), id=f"sender's-{n}", time=sent) for n in range(2)]
    queue.send(given)
    received = receive(queue, 2)
    if kind == "redis-list":
        assert {(each.id, each.time) for each in received} == {(None, None)}
        return
    assert len({each.id for each in received}) == 2
    assert None not in {each.id for each in received}
    for each in received:
        assert each.time is not None
        assert abs((datetime.fromisoformat(each.time) - begun).total_seconds()) < 60
    if kind == "rabbitmq":  # which keeps what the sender says, also where messages die
        queue.reject([(each, "it is dead") for each in received])
        queue.replay(2)
        assert sorted((each.id, each.time) for each in receive(queue, 2)) == sorted(
            (each.id, each.time) for each in received
        )
        assert {each.id for each in received} == {each.id for each in given}


@pytest.mark.parametrize("kind", ["rabbitmq"])
def test_rabbitmq_knows_the_user_that_the_url_names(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    named = url.replace("amqp://", "amqp://g%75est@")
    with pytest.raises(SpecError, match="names a user"):
        open_queue(named)
    monkeypatch.setenv("TALLY_QUEUE_PASSWORD", "wrong")
    with closing(open_queue(named)) as queue, pytest.raises(StorageAwayError, match=r"ACCESS_REFUSED(?s:.+)QUEUE_PASS"):
        queue.send([Message(b"a")])
    monkeypatch.setenv("TALLY_QUEUE_PASSWORD", "guest")
    with closing(open_queue(named)) as queue:
        queue.send([Message(b"a")])
        assert bodies(receive(queue, 1)) == [b"a"]
