"""What only a log has: offsets, gaps, partitions that go to another consumer."""

from __future__ import annotations

import secrets
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.faults.storms import start, tally
from tests.kafka import MockKafka
from tests.waiting import wait_for

pytest.importorskip("confluent_kafka")

from confluent_kafka import Consumer, TopicPartition

from tally.errors import SpecError
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord
from tally.sources.queues.base import Depth, Message, Queue
from tally.sources.queues.factory import open_queue


@pytest.fixture
def topic(kafka_cluster: MockKafka) -> str:
    name = f"tally-test-{secrets.token_hex(6)}"
    kafka_cluster.make(name)
    return name


def url(kafka_cluster: MockKafka, topic: str) -> str:
    return f"kafka://{kafka_cluster.servers}/{topic}?lock=6&group={topic}"


def receive(queue: Queue, count: int) -> list[Message]:
    found: list[Message] = []
    while len(found) < count:
        found += queue.receive(count - len(found), 1.0)
    return found


def committed(kafka_cluster: MockKafka, topic: str) -> tuple[int, str | None]:
    with closing(Consumer({"bootstrap.servers": kafka_cluster.servers, "group.id": topic})) as reader:
        [found] = reader.committed([TopicPartition(topic, 0)], timeout=30)
    return found.offset, found.metadata


def test_a_gap_is_not_passed(kafka_cluster: MockKafka, topic: str) -> None:
    with closing(open_queue(url(kafka_cluster, topic))) as queue:
        queue.send([Message(str(number).encode()) for number in range(6)])
        messages = receive(queue, 6)
        queue.acknowledge([messages[number] for number in (0, 2, 3, 5)])
        assert committed(kafka_cluster, topic) == (1, "2-3,5-5")
        assert queue.depth().waiting == 2
        queue.acknowledge([messages[1]])
        assert committed(kafka_cluster, topic) == (4, "5-5")
        queue.acknowledge([messages[4]])
        assert committed(kafka_cluster, topic)[0] == 6


def test_what_went_to_another_consumer_is_not_committed(kafka_cluster: MockKafka, topic: str) -> None:
    with (
        closing(open_queue(url(kafka_cluster, topic))) as first,
        closing(open_queue(url(kafka_cluster, topic))) as second,
    ):
        first.send([Message(b"a"), Message(b"b")])
        old = receive(first, 2)
        first.close()  # leaves the group; what it had in hand is another's
        [a, b] = receive(second, 2)
        first.acknowledge(old)
        assert committed(kafka_cluster, topic)[0] < 1
        second.acknowledge([a, b])
        second.acknowledge(old)
        assert committed(kafka_cluster, topic)[0] == 2


def test_a_consumer_that_has_enough_takes_part_in_rebalances(kafka_cluster: MockKafka) -> None:
    topic = f"tally-test-{secrets.token_hex(6)}"
    kafka_cluster.make(topic, partitions=2)
    place = url(kafka_cluster, topic)
    with closing(open_queue(place)) as first, closing(open_queue(place)) as second:
        first.send([Message(str(number).encode(), {"key": str(number)}) for number in range(20)])
        old = receive(first, 20)
        theirs: list[Message] = []
        while not theirs:
            first.extend(old)
            theirs = second.receive(20, 0.2)
        while len(theirs) < sum(each.id.partition("/")[0] == theirs[0].id.partition("/")[0] for each in old):
            theirs += second.receive(20, 0.2)
        ours = receive(first, 20 - len(theirs))  # they come again, as they may have been another's meanwhile
        assert sorted(each.body for each in ours + theirs) == sorted(each.body for each in old)
        first.acknowledge(old)
        assert first.depth().waiting == 20
        first.acknowledge(ours)
        second.acknowledge(theirs)
        assert first.depth().waiting == 0


ITEMS = [f"{number:03}" for number in range(160)]
EARLY = 20
"""Items that are done before the others are sent."""
IN_HAND = 60
"""Messages that a job has in hand, at most."""
HELD = f"""
import time
from pathlib import Path
from tally import Scorer

GATE = Path(__file__).with_name("gate")

class Held(Scorer):
    '''Scores items from {EARLY} on when the file "gate" is there; while it waits, there is "gate.waiting".'''
    input = "bytes"
    batch_size = 8
    columns = {{"n": "int64"}}

    def score(self, batch):
        numbers = [int(each) for each in batch]
        while max(numbers) >= {EARLY} and not GATE.exists():
            GATE.with_suffix(".waiting").touch()
            time.sleep(0.05)
        return [{{"n": number}} for number in numbers]
"""


