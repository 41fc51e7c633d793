"""A job whose source never ends is killed again and again: every message is committed once, and none is acknowledged
before."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tests.extent import FULL
from tests.faults.storms import start, tally, workers_of
from tests.waiting import wait_for

from tally.jobs.facade import Jobs
from tally.testing.endless import Broker

MESSAGES, KILLS = (600, 12) if FULL else (300, 6)

SOURCE = """
from tally.testing.endless import MemoryQueueSource

def source(request):
    [uri] = request.uris
    return MemoryQueueSource(uri.removeprefix("broker://"))
"""

SCORER = """
import time
from tally import Scorer

class Lengths(Scorer):
    input = "bytes"
    batch_size = 4
    columns = {"length": "int64"}

    def score(self, batch):
        time.sleep(0.01 * len(batch))
        return [ValueError("it is empty") if not message else {"length": len(message)} for message in batch]
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with the source, installed as far as entry points can tell."""
    folder = tmp_path / "site"
    info = folder / "broker-1.dist-info"
    info.mkdir(parents=True)
    (folder / "broker_source.py").write_text(SOURCE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broker\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[tally.sources]\nbroker = broker_source:source\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")])))
    return folder


def key(number: int) -> str:
    return f"message-{number:04}"


def feed(broker: Broker, stop: threading.Event) -> None:
    """Publish all messages, in small groups; every tenth comes twice under its key, and every fiftieth is empty."""
    dice = random.Random(2)
    for begin in range(0, MESSAGES, 20):
        numbers = [*range(begin, begin + 20), *(number for number in range(begin) if dice.random() < 0.005)]
        messages = [(key(number), b"" if number % 50 == 0 else b"x" * (number + 1)) for number in numbers]
        broker.publish([*messages, *messages[::10]])
        if stop.wait(0.1):
            return


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("seed", [1])
def test_everything_is_committed_once_and_acknowledged_after_that(tmp_path: Path, seed: int) -> None:
    broker, model, out, log = Broker(tmp_path / "queue.db"), tmp_path / "lengths.py", tmp_path / "out", tmp_path / "log"
    model.write_text(SCORER)
    command = [
        sys.executable, str(Path(__file__).with_name("short_generations.py")), "score", f"broker://{broker.path}",
        "--model", str(model), "--out", f"{out}/", "--workers", "2", "--max-dead", "100%",
    ]  # fmt: skip
    dice, stop = random.Random(seed), threading.Event()
    feeder = threading.Thread(target=feed, args=(broker, stop))
    feeder.start()
    try:
        process = start(command, log)
        jobs = Jobs()
        wait_for(lambda: any(record.done for record in jobs.store.newest(limit=1)), process)
        job = jobs.store.newest(limit=1)[0].id
        killed: Counter[str] = Counter()
        while killed.total() < KILLS:
            try:
                process.wait(timeout=dice.uniform(0.2, 1.0))
            except subprocess.TimeoutExpired:
                pass
            victim = dice.choice(["worker", "coordinator", "everything"])
            if victim == "worker" and (workers := workers_of(process)):
                os.kill(dice.choice(workers).pid, signal.SIGKILL)
            else:
                others = workers_of(process) if victim == "everything" else []
                for pid in [*(each.pid for each in others), process.pid]:
                    os.kill(pid, signal.SIGKILL)
                process.wait(timeout=60)
                acknowledged = {event.key for event in broker.events("acknowledged")}
                assert set(jobs.store.known_keys(job, acknowledged).values()) <= {"done"}
                assert jobs.store.known_keys(job, acknowledged).keys() == acknowledged
                process = start([*command, "--resume"], log)
                wait_for(lambda: jobs.get(job).alive, process)
            killed[victim] += 1
        feeder.join(120)
        wait_for(lambda: broker.waiting() == 0, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 130, log.read_text()
    finally:
        stop.set()
        feeder.join()
        if process.poll() is None:
            process.kill()
            process.wait()

    record = jobs.get(job)
    empty = {key(number) for number in range(0, MESSAGES, 50)}
    whole = {key(number): number + 1 for number in range(MESSAGES)}
    assert (record.state, record.items, record.done, record.dead) == ("interrupted", MESSAGES, MESSAGES, len(empty))
    assert {dead.key for dead in jobs.dead(job)} == empty
    assert len(list(jobs.dead(job))) == len(empty)
    expected = sorted((name, length) for name, length in whole.items() if name not in empty)
    assert sorted((row["key"], row["length"]) for row in jobs.results(job).to_pylist()) == expected

    manifest = json.loads((out / "_manifest.json").read_text())
    assert manifest["generation"] > 1, "it was published while it went on"
    published = [row for file in manifest["files"] for row in pq.read_table(out / file["path"]).to_pylist()]
    assert sorted((row["key"], row["length"]) for row in published if "length" in row) == expected
    assert not (out / "_SUCCESS").exists()
    delivered = Counter(event.key for event in broker.events("delivered"))
    assert max(delivered.values()) > 2, "kills had messages delivered again"


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("killed", [False, True])
def test_what_was_acknowledged_survives_cancelling(tmp_path: Path, killed: bool) -> None:
    broker, model, out, log = Broker(tmp_path / "queue.db"), tmp_path / "lengths.py", tmp_path / "out", tmp_path / "log"
    model.write_text(SCORER)
    broker.publish([(key(number), b"x") for number in range(1, 31)])
    command = tally("score", f"broker://{broker.path}", "--model", model, "--out", f"{out}/", "--workers", 1)
    process = start(command, log)
    wait_for(lambda: broker.waiting() == 0, process)
    jobs = Jobs()
    job = jobs.store.newest(limit=1)[0].id
    if killed:
        process.kill()
        process.wait(timeout=60)
        for verb in ("cancel", "delete"):
            refused = subprocess.run(tally("jobs", verb, job), capture_output=True, text=True, timeout=60)
            assert refused.returncode == 1
            assert "has results that are not published yet" in refused.stderr
            assert f"tally jobs resume {job}" in refused.stderr
        assert (jobs.get(job).state, jobs.get(job).wanted) == ("interrupted", "run")
        process = start([*command, "--resume"], log)
        wait_for(lambda: jobs.get(job).alive, process)
    told = subprocess.run(tally("jobs", "cancel", job), capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    process.wait(timeout=60)
    assert jobs.get(job).state == "cancelled"
    manifest = json.loads((out / "_manifest.json").read_text())
    rows = [row["key"] for file in manifest["files"] for row in pq.read_table(out / file["path"]).to_pylist()]
    assert sorted(rows) == [key(number) for number in range(1, 31)]
    assert not (out / "_tally").exists()
