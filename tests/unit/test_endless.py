"""The broker that stands for real ones in tests: who is killed loses nothing but its turn."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tally.testing.endless import Broker


def _take_and_die(path: Path) -> None:
    assert len(Broker(path).consume().receive(3)) == 3
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_had_is_delivered_again(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "queue.db")
    broker.publish([(str(n), b"x") for n in range(5)])
    process = multiprocessing.get_context("spawn").Process(target=_take_and_die, args=(broker.path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    consumer = broker.consume()
    assert [each.key for each in consumer.receive(10)] == ["0", "1", "2", "3", "4"]
    delivered = Counter(event.key for event in broker.events("delivered"))
    assert delivered == {"0": 2, "1": 2, "2": 2, "3": 1, "4": 1}
    consumer.close()


def test_who_lives_keeps_what_it_has(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "queue.db")
    broker.publish([("a", b"1"), ("b", b"2")])
    first, second = broker.consume(), broker.consume()
    [mine] = first.receive(1)
    assert [each.key for each in second.receive(5)] == ["b"]
    assert second.receive(5) == []
    first.close()
    first.close()
    [again] = second.receive(5)
    assert (again.key, again.body) == ("a", b"1")
    assert again.handle != mine.handle
    third = broker.consume()
    third.acknowledge([mine])
    assert broker.waiting() == 2
    second.acknowledge([again, again])
    assert broker.waiting() == 1
    kinds = [(event.kind, event.key) for event in broker.events()][2:]
    assert kinds == [
        ("delivered", "a"),
        ("delivered", "b"),
        ("delivered", "a"),
        ("refused", "a"),
        ("acknowledged", "a"),
        ("refused", "a"),
    ]
    second.close()
    third.close()


def test_each_message_goes_to_one_consumer(tmp_path: Path) -> None:
    broker = Broker(tmp_path / "queue.db")
    broker.publish([(str(n), b"") for n in range(200)])
    consumers = [broker.consume() for _ in range(4)]

    def drain(number: int) -> list[str]:
        found: list[str] = []
        while some := consumers[number].receive(7):
            found += [each.key for each in some]
        return found

    with ThreadPoolExecutor(4) as pool:
        found = [key for part in pool.map(drain, range(4)) for key in part]
    assert sorted(found, key=int) == [str(n) for n in range(200)]
    for each in consumers:
        each.close()