@dataclass
class Site:
    """A topic, and a folder with its items and the scorer that the gate holds."""

    topic: str
    url: str
    folder: Path

    @contextmanager
    def job(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """A job over the topic, which has ended afterwards."""
        command = tally(
            "score", self.url, "--queue", f"base={self.folder}", "--queue", f"prefetch={IN_HAND}",
            "--model", self.folder / "held.py", "--out", f"{self.folder / name}/", "--workers", 1, "--until-empty",
        )  # fmt: skip
        process = start(command, self.folder / f"{name}.log")
        try:
            yield process
            self.open_gate()
            wait_for(lambda: process.poll() is not None, process, 240, told=lambda: self.log(name))
            assert process.returncode == 0, self.log(name)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    @contextmanager
    def held_job(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        """One that has done the first items, and has others in hand."""
        with closing(open_queue(self.url)) as queue, self.job(name) as process:
            queue.send([Message(each.encode(), {"key": each}) for each in ITEMS[:EARLY]])
            wait_for(
                lambda: Jobs().store.newest() and self.newest().done == EARLY, process, told=lambda: self.log(name)
            )
            queue.send([Message(each.encode(), {"key": each}) for each in ITEMS[EARLY:]])
            wait_for((self.folder / "gate.waiting").exists, process, told=lambda: self.log(name))
            yield process

    def open_gate(self) -> None:
        (self.folder / "gate").touch()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def newest(self) -> JobRecord:
        (job,) = Jobs().store.newest(limit=1)
        return job

    def results(self, name: str) -> Counter[str]:
        """The keys in the results of the job, and how often they are there."""
        parts = sorted((self.folder / name).glob("*.parquet"))
        return Counter(pq.read_table(parts)["key"].to_pylist())

    def depth(self) -> Depth:
        with closing(open_queue(self.url)) as queue:
            return queue.depth()


@pytest.fixture
def site(kafka_cluster: MockKafka, tmp_path: Path) -> Site:
    topic = f"tally-test-{secrets.token_hex(6)}"
    kafka_cluster.make(topic, partitions=4)
    (tmp_path / "held.py").write_text(HELD)
    for each in ITEMS:
        (tmp_path / each).write_text(each)
    return Site(topic, url(kafka_cluster, topic), tmp_path)


def test_partitions_are_lost_and_come_back_while_a_job_runs(kafka_cluster: MockKafka, site: Site) -> None:
    with site.held_job("one") as process:
        other = {"bootstrap.servers": kafka_cluster.servers, "group.id": site.topic, "enable.auto.commit": False}
        with closing(Consumer({**other, "auto.offset.reset": "earliest", "session.timeout.ms": 6000})) as consumer:
            consumer.subscribe([site.topic])
            seen: list[bytes | None] = []
            while not seen:  # then it has partitions of which the job has messages in hand
                seen += [each.value() for each in consumer.consume(10, 0.2) if each.error() is None]
            site.open_gate()
            wait_for(lambda: site.newest().done > EARLY, process, told=lambda: site.log("one"))
    assert site.results("one") == Counter(ITEMS)
    assert (site.depth().waiting, site.depth().dead) == (0, 0)


def test_two_jobs_of_a_group_share_a_topic(site: Site) -> None:
    """What one had in hand as the other joined may be in the results of both; in those of each, everything is once."""
    with site.held_job("one"):
        first = site.newest().id
        with site.job("two") as second:
            wait_for(lambda: site.newest().id != first and site.newest().items, second, told=lambda: site.log("two"))
            assert site.depth().waiting == len(ITEMS) - EARLY
            site.open_gate()
    one, two = site.results("one"), site.results("two")
    assert sorted({*one, *two}) == ITEMS
    assert {*one.values(), *two.values()} == {1}
    assert len({*one} & {*two}) <= IN_HAND
    assert (site.depth().waiting, site.depth().dead) == (0, 0)


def test_a_message_keeps_its_key(kafka_cluster: MockKafka, topic: str) -> None:
    with closing(open_queue(url(kafka_cluster, topic))) as queue:
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
