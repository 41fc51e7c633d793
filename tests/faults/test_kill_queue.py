"""A job that reads a real queue is killed again and again, and so is the broker: every item is scored once.

A hundred by default; ``TALLY_TEST_FULL=1``: ten thousand.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.brokers import BROKERS, BrokerUnderTest
from tests.extent import FULL
from tests.faults.storms import start, workers_of
from tests.faults.test_kill_endless import SCORER
from tests.waiting import wait_for

from tally.errors import StorageAwayError
from tally.jobs.facade import Jobs
from tally.sources.queues.base import REASON, Message, Queue
from tally.sources.queues.factory import open_queue

MESSAGES, KILLS = (10_000, 30) if FULL else (100, 3)
FEW = ("rabbitmq", "redis-stream")
"""Those that are stormed by default; the contract suite asks all."""
AHEAD = {"sqs": 50}
"""How many items may wait in brokers that look through all messages for each one: moto does, several times."""
IN_HAND = {"azure-queue": 100, "servicebus": 100}
"""How many messages a job may have in hand where each lock is renewed by a request of its own."""


def feed(url: str, stop: threading.Event, ahead: int) -> None:
    """Send all messages, in small groups; every tenth twice, and one that cannot be understood with each group.

    ahead: items that wait, at most.
    """
    queue, jobs = open_queue(url), Jobs()
    for begin in range(0, MESSAGES, 20):
        while begin - sum(each.done for each in jobs.store.newest(limit=1)) > ahead and not stop.wait(0.1):
            pass
        names = [f"{number:05}" for number in range(begin, min(begin + 20, MESSAGES))]
        group = [Message(each.encode()) for each in [*names, *names[::10], f"../{begin:05}"]]
        while not stop.is_set():  # if the answer was lost, all come twice
            try:
                queue.send(group)
                break
            except StorageAwayError:
                time.sleep(0.1)
        if stop.wait(0.05):
            break
    queue.close()


def asked(queue: Queue, url: str) -> tuple[int | None, int | None, int | None]:
    try:
        depth = queue.depth()
    except StorageAwayError:
        return None, None, None
    return depth.waiting, depth.in_hand, depth.dead


@pytest.mark.timeout(3600 if FULL else 900)
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # Service Bus' client leaves sockets that were cut
@pytest.mark.parametrize("kind", BROKERS if FULL else FEW)
def test_every_item_is_scored_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "items"
    source.mkdir()
    for number in range(MESSAGES):
        (source / f"{number:05}").write_bytes(b"" if number % 50 == 0 else b"x" * (1 + number % 100))
    model, out, log = tmp_path / "lengths.py", tmp_path / "out", tmp_path / "log"
    model.write_text(SCORER)
    with BROKERS[kind](tmp_path, monkeypatch) as under_test:
        command = [
            sys.executable, str(Path(__file__).with_name("short_generations.py")), "score", under_test.url,
            "--queue", f"base={source}", "--queue", f"prefetch={IN_HAND.get(kind, 1000)}", "--model", str(model),
            "--out", f"{out}/", "--workers", "2", "--max-dead", "100%",
        ]  # fmt: skip
        stop = threading.Event()
        feeder = threading.Thread(target=feed, args=(under_test.url, stop, AHEAD.get(kind, MESSAGES)))
        feeder.start()
        process = start(command, log)
        try:
            jobs = Jobs()
            wait_for(lambda: any(record.done for record in jobs.store.newest(limit=1)), process)
            job = jobs.store.newest(limit=1)[0].id
            process = _storm(process, command, log, jobs, job, under_test)
            feeder.join(600)
            queue = open_queue(under_test.url)
            queue_told = lambda: f"{asked(queue, under_test.url)}\n{log.read_text()[-4000:]}"  # noqa: E731
            wait_for(lambda: asked(queue, under_test.url)[:2] in ((0, 0), (0, None)), process, 600, queue_told)
            wait_for(lambda: jobs.get(job).done == MESSAGES, process, 600, queue_told)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=120) == 130, log.read_text()
            # What a cut connection had delivered a second time may have been in hand: it is known, and acknowledged.
            process = start([*command, "--resume", "--until-empty"], log)
            assert process.wait(timeout=300) == 0, log.read_text()
            dead = queue.peek(MESSAGES, dead=True)
            assert asked(queue, under_test.url)[:2] in ((0, 0), (0, None))
            queue.close()
        finally:
            stop.set()
            feeder.join()
            if process.poll() is None:
                process.kill()
                process.wait()

    empty = {f"{number:05}" for number in range(0, MESSAGES, 50)}
    expected = sorted((f"{number:05}", 1 + number % 100) for number in range(MESSAGES) if f"{number:05}" not in empty)
    assert sorted((row["key"], row["length"]) for row in jobs.results(job).to_pylist()) == expected
    assert sorted(each.key for each in jobs.dead(job)) == sorted(empty)
    reasons = {each.body.decode(): each.headers[REASON] for each in dead}
    assert {key for key, reason in reasons.items() if "it is empty" in reason} == empty
    assert {key for key, reason in reasons.items() if "leads out of" in reason} == {
        f"../{number:05}" for number in range(0, MESSAGES, 20)
    }
    assert len(reasons) == len(empty) + len(range(0, MESSAGES, 20))


def _storm(
    process: subprocess.Popen[bytes], command: list[str], log: Path, jobs: Jobs, job: str, under_test: BrokerUnderTest
) -> subprocess.Popen[bytes]:
    """Kill at random, until most items are done; returns the process that is alive afterwards."""
    dice = random.Random(1)
    killed: Counter[str] = Counter()
    while killed.total() < KILLS:
        some = MESSAGES * 0.8 * killed.total() / KILLS
        wait_for(lambda some=some: jobs.get(job).done >= some, process, 300, log.read_text)  # type: ignore[misc]
        try:
            process.wait(timeout=dice.uniform(0.2, 1.0))
        except subprocess.TimeoutExpired:
            pass
        victim = ("worker", "coordinator", "broker")[killed.total() % 3]
        if victim == "broker":
            under_test.hurt()
        elif victim == "worker" and (workers := workers_of(process)):
            os.kill(dice.choice(workers).pid, signal.SIGKILL)
        else:
            process.kill()
            process.wait(timeout=60)
            process = start([*command, "--resume"], log)
            wait_for(lambda: jobs.get(job).alive, process)
        killed[victim] += 1
    return process
