"""A backfill is killed at random moments, again and again: every interval is complete, and none was done twice.

A few intervals by default; ``TALLY_TEST_FULL=1``: a day of them, and as many kills as were promised.
"""

from __future__ import annotations

import os
import random
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
from tests.extent import FULL
from tests.faults.storms import SCORERS, start, tally

from tally.jobs.facade import Jobs
from tally.triggers.store import ScheduleStore

HOURS, KILLS = (24, 15) if FULL else (6, 4)
STORMS = [(1, "queue", 1), (2, "parallel", 1), (3, "parallel", 2)]
DEVICES = 3
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
END = BEGIN + timedelta(hours=HOURS)
JOB = """\
source: 'readings/*.csv'
where: ts >= '{interval_start}' and ts < '{interval_end}'
keep: [device, value]
model: scorer.py
out: out/{interval_start:%Y-%m-%dT%H}
workers: 1
"""
Rows = dict[str, list[tuple[str, float, bool]]]


@pytest.fixture
def expected(tmp_path: Path) -> Rows:
    """Writes readings, a file for each device; what each interval's results have to hold."""
    dice = random.Random(7)
    found: Rows = {f"{BEGIN + timedelta(hours=hour):%Y-%m-%dT%H}": [] for hour in range(HOURS)}
    (tmp_path / "readings").mkdir()
    for device in range(DEVICES):
        lines = ["ts,device,value"]
        at = BEGIN - timedelta(hours=1)
        while at < END + timedelta(hours=1):
            value = round(dice.random(), 6)
            lines.append(f"{at:%Y-%m-%dT%H:%M:%SZ},d{device},{value}")
            if (hour := f"{at:%Y-%m-%dT%H}") in found:
                found[hour].append((f"d{device}", value, value > 0.9))
            at += timedelta(minutes=dice.randint(1, 4))
        (tmp_path / "readings" / f"{device}.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "scorer.py").write_text((SCORERS / "readings.py").read_text())
    (tmp_path / "job.yaml").write_text(JOB)
    return found


@pytest.mark.parametrize(("seed", "overlap", "schedulers"), STORMS if FULL else STORMS[2:])
def test_every_interval_is_done_once(
    expected: Rows, tmp_path: Path, home: Path, seed: int, overlap: str, schedulers: int
) -> None:
    subprocess.run(
        tally("schedule", "add", "hourly", tmp_path / "job.yaml", "--cron", "0 * * * *", "--overlap", overlap),
        check=True,
        timeout=60,
    )
    command = tally("schedule", "backfill", "hourly", "--from", BEGIN.isoformat(), "--to", END.isoformat())
    log = tmp_path / "log"
    out = tmp_path / "out"
    killed = storm(command, out, home=home, schedulers=schedulers, seed=seed, log=log)
    print(f"kills: {killed}")
    assert sum(killed.values()) == KILLS, "the backfill was over before it was disturbed enough"
    end = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (end.returncode, end.stdout) == (0, f"{HOURS} of {HOURS} intervals are finished\n"), (
        end.stderr + log.read_text()
    )

    assert sorted(path.name for path in out.iterdir()) == sorted(expected)
    for name, rows in expected.items():
        parts = pq.read_table(sorted((out / name).glob("part-*.parquet"))).to_pylist()
        assert sorted((row["device"], row["value"], row["high"]) for row in parts) == sorted(rows)
        assert len({row["key"] for row in parts}) == len(rows)
        assert (out / name / "_SUCCESS").exists()
        assert not (out / name / "_tally").exists()
    store = Jobs().store
    jobs = store.newest(limit=1000)
    assert [(job.state, job.dead) for job in jobs] == [("finished", 0)] * HOURS
    assert {Path(job.spec["out"]).name: job.done for job in jobs} == {
        name: len(rows) for name, rows in expected.items()
    }
    runs = ScheduleStore(store.engine).runs("hourly")
    assert [run.state for run in runs] == ["finished"] * HOURS
    assert {run.job_id for run in runs} == {job.id for job in jobs}
    assert not drivers(home)


def storm(command: list[str], out: Path, *, home: Path, schedulers: int, seed: int, log: Path) -> dict[str, int]:
    """Run the backfill, killing the scheduler, a coordinator or everything, so often; returns how often which."""
    dice = random.Random(seed)
    killed = {"scheduler": 0, "coordinator": 0, "everything": 0}
    running: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + 300
    while sum(killed.values()) < KILLS and time.monotonic() < deadline:
        running = [each for each in running if each.poll() is None]
        if not running and len(list(out.glob("*/_SUCCESS"))) == HOURS:
            break
        running += [start(command, log) for _ in range(schedulers - len(running))]
        try:
            running[0].wait(timeout=dice.uniform(0.3, 3.0))
        except subprocess.TimeoutExpired:
            pass
        coordinators = drivers(home)
        victim = dice.choice(list(killed)) if coordinators else "scheduler"
        if victim == "scheduler":
            dice.choice(running).kill()
        elif victim == "coordinator":
            kill(dice.choice(coordinators))
        else:
            for process in running:
                process.kill()
            for coordinator in coordinators:
                for each in [*children(coordinator), coordinator]:
                    kill(each)
        killed[victim] += 1
    for process in running:
        process.wait(timeout=300)
    return killed


def drivers(home: Path) -> list[psutil.Process]:
    """The processes that drive the runs of this test's schedules, whoever started them."""
    found = []
    for process in psutil.process_iter():
        try:
            ours = process.uids().real == os.getuid() and "tally.triggers.drive" in process.cmdline()
            if ours and process.environ().get("TALLY_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.pid)


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.Error:
        pass
