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

ITEMS = 1000 if FULL else 300
KILLS = 50 if FULL else 8


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


def test_kills_change_nothing_of_a_list(items: Path, tmp_path: Path) -> None:
    names = sorted(items.rglob("*.bin"))
    lines = [f"{n:04},{path.relative_to(tmp_path)},{n % 3}" for n, path in enumerate(names)]
    lines.insert(100, "gone,items/gone.bin,0")
    (tmp_path / "list.csv").write_text("\n".join(["id,path,fold", *lines]))
    given = ["--items", tmp_path / "list.csv", "--key", "id", "--keep", "fold"]
    command = tally("score", *given, "--model", SCORERS / "steady.py", "--workers", 2, "--out")
    calm, out = tmp_path / "calm", tmp_path / "stormy"
    subprocess.run([*command, str(calm), "-q"], check=True, timeout=300)
    expected = rows(calm)
    assert [row["key"] for row in expected] == [f"{n:04}" for n in range(ITEMS)]
    assert [row["fold"] for row in expected] == [n % 3 for n in range(ITEMS)]

    storm([*command, str(out)], out / "_SUCCESS", kills=20 if FULL else 4, seed=2, log=tmp_path / "log")

    assert rows(out) == expected
    record = Jobs().store.newest(limit=1)[0]
    assert (record.state, record.done, record.dead) == ("finished", ITEMS + 1, 1)


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
