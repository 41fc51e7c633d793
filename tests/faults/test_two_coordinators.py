"""Two coordinators that both believe that they have one job: only one of them changes anything.

The first is stopped (SIGSTOP) for longer than its lease lasts, the second takes the job over, and the first goes on.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.extent import first
from tests.faults.storms import SCORERS, rows, start, write_items
from tests.services import postgres_database
from tests.waiting import wait_for

from tally.database.tables import chunks, dead_items, jobs
from tally.jobs.facade import Jobs
from tally.jobs.store import JobStore

ITEMS = 160


def tally(*arguments: object) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("short_lease.py")), *map(str, arguments)]


@pytest.fixture
def store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    with ExitStack() as stack:
        if request.param == "postgresql":
            monkeypatch.setenv("TALLY_DATABASE", stack.enter_context(postgres_database()))
        store = Jobs().store
        stack.callback(store.engine.dispose)
        yield store


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path / "items", ITEMS)


@pytest.fixture
def begun() -> Iterator[list[subprocess.Popen[bytes]]]:
    begun: list[subprocess.Popen[bytes]] = []
    yield begun
    for each in begun:
        each.kill()
        each.wait()


def everything(store: JobStore) -> list[list[tuple[Any, ...]]]:
    with store.engine.connect().execution_options(reading=True) as connection:
        return [
            [tuple(row) for row in connection.execute(sa.select(table).order_by(table.c.id))]
            for table in (jobs, chunks, dead_items)
        ]


def halt(process: subprocess.Popen[bytes], store: JobStore) -> None:
    """Stop it, but on SQLite not inside of a transaction, which would hold up everybody for good."""
    with ExitStack() as stack:
        if store.engine.dialect.name == "sqlite":
            connection = stack.enter_context(closing(sqlite3.connect(str(store.engine.url.database), timeout=60)))
            connection.execute("BEGIN IMMEDIATE")  # while this one may write, the other does not
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize(
    ("store", "over"),
    first(2, [("sqlite", True), ("postgresql", False), ("sqlite", False), ("postgresql", True)]),
    indirect=["store"],
)
def test_exactly_one_commits(
    store: JobStore, begun: list[subprocess.Popen[bytes]], items: Path, tmp_path: Path, over: bool
) -> None:
    out = tmp_path / "out"
    score = ("score", items, "--model", SCORERS / "steady.py", "--workers", 1)
    logs = [tmp_path / "first", tmp_path / "second"]
    first = start(tally(*score, "--out", out), logs[0])
    begun.append(first)
    wait_for(lambda: any(record.done for record in store.newest(limit=1)), first, told=logs[0].read_text)
    job = store.newest(limit=1)[0].id
    halt(first, store)
    wait_for(lambda: not store.get(job).alive, first, told=logs[0].read_text)
    before = store.get(job)
    assert (before.state, before.owner_pid) == ("interrupted", first.pid)

    second = start(tally("jobs", "resume", job), logs[1])
    begun.append(second)
    wait_for(lambda: store.get(job).done > before.done, second, told=logs[1].read_text)
    owner = store.get(job).owner
    assert store.get(job).owner_pid == second.pid
    if over:
        assert second.wait(timeout=120) == 0, logs[1].read_text()
    state = everything(store)
    files = sorted(path.name for path in out.rglob("*"))
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=60) == 1, logs[0].read_text()
    assert f"job {job} has been taken over by another coordinator" in logs[0].read_text()
    assert "Traceback" not in logs[0].read_text()
    if over:
        assert everything(store) == state, "it has changed nothing"
        assert sorted(path.name for path in out.rglob("*")) == files
    else:
        assert store.get(job).owner in (owner, None)
        assert second.wait(timeout=120) == 0, logs[1].read_text()

    record = store.get(job)
    assert (record.state, record.items, record.done, record.rows) == ("finished", ITEMS, ITEMS, ITEMS)
    assert record.usage["chunks"] == store.counts(job)["done"]
    assert not (out / "_tally").exists()
    subprocess.run(tally(*score, "--out", tmp_path / "calm", "-q"), check=True, timeout=120)
    assert rows(out) == rows(tmp_path / "calm")
    assert len(rows(out)) == ITEMS
