"""Messages in hand: each is settled, also one that comes a second time while the first is being settled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tally.errors import JobError, StorageAwayError
from tally.jobs import intake
from tally.sources.base import ChunkLimit
from tally.sources.queues import source as queue_source
from tally.sources.queues.base import Depth, Message, Queue
from tally.sources.queues.bodies import BodyReader
from tally.sources.queues.source import QueueSource

SIZES = """
from tally import Scorer

class Sizes(Scorer):
    input = "bytes"

    def score(self, batch):
        return [{"size": len(each)} for each in batch]
"""


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


def opened(queue: Queue, monkeypatch: pytest.MonkeyPatch, until_empty: bool = False, **options: Any) -> QueueSource:
    monkeypatch.setattr(queue_source, "open_queue", lambda url: queue)
    monkeypatch.setattr(queue_source, "check", lambda url: None)
    given = {"base": "/nowhere", **options}
    return QueueSource.describe("amqp://host/queue", "bytes", given, until_empty=until_empty)


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


class Ending(Deliveries):
    """Is empty once all is delivered."""

    def receive(self, most: int, seconds: float) -> list[Message]:
        return super().receive(most, seconds) if self.left else []


def test_messages_that_cannot_be_read_are_told_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Ending(b"nothing", b'{"name": "a"}', b"[]")
    source = opened(queue, monkeypatch, until_empty=True, body="json", key="name")
    for chunk in source.plan(None, 0, limit):
        source.acknowledge([chunk], {})
    assert queue.acknowledged == [1]
    told = source.remark() or ""
    assert told.startswith("2 messages could not be read, and went to the dead of the queue; the first: ")
    assert "nothing" in told
    source.close()


def test_a_job_that_could_read_no_message_has_not_gone_well(monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(Ending(b"nothing", b"[]"), monkeypatch, until_empty=True, body="json", key="name")
    with pytest.raises(JobError, match=r"^none of 2 messages could be read: .*nothing"):
        list(source.plan(None, 0, limit))
    source.close()
    again = opened(Ending(b"[]"), monkeypatch, until_empty=True, body="json", key="name")
    assert list(again.plan("cursor", 7, limit)) == []  # others were read before
    again.close()


def test_a_number_that_has_no_text_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Deliveries(b"{'name': 'a', 'size': 0x" + b"f" * 5000 + b"}", b"{'name': 'b', 'size': 5}")
    source = opened(queue, monkeypatch, body="pyliteral", key="name", meta={"size": "body:size"})
    chunk = next(source.plan(None, 0, limit))
    assert source.keys(chunk) == ["b"]
    assert "'size' is no number that can be kept" in queue.rejected[0][1]
    source.close()


class Brief(Deliveries):
    """A broker that has nothing more in the end. away: how often it does not answer when it is asked to settle."""

    def __init__(self, *bodies: bytes, away: int = 0) -> None:
        super().__init__(*bodies)
        self.sent, self.away = len(bodies), away
        self.depths: list[Depth | None] = []
        """What it says when it is asked; None: it does not answer."""

    def receive(self, most: int, seconds: float) -> list[Message]:
        return super().receive(most, seconds) if self.left else []

    def acknowledge(self, messages: Sequence[Message]) -> None:
        self.away -= 1
        if self.away >= 0:
            raise StorageAwayError("it does not answer")
        super().acknowledge(messages)

    def depth(self) -> Depth:
        said = self.depths.pop(0) if self.depths else Depth(0, self.sent - len(self.acknowledged))
        if said is None:
            raise StorageAwayError("it does not answer")
        return said


def test_an_acknowledgement_that_failed_is_tried_again_though_nothing_else_comes(
    cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "sizes.py").write_text(SIZES)
    queue = Brief(b"a", away=3)
    monkeypatch.setattr(queue_source, "open_queue", lambda url: queue)
    monkeypatch.setattr(intake, "AGAIN_SECONDS", 0.01)
    done = cli(
        "score", "redis://127.0.0.1/0/nothing", "--queue", f"base={tmp_path}", "--queue", "prefetch=1",
        "--model", tmp_path / "sizes.py", "--out", tmp_path / "out", "--until-empty", "--workers", "1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert queue.acknowledged == [0]


def test_a_queue_is_empty_when_its_broker_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_source, "IDLE_SECONDS", 0)
    queue = Brief()
    queue.depths = [None, Depth(1), Depth(0, 1), Depth(0, 0)]
    source = opened(queue, monkeypatch, until_empty=True)
    assert list(source.plan(None, 0, limit)) == []
    assert queue.depths == []


class Slow(Deliveries):
    """A broker that takes its time to renew locks, while ``slow`` is set. rounds: counts the renewals."""

    lock_seconds = 0.03

    def __init__(self, *bodies: bytes) -> None:
        super().__init__(*bodies)
        self.slow, self.rounds = threading.Event(), threading.Semaphore(0)
        self.slow.set()

    def extend(self, messages: Sequence[Message]) -> None:
        if self.slow.is_set():
            time.sleep(self.lock_seconds)
        self.rounds.release()


def test_no_more_is_taken_in_hand_than_can_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = Slow(b"a", b"b")
    source = opened(queue, monkeypatch)
    plan = source.plan(None, 0, limit)
    assert source.keys(next(plan)) == ["a"]
    for _ in range(2):  # so that one is over
        queue.rounds.acquire()
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(next, plan)
        for _ in range(3):
            queue.rounds.acquire()
        assert not second.done()
        queue.slow.clear()
        assert source.keys(second.result(60)) == ["b"]
    source.close()
