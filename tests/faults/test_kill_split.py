"""A split job whose coordinators are killed: what is lost goes on alone, and the rows equal those of a calm run."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from tests.faults.storms import SCORERS, rows, start, tally, write_items
from tests.services import postgres_database
from tests.waiting import eventually, wait_for

from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord, JobStore

ITEMS = 60


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    with ExitStack() as stack:
        if request.param == "postgresql":
            monkeypatch.setenv("TALLY_DATABASE", stack.enter_context(postgres_database()))
        store = Jobs().store
        stack.callback(store.engine.dispose)
        yield store


@pytest.fixture
def gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Once it is there, the parts score more than their first items."""
    gate = tmp_path / "gate"
    monkeypatch.setenv("GATE", str(gate))
    return gate


@pytest.fixture
def begun(store: JobStore) -> Iterator[list[subprocess.Popen[bytes]]]:
    begun: list[subprocess.Popen[bytes]] = []
    yield begun
    for each in begun:
        each.kill()
        each.wait()
    for job in store.newest():
        for part in store.parts(job.id):
            if part.alive and part.owner_pid is not None:
                psutil.Process(part.owner_pid).kill()


def score(items: Path, out: Path, *more: object) -> list[str]:
    return tally("score", items, "--model", SCORERS / "gated_bytes.py", "--out", out, "--workers", 2, *more)


def pid(part: JobRecord) -> int:
    assert part.owner_pid is not None
    return part.owner_pid


def under_way(store: JobStore) -> bool:
    """Whether both parts have done what they do before the gate is open."""
    parts = [part for job in store.newest(limit=1) for part in store.parts(job.id)]
    return len(parts) == 2 and all(part.done >= 8 and part.alive for part in parts)


def assert_whole(out: Path, items: Path, store: JobStore, job: str) -> None:
    found = rows(out)
    assert [row["key"] for row in found] == sorted(str(path.relative_to(items)) for path in items.rglob("*.bin"))
    assert [row["bytes"] for row in found] == [(items / str(row["key"])).stat().st_size for row in found]
    assert not (out / "_tally").exists()
    record = store.get(job)
    assert (record.state, record.items, record.done, record.dead) == ("finished", ITEMS, ITEMS, 0)
    assert store.parts(job) == []
    assert [each.id for each in store.newest()] == [job]


def test_whoever_is_killed_nothing_is_lost(
    store: JobStore, begun: list[subprocess.Popen[bytes]], gate: Path, tmp_path: Path
) -> None:
    items, out = write_items(tmp_path / "items", ITEMS), tmp_path / "out"
    begun.append(start(score(items, out, "--split", 2), tmp_path / "log"))
    wait_for(lambda: under_way(store), begun[-1], told=(tmp_path / "log").read_text)
    job = store.newest(limit=1)[0].id
    one, other = store.parts(job)

    # The coordinator of a part: another one continues it, and the other part is left alone.
    psutil.Process(pid(one)).kill()
    wait_for(lambda: (now := store.get(one.id)).alive and now.owner_pid != one.owner_pid, begun[-1])
    assert pid(store.get(other.id)) == pid(other)

    # The command: its parts continue without it.
    begun[-1].kill()
    begun[-1].wait()
    assert store.get(job).state == "interrupted"
    assert [each.id for each in store.orphaned()] == [job]
    gate.touch()
    eventually(lambda: {part.state for part in store.parts(job)} == {"finished"})
    assert not (out / "_SUCCESS").exists()

    # Resumed, it finds them, and finishes.
    subprocess.run(tally("jobs", "resume", job, "-q"), check=True, timeout=300)
    assert_whole(out, items, store, job)


def test_all_are_killed_and_then_interrupted(
    store: JobStore, begun: list[subprocess.Popen[bytes]], gate: Path, tmp_path: Path
) -> None:
    items, out, log = write_items(tmp_path / "items", ITEMS), tmp_path / "out", tmp_path / "log"
    begun.append(start(score(items, out, "--split", 2), log))
    wait_for(lambda: under_way(store), begun[-1], told=log.read_text)
    job = store.newest(limit=1)[0].id
    begun[-1].kill()
    begun[-1].wait()
    for part in store.parts(job):
        psutil.Process(pid(part)).kill()
    eventually(lambda: not any(part.alive for part in store.parts(job)))
    done = store.get(job).done

    begun.append(start(tally("jobs", "resume", job), log))
    wait_for(lambda: store.get(job).done > done, begun[-1])
    gate.touch()  # what runs is finished
    begun[-1].send_signal(signal.SIGINT)
    begun[-1].wait(timeout=90)
    record, parts = store.get(job), store.parts(job)
    if begun[-1].returncode == 130:  # and not faster than the signal
        assert {part.state for part in parts} <= {"interrupted", "finished"}
        assert not any(part.alive for part in parts)
        assert store.orphaned() == []
        assert (record.state, record.done) == ("interrupted", sum(part.done for part in parts))
        assert f"tally jobs resume {job}" in log.read_text()
        subprocess.run(tally("jobs", "resume", job, "-q"), check=True, timeout=300)
    assert_whole(out, items, store, job)
