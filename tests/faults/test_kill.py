"""A job is killed at random moments, again and again; its rows equal those of an undisturbed run."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from tests.extent import FULL
from tests.faults.storms import SCORERS, rows, start, storm, tally, workers_of, write_items
from tests.waiting import wait_for

from tally.jobs.facade import Jobs

ITEMS = 1000 if FULL else 500
KILLS = 50 if FULL else 15


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path / "items", ITEMS)


def score(items: Path, out: Path, *more: object) -> list[str]:
    return tally("score", items, "--model", SCORERS / "steady.py", "--out", out, "--workers", 2, *more)


@pytest.mark.parametrize("seed", [1])
def test_kills_change_nothing(items: Path, tmp_path: Path, seed: int) -> None:
    calm = tmp_path / "calm"
    subprocess.run(score(items, calm, "-q"), check=True, timeout=300)
    expected = rows(calm)
    assert len(expected) == ITEMS

    out = tmp_path / "stormy"
    storm(score(items, out), out / "_SUCCESS", kills=KILLS, seed=seed, log=tmp_path / "log")

    assert rows(out) == expected
    assert not (out / "_tally").exists()
    record = Jobs().store.newest(limit=1)[0]
    assert (record.state, record.items, record.done, record.dead) == ("finished", ITEMS, ITEMS, 0)


def test_sigterm_drains_and_resume_finishes(items: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = start(score(items, out), log)
    store = Jobs().store
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
    store = Jobs().store
    wait_for(lambda: any(record.done > 0 for record in store.newest(limit=1)), process)
    workers = workers_of(process)
    assert workers
    process.kill()
    process.wait(timeout=30)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive
    assert len(gone) == len(workers)
