"""Leases do the same on every database, and the thread that renews one tells what becomes of it.

Leases run out because their row is changed, not because anybody waits.
"""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.services import postgres_database

from tally.database import lease
from tally.database.clock import now
from tally.database.connect import connect
from tally.database.notify import notify
from tally.database.renewer import LeaseRenewer, Topic
from tally.database.waiting import Patience
from tally.errors import DatabaseAwayError, OwnershipLostError

LONG = 3600.0
DEADLINE = 60.0
tasks = sa.Table("tasks", sa.MetaData(), sa.Column("id", sa.Integer, primary_key=True), *lease.lease_columns(),
                 sa.Column("note", sa.Text))  # fmt: skip
ONE, OTHER = tasks.c.id == 1, tasks.c.id == 2


class LeaseContract:
    @pytest.fixture
    def engine(self) -> sa.Engine:
        """A database."""
        raise NotImplementedError

    @pytest.fixture
    def table(self, engine: sa.Engine) -> Iterator[sa.Engine]:
        """The database, with two tasks that nobody works on."""
        tasks.create(engine)
        with engine.begin() as connection:
            connection.execute(sa.insert(tasks), [{"id": 1}, {"id": 2}])
        yield engine
        tasks.drop(engine)

    @pytest.fixture
    def call(self, table: sa.Engine) -> Callable[..., Any]:
        """Calls one of the functions on the first task, in a transaction of its own."""

        def call(function: Callable[..., Any], *rows: lease.Where, **more: Any) -> Any:
            with table.begin() as connection:
                return function(connection, tasks, *(rows or (ONE,)), **more)

        return call

    def row(self, table: sa.Engine) -> dict[str, Any]:
        """The first task."""
        with table.connect().execution_options(reading=True) as connection:
            return dict(connection.execute(sa.select(tasks, now().label("clock")).where(ONE)).mappings().one())

    def put(self, table: sa.Engine, **values: Any) -> None:
        """Change the first task."""
        with table.begin() as connection:
            connection.execute(sa.update(tasks).where(ONE).values(**values))

    def found(self, table: sa.Engine, condition: Callable[[sa.Connection], lease.Where]) -> set[int]:
        """The tasks for which the condition is true."""
        with table.connect().execution_options(reading=True) as connection:
            return set(connection.scalars(sa.select(tasks.c.id).where(condition(connection))))

    def test_one_owner_at_a_time(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        assert not lease.is_held(self.row(table))
        assert call(lease.acquire, token="a", seconds=LONG, note="mine")
        row = self.row(table)
        assert (row["owner"], row["owner_host"], row["owner_pid"], row["note"]) == (
            "a", lease.host(), os.getpid(), "mine",
        )  # fmt: skip
        assert row["clock"] < row["lease_until"] <= row["clock"] + LONG
        assert lease.is_held(row)
        assert not call(lease.acquire, token="b", seconds=LONG, note="theirs")
        assert self.row(table)["note"] == "mine"
        assert call(lease.confirm, token="a")
        assert not call(lease.confirm, token="b")
        assert call(lease.acquire, OTHER, token="b", seconds=LONG)

    def test_acquiring_may_be_repeated(self, call: Callable[..., Any]) -> None:
        assert call(lease.acquire, token="a", seconds=LONG)
        assert call(lease.acquire, token="a", seconds=LONG)

    def test_a_lease_runs_out(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        call(lease.acquire, token="a", seconds=LONG)
        self.put(table, lease_until=now() - 1)
        assert not lease.is_held(self.row(table))
        assert call(lease.renew, token="a", seconds=LONG)  # nobody was faster
        assert not call(lease.acquire, token="b", seconds=LONG)
        self.put(table, lease_until=now() - 1)
        assert call(lease.acquire, token="b", seconds=LONG)
        assert not call(lease.renew, token="a", seconds=LONG)

    def test_a_lease_ends_with_its_process(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait(DEADLINE)
        call(lease.acquire, token="a", seconds=LONG)
        self.put(table, owner_pid=process.pid)
        assert not lease.is_held(self.row(table))
        assert self.found(table, lambda connection: lease.is_lost(connection, tasks)) == {1, 2}
        assert self.found(table, lambda connection: lease.is_expired(tasks)) == {2}
        assert not call(lease.acquire, token="b", seconds=LONG)
        assert call(lease.acquire, token="b", seconds=LONG, instead_of="a")
        assert not call(lease.acquire, token="c", seconds=LONG, instead_of="a")

    def test_a_process_that_has_got_the_owners_number_is_not_the_owner(
        self, table: sa.Engine, call: Callable[..., Any]
    ) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            call(lease.acquire, token="a", seconds=LONG)
            self.put(table, owner_pid=other.pid, owner_started=lease.started(other.pid))
            assert lease.is_held(self.row(table))
            assert self.found(table, lambda connection: lease.is_lost(connection, tasks)) == {2}
            self.put(table, owner_started=(lease.started(other.pid) or 0.0) - 1)
            assert not lease.is_held(self.row(table))
            assert self.found(table, lambda connection: lease.is_lost(connection, tasks)) == {1, 2}
            self.put(table, owner_started=None)  # of an earlier version
            assert lease.is_held(self.row(table))
            other.communicate(b"\n")

    def test_processes_of_other_hosts_are_not_looked_for(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait(DEADLINE)
        call(lease.acquire, token="a", seconds=LONG)
        self.put(table, owner_pid=process.pid, owner_host="elsewhere")
        assert lease.is_held(self.row(table))
        assert self.found(table, lambda connection: lease.is_lost(connection, tasks)) == {2}
        assert self.found(table, lambda connection: sa.not_(lease.is_lost(connection, tasks))) == {1}

    def test_an_old_row_without_host_or_process_is_held_until_it_expires(self, table: sa.Engine) -> None:
        self.put(table, owner="a", lease_until=now() + LONG)
        assert self.found(table, lambda connection: lease.is_lost(connection, tasks)) == {2}
        self.put(table, lease_until=None)
        assert self.found(table, lambda connection: lease.is_lost(connection, tasks)) == {1, 2}

    def test_who_lost_the_lease_changes_nothing(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        call(lease.acquire, token="a", seconds=LONG)
        self.put(table, lease_until=now() - 1)
        call(lease.acquire, token="b", seconds=LONG)
        before = {**self.row(table), "clock": None}
        assert not call(lease.renew, token="a", seconds=LONG, note="late")
        assert not call(lease.change, token="a", note="late")
        assert not call(lease.release, token="a", note="late")
        assert {**self.row(table), "clock": None} == before

    def test_the_owner_changes_and_releases(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        call(lease.acquire, token="a", seconds=LONG)
        assert call(lease.change, token="a", note="half")
        assert self.row(table)["note"] == "half"
        assert not call(lease.release, ONE, tasks.c.note == "whole", token="a", note="done")
        assert call(lease.release, token="a", note="done")
        row = self.row(table)
        assert {name: row[name] for name in (*lease.RETURNED, "note")} == {**lease.RETURNED, "note": "done"}
        assert not call(lease.release, token="a")
        assert call(lease.acquire, token="b", seconds=LONG)

    def test_renewing_makes_the_lease_this_processs(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        call(lease.acquire, token="a", seconds=LONG)
        self.put(table, owner_host="elsewhere", owner_pid=1)
        assert call(lease.renew, token="a", seconds=LONG)
        row = self.row(table)
        assert lease.is_this_process(row["owner_host"], row["owner_pid"])

    def test_of_many_that_acquire_at_once_one_gets_it(self, table: sa.Engine, call: Callable[..., Any]) -> None:
        for _ in range(5):
            self.put(table, **lease.RETURNED)
            start = threading.Barrier(4, timeout=DEADLINE)

            def acquire(token: str, start: threading.Barrier = start) -> bool:
                start.wait()
                return bool(call(lease.acquire, token=token, seconds=LONG))

            with ThreadPoolExecutor(4) as pool:
                assert sum(pool.map(acquire, "abcd")) == 1


class TestSqliteLeases(LeaseContract):
    @pytest.fixture
    def engine(self, tmp_path: Path) -> Iterator[sa.Engine]:
        engine = connect(f"sqlite:///{tmp_path / 'tally.db'}")
        yield engine
        engine.dispose()


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_database() as url:
        yield url


class TestPostgresLeases(LeaseContract):
    @pytest.fixture
    def engine(self, postgres: str) -> Iterator[sa.Engine]:
        engine = connect(postgres)
        yield engine
        engine.dispose()


class Renewals:
    """A lease whose renewals are answered one after the other: with a result, or an error that is raised."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def __call__(self) -> Any:
        answer = self.answers.pop(0) if self.answers else "held"
        if isinstance(answer, Exception):
            self.events.put(type(answer).__name__)
            raise answer
        return answer

    def renewer(self, every: float = 0.001, topic: Topic | None = None) -> LeaseRenewer[Any]:
        return LeaseRenewer(
            self,
            every=every,
            what="a test",
            patience=Patience(self.events.put),
            renewed=self.events.put,
            lost=lambda error: self.events.put(("lost", str(error))),
            topic=topic,
        )

    def until(self, event: Any) -> list[Any]:
        """The events up to this one."""
        seen = []
        while not seen or seen[-1] != event:
            seen.append(self.events.get(timeout=DEADLINE))
        return seen


def test_a_renewer_renews_until_it_is_stopped() -> None:
    renewals = Renewals("run", "run", "pause")
    renewer = renewals.renewer()
    renewer.start()
    assert renewals.until("pause") == ["run", "run", "pause"]
    renewer.stop()
    assert not renewer.is_alive()


def test_a_renewer_ends_when_the_lease_is_lost() -> None:
    renewals = Renewals("run", OwnershipLostError("somebody else has it"), "never")
    renewer = renewals.renewer()
    renewer.start()
    assert renewals.until(("lost", "somebody else has it"))[0] == "run"
    renewer.join(DEADLINE)
    assert not renewer.is_alive()
    assert renewals.answers == ["never"]
    renewer.stop()


def test_a_renewer_outlasts_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tally.database.waiting.FIRST_PAUSE", 0.001)
    away = DatabaseAwayError("the database is away: cut off", reason="cut off")
    renewals = Renewals("one", away, away, OSError("disk full"), "two")
    renewer = renewals.renewer()
    renewer.start()
    assert renewals.until("two") == [
        "one", "DatabaseAwayError", "the database is away (cut off); the job waits", "DatabaseAwayError", "OSError",
        "the database is back", "two",
    ]  # fmt: skip
    renewer.stop()


def test_a_notification_makes_it_renew_at_once(postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = connect(postgres)
    renewals = Renewals("first")
    renewer = renewals.renewer(topic=Topic(engine, "tally_test", "mine"))
    renewer.start()
    renewals.until("first")
    while renewer._listener is None:
        renewals.until("held")
    monkeypatch.setattr(renewer, "_every", 600.0)
    noticed = threading.Event()
    renewals.answers = ["notified"]
    while not noticed.is_set():  # one that is sent before the long wait begins is used up by the renewal before it
        with engine.begin() as connection:
            notify(connection, "tally_test", "another's")
            notify(connection, "tally_test", "mine")
        try:
            noticed.set() if renewals.events.get(timeout=1.0) == "notified" else None
        except queue.Empty:
            continue
    renewer.stop()
    engine.dispose()
