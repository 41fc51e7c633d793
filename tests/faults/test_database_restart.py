"""PostgreSQL is stopped, killed and started while a job runs: the job waits, and its rows equal those of a calm run."""

from __future__ import annotations

import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
from tests.faults.storms import SCORERS, rows, start, tally, write_items
from tests.postgres import PrivatePostgres
from tests.services import private_postgres
from tests.waiting import wait_for

from tally.errors import DatabaseAwayError
from tally.jobs.facade import Jobs
from tally.jobs.store import JobRecord, JobStore

ITEMS = 300
OUTAGES = 8
Begin: TypeAlias = Callable[[list[str], Path], "subprocess.Popen[bytes]"]
AWAY, BACK = "the database is away", "the database is back"


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivatePostgres]:
    with private_postgres() as server:
        monkeypatch.setenv("TALLY_DATABASE", server.url.replace("+psycopg", ""))
        yield server


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path / "items", ITEMS)


def score(items: Path, out: Path, *more: object) -> list[str]:
    return tally("score", items, "--model", SCORERS / "steady.py", "--out", out, "--workers", 2, *more)


@pytest.fixture
def store(postgres: PrivatePostgres) -> Iterator[JobStore]:
    store = Jobs().store
    yield store
    store.engine.dispose()


@pytest.fixture
def begin() -> Iterator[Begin]:
    """Starts a command that does not outlast the test."""
    begun: list[subprocess.Popen[bytes]] = []

    def begin(command: list[str], log: Path) -> subprocess.Popen[bytes]:
        begun.append(start(command, log))
        return begun[-1]

    yield begin
    for each in begun:
        each.kill()
        each.wait()


def is_away(log: Path) -> bool:
    """Whether the last that was said is that the database is away."""
    said = log.read_text()
    return said.count(AWAY) > said.count(BACK)


def newest(store: JobStore) -> JobRecord:
    return store.newest(limit=1)[0]


def test_restarts_pause_a_job(
    postgres: PrivatePostgres, store: JobStore, begin: Begin, items: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = begin(score(items, out), log)

    def done() -> int:
        return sum(record.done for record in store.newest(limit=1))

    dice = random.Random(1)
    for number in range(OUTAGES):
        before = done()
        wait_for(lambda before=before: done() > before, process, told=log.read_text)
        postgres.kill() if number % 2 else postgres.stop()
        if dice.random() < 0.5:  # else, it is back before anybody may have noticed
            wait_for(lambda: is_away(log), process, told=log.read_text)
            with pytest.raises(DatabaseAwayError):
                done()
        postgres.start()
        assert process.poll() is None, log.read_text()
    assert process.wait(timeout=120) == 0, log.read_text()
    said = log.read_text()
    assert said.count(AWAY) == said.count(BACK) >= 1
    assert "Traceback" not in said
    assert f"job {newest(store).id} finished: {ITEMS} of {ITEMS}" in said

    assert (newest(store).state, newest(store).items, newest(store).done, newest(store).dead) == (
        "finished",
        ITEMS,
        ITEMS,
        0,
    )
    assert not (out / "_tally").exists()
    calm = tmp_path / "calm"
    subprocess.run(score(items, calm, "-q"), check=True, timeout=120)
    assert rows(out) == rows(calm)
    assert len(rows(out)) == ITEMS


def test_ctrl_c_while_the_database_is_away(
    postgres: PrivatePostgres, store: JobStore, begin: Begin, items: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = begin(score(items, out), log)
    wait_for(lambda: any(each.done for each in store.newest(limit=1)), process, told=log.read_text)
    postgres.stop()
    wait_for(lambda: AWAY in log.read_text(), process, told=log.read_text)
    process.send_signal(signal.SIGINT)
    wait_for(lambda: "stopping" in log.read_text(), process, told=log.read_text)
    assert process.poll() is None, "it has still some time to save what it has"
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=15) == 1
    assert "tally jobs resume" in log.read_text()
    assert "Traceback" not in log.read_text()

    postgres.start()
    assert newest(store).state == "interrupted"
    subprocess.run(tally("jobs", "resume", newest(store).id, "-q"), check=True, timeout=120)
    assert len(rows(out)) == ITEMS


def test_following_a_job_survives_restarts(
    postgres: PrivatePostgres, store: JobStore, begin: Begin, items: Path, tmp_path: Path
) -> None:
    log, watched = tmp_path / "log", tmp_path / "watched"
    process = begin(score(items, tmp_path / "out"), log)
    wait_for(lambda: any(each.state == "running" for each in store.newest(limit=1)), process, told=log.read_text)
    process.send_signal(signal.SIGSTOP)  # the job is not over before it is watched
    watcher = begin(tally("jobs", "watch", store.newest(limit=1)[0].id), watched)
    wait_for(lambda: "running" in watched.read_text(), watcher, told=watched.read_text)
    postgres.stop()
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: AWAY in watched.read_text(), watcher, told=watched.read_text)
    postgres.start()
    assert process.wait(timeout=120) == 0, log.read_text()
    assert watcher.wait(timeout=30) == 0, watched.read_text()
    assert f"finished: {ITEMS}/{ITEMS} (100%), 0 failed" in watched.read_text()


def test_an_outage_in_finalize(
    postgres: PrivatePostgres, store: JobStore, begin: Begin, items: Path, tmp_path: Path
) -> None:
    """The database goes away when the first output has been read, and again right before the job is released."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = begin([*tally()[:1], Path(__file__).with_name("slow_finalize.py"), *score(items, out)[3:]], log)
    for mark in ("reading", "published"):
        wait_for((tmp_path / f"out.{mark}").exists, process, told=log.read_text)
        postgres.kill()
        wait_for(lambda: is_away(log), process, told=log.read_text)
        postgres.start()
        (tmp_path / f"out.{mark}").unlink()
    assert process.wait(timeout=120) == 0, log.read_text()
    assert newest(store).state == "finished"
    assert len(rows(out)) == ITEMS
    assert len({row["key"] for row in rows(out)}) == ITEMS
    assert not (out / "_tally").exists()
