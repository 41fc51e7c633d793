"""A job is killed at random moments, again and again; its rows equal those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tally.jobs.launch import open_store

ITEMS = 1000
KILLS = 50
SCORERS = Path(__file__).with_name("scorers")


@pytest.fixture
def items(tmp_path: Path) -> Path:
    folder = tmp_path / "items"
    for number in range(ITEMS):
        path = folder / f"{number % 10}" / f"{number:04}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(number).randbytes(100 + number))
    return folder


def tally(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tally", *map(str, arguments)]


def score(items: Path, out: Path, *more: object) -> list[str]:
    return tally("score", items, "--model", SCORERS / "steady.py", "--out", out, "--workers", 2, *more)


def rows(out: Path) -> list[dict[str, object]]:
    return sorted(pq.read_table(sorted(out.glob("part-*.parquet"))).to_pylist(), key=lambda row: str(row["key"]))


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.Error:
        return []


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


@pytest.mark.parametrize("seed", [1])
def test_fifty_kills_change_nothing(items: Path, tmp_path: Path, seed: int) -> None:
    calm = tmp_path / "calm"
    subprocess.run(score(items, calm, "-q"), check=True, timeout=300)
    expected = rows(calm)
    assert len(expected) == ITEMS

    log = tmp_path / "log"
    dice = random.Random(seed)
    out = tmp_path / "stormy"
    process = start(score(items, out), log)
    kills = {"worker": 0, "coordinator": 0, "everything": 0}
    deadline = time.monotonic() + 600
    while sum(kills.values()) < KILLS and time.monotonic() < deadline:
        try:
            process.wait(timeout=dice.uniform(0.05, 1.0))
        except subprocess.TimeoutExpired:
            pass
        if process.poll() is not None:
            if (out / "_SUCCESS").exists():
                break
            process = start(score(items, out, "--resume"), log)
            continue
        workers = workers_of(process)
        victim = dice.choices(["worker", "coordinator", "everything"], weights=[4, 1, 1])[0]
        if victim == "worker" and workers:
            kill(dice.choice(workers).pid)
        elif victim == "coordinator":
            kill(process.pid)
        else:
            for each in [*workers, process]:
                kill(each.pid)
        kills[victim] += 1
    process.wait(timeout=300)
    for _ in range(3):
        if (out / "_SUCCESS").exists():
            break
        subprocess.run(score(items, out, "--resume", "-q"), check=True, timeout=300)
    print(f"kills: {kills}")

    assert (out / "_SUCCESS").exists(), log.read_text()
    assert rows(out) == expected
    assert not (out / "_tally").exists()
    record = open_store().newest(limit=1)[0]
    assert (record.state, record.items, record.done, record.dead) == ("finished", ITEMS, ITEMS, 0)
    assert sum(kills.values()) == KILLS, "the job was over before it was disturbed enough"


def test_sigterm_drains_and_resume_finishes(items: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(score(items, out), log)
    store = open_store()
    wait_for(lambda: any(record.done > 0 for record in store.newest(limit=1)), process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    output = log.read_text()
    record = store.newest(limit=1)[0]
    assert process.returncode == 130, output
    assert record.state == "interrupted"
    assert f"tally jobs resume {record.id}" in output
    # Drained: nothing that a worker had finished was thrown away.
    assert store.counts(record.id)["running"] == 0
    assert 0 < record.done < ITEMS
    subprocess.run(tally("jobs", "resume", record.id, "-q"), check=True, timeout=300)
    assert len(rows(out)) == ITEMS


def test_workers_end_with_their_coordinator(items: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start(score(items, tmp_path / "out"), log)
    store = open_store()
    wait_for(lambda: any(record.done > 0 for record in store.newest(limit=1)), process)
    workers = workers_of(process)
    assert workers
    process.kill()
    process.wait(timeout=30)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) == len(workers)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 60) -> None:
    """Until the condition holds; fails when the process ends first."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail("it did not come to that")
        try:
            process.wait(timeout=0.02)
        except subprocess.TimeoutExpired:
            pass
