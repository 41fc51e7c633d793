"""Messages in hand: each is settled, also one that comes a second time while the first is being settled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tally.sources.base import ChunkLimit
from tally.sources.queues import source as queue_source
from tally.sources.queues.base import Depth, Message, Queue
from tally.sources.queues.bodies import BodyReader
from tally.sources.queues.source import QueueSource


class Deliveries(Queue):
    """Delivers what it is given, in order. meanwhile: called while messages are acknowledged."""

    def __init__(self, *bodies: bytes) -> None:
        self.left = [Message(body, handle=number) for number, body in enumerate(bodies)]
        self.acknowledged: list[int] = []
        self.rejected: list[tuple[int, str]] = []
        self.meanwhile: Callable[[], None] = lambda: None

    def receive(self, most: int, seconds: float) -> list[Message]:
        assert self.left, "nothing is left to deliver, and something is waited for"
        return [self.left.pop(0)]

    def acknowledge(self, messages: Sequence[Message]) -> None:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        self.acknowledged += [each.handle for each in messages]

    def reject(self, messages: Sequence[tuple[Message, str]]) -> None:
        self.rejected += [(message.handle, reason) for message, reason in messages]

    def send(self, messages: Sequence[Message]) -> None:
        raise AssertionError(messages)

    def depth(self) -> Depth:
        return Depth(len(self.left))

    def peek(self, most: int, *, dead: bool = False) -> list[Message]:
        return self.left[:most]

    def replay(self, most: int) -> int:
        return 0

    def close(self) -> None:
        pass


def opened(queue: Queue, monkeypatch: pytest.MonkeyPatch, **options: Any) -> QueueSource:
    monkeypatch.setattr(queue_source, "open_queue", lambda url: queue)
    monkeypatch.setattr(queue_source, "check", lambda url: None)
    return QueueSource.describe("amqp://host/queue", "bytes", {"base": "/nowhere", **options})


def limit() -> ChunkLimit:
    return ChunkLimit(items=1, bytes=1000)


def test_what_comes_again_while_it_is_settled_is_settled_too(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Deliveries(b"a", b"a")
    source = opened(queue, monkeypatch)
    plan = source.plan(None, 0, limit)
    first = next(plan)
    again = []
    queue.meanwhile = lambda: again.append(next(plan))
    source.acknowledge([first], {})
    assert [source.keys(each) for each in again] == [["a"]]  # the coordinator knows that it is done
    source.acknowledge(again, {})
    assert sorted(set(queue.acknowledged)) == [0, 1]
    source.close()


def test_what_comes_again_while_it_waits_is_settled_with_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Deliveries(b"a", b"a", b"b")
    source = opened(queue, monkeypatch)
    plan = source.plan(None, 0, limit)
    chunks = [next(plan), next(plan)]
    assert [source.keys(each) for each in chunks] == [["a"], ["b"]]
    source.acknowledge(chunks[:1], {})
    assert queue.acknowledged == [0, 1]
    source.close()


def test_an_item_that_is_done_is_not_waited_for_with_the_rest_of_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Deliveries(b'["a", "b"]', b'["a"]')
    source = opened(queue, monkeypatch, body="json", key="*")
    plan = source.plan(None, 0, limit)
    both = next(plan)
    assert source.keys(both) == ["a", "b"]
    source.acknowledge([source.slice(both, 0, 1)], {})
    assert queue.acknowledged == []
    again = next(plan)
    assert source.keys(again) == ["a"]
    source.acknowledge([again], {})
    assert queue.acknowledged == [1]
    source.acknowledge([source.slice(both, 1, 2)], {})
    assert queue.acknowledged == [1, 0]
    source.close()


@pytest.mark.parametrize("place", ["names", "meta"])
def test_a_message_that_nobody_has_thought_of_costs_itself(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    look = BodyReader._names if place == "names" else BodyReader.value

    def fails(self: BodyReader, message: Message, *more: str) -> object:
        if b"odd" in message.body:
            raise AttributeError("'int' object has no attribute 'strip'")
        return look(self, message, *more)

    monkeypatch.setattr(BodyReader, look.__name__, fails)
    queue = Deliveries(b'{"name": "odd"}', b'{"name": "a"}')
    source = opened(queue, monkeypatch, body="json", key="name", meta={"size": "body:size"})
    chunk = next(source.plan(None, 0, limit))
    assert source.keys(chunk) == ["a"]
    [(handle, reason)] = queue.rejected
    assert handle == 0
    assert "AttributeError: 'int' object" in reason
    source.close()


def test_a_number_that_has_no_text_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Deliveries(b"{'name': 'a', 'size': 0x" + b"f" * 5000 + b"}", b"{'name': 'b', 'size': 5}")
    source = opened(queue, monkeypatch, body="pyliteral", key="name", meta={"size": "body:size"})
    chunk = next(source.plan(None, 0, limit))
    assert source.keys(chunk) == ["b"]
    assert "'size' is no number that can be kept" in queue.rejected[0][1]
    source.close()
