"""What the job store must do on every database. Inherit the class, override its fixture ``store``, and name it
``Test...``. Leases run out because their row is changed, not because anybody waits.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from tally.database.clock import now
from tally.database.connect import connect
from tally.database.lease import new_token
from tally.database.tables import chunks, dead_items, jobs, received_keys
from tally.errors import JobNotFoundError, JobStateError, OwnershipLostError, SpecError
from tally.jobs.chunks import Dead, Done, Lost, StoredChunk
from tally.jobs.states import Request
from tally.jobs.store import JobRecord, JobStore, Lease
from tally.sinks.base import Output
from tally.sources.base import Chunk

LONG = 3600.0
DEADLINE = 60.0
STRANGE = "caf\udce9/\0/☃.jpg"
"""A file name that is no UTF-8, and worse."""
OUTPUT = {"kind": "rows", "format": "csv", "columns": {"label": "string"}, "unit": "frames", "place": STRANGE}


def chunk(first: int, count: int, *, name: str = "photo") -> Chunk:
    """A chunk whose items are named by their positions."""
    names = [f"{name}-{position}" for position in range(first, first + count)]
    return Chunk(first, count, {"names": names}, cursor=f"after {first + count}")


def part(whole: Chunk, start: int, stop: int) -> Chunk:
    """The items at ``start <= p < stop`` of a chunk."""
    return Chunk(whole.first + start, stop - start, {"names": whole.payload["names"][start:stop]}, whole.cursor)


def done(stored: StoredChunk, *dead: int, attempt: str | None = None, **usage: float) -> Done:
    """The outcome of a chunk, one row for each item but those at the positions ``dead``."""
    attempt = attempt or stored.attempt
    output = Output([f"{attempt}.parquet"], rows=stored.chunk.count - len(dead), bytes=100 * stored.chunk.count)
    lost = [Dead(f"key-{stored.chunk.first + p}", "score", "no good", part(stored.chunk, p, p + 1)) for p in dead]
    return Done(stored.id, attempt, stored.chunk.count, output, lost, usage)


def expire(store: JobStore, job_id: str) -> None:
    """The lease has run out, by the database's clock."""
    with store.engine.begin() as connection:
        connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(lease_until=now() - 1))


def everything(store: JobStore) -> list[list[tuple[Any, ...]]]:
    """All rows there are."""
    with store.engine.connect().execution_options(reading=True) as connection:
        return [
            [tuple(row) for row in connection.execute(sa.select(table).order_by(table.c.id))]
            for table in (jobs, chunks, dead_items)
        ] + [[tuple(row) for row in connection.execute(sa.select(received_keys).order_by(received_keys.c.key))]]


def second_store(store: JobStore) -> JobStore:
    """A second store on the same database, as another process has it."""
    return JobStore(connect(store.engine.url.render_as_string(hide_password=False)))


def contend(url: str, job_id: str, threads: int) -> list[list[int]]:
    """Own the job again and again, each time for one commit, until it is finished; in several threads.

    Returns for each thread the ids of the chunks that its commits counted.
    """
    store = JobStore(connect(url))

    def one(number: int) -> list[int]:
        counted: list[int] = []
        while store.get(job_id).state != "finished":
            try:
                lease = store.acquire(job_id, seconds=LONG)
            except JobStateError:  # it is finished by now
                break
            if lease is None:
                continue
            _, taken = store.commit(lease, take=2)
            assert store.get(job_id).owner == lease.token
            given, _ = store.commit(lease, done=[done(each) for each in taken])
            counted += [each.id for each in given]
            store.release(lease, "interrupted" if taken else "finished")
        return counted

    with ThreadPoolExecutor(threads) as pool:
        counted = list(pool.map(one, range(threads)))
    store.engine.dispose()
    return counted


class JobStoreContract:
    """Override ``store``: an empty one for each test."""

    @pytest.fixture
    def store(self) -> JobStore:
        raise NotImplementedError("override the fixture store")

    @pytest.fixture
    def other(self, store: JobStore) -> Iterator[JobStore]:
        """A second store on the same database."""
        other = second_store(store)
        yield other
        other.engine.dispose()

    @pytest.fixture
    def create(self, store: JobStore) -> Callable[..., JobRecord]:
        def create(
            fingerprint: str = "f",
            job_id: str | None = None,
            place: str = STRANGE,
            spec: dict[str, Any] | None = None,
            model: dict[str, Any] | None = None,
        ) -> JobRecord:
            return store.create(
                fingerprint=fingerprint,
                spec={"out": place} if spec is None else spec,
                model={"hash": "h"} if model is None else model,
                output={**OUTPUT, "place": place},
                job_id=job_id,
            )

        return create

    @pytest.fixture
    def lease(self, store: JobStore, create: Callable[..., JobRecord]) -> Lease:
        """The right to drive a job with nothing in it yet."""
        return _acquired(store, create().id)

    # Finding jobs ---------------------------------------------------------------------------------

    def test_a_new_job(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        record = create("f1")
        assert store.get(record.id) == record
        assert (record.state, record.wanted, record.alive, record.planned) == ("created", "run", False, False)
        assert (record.items, record.done, record.dead, record.rows, record.generation) == (0, 0, 0, 0, 0)
        assert record.spec == {"out": STRANGE}
        assert (record.output, record.unit) == (OUTPUT, "frames")
        assert record.place == str(Path.cwd()) + r"/caf\udce9/\0/☃.jpg"
        assert (record.started_at, record.finished_at, record.owner) == (None, None, None)
        assert store.counts(record.id) == {"pending": 0, "running": 0, "done": 0}
        assert list(store.outputs(record.id)) == []
        assert list(store.dead(record.id)) == []

    def test_ids_may_be_shortened(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        for job_id in ("abc1", "abc2", "b", "b7"):
            create(job_id=job_id)
        assert store.get("abc2").id == "abc2"
        assert store.get("b").id == "b"
        assert store.get("b7").id == "b7"
        with pytest.raises(JobNotFoundError, match=r"several jobs: .*abc1.*abc2|several jobs: .*abc2.*abc1"):
            store.get("ab")
        for wrong in ("", "x", "abc12", "%", "_bc1", "ab%", "b\0", "\udcff", "é"):
            with pytest.raises(JobNotFoundError):
                store.get(wrong)

    def test_the_newest_come_first(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        ids = [create().id for _ in range(5)]
        with store.engine.begin() as connection:
            for age, job_id in enumerate(ids):
                connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(created_at=1000.0 - age))
        assert [record.id for record in store.newest()] == ids
        assert [record.id for record in store.newest(limit=2)] == ids[:2]

    def test_find_gives_the_newest_that_was_not_cancelled(
        self, store: JobStore, create: Callable[..., JobRecord]
    ) -> None:
        assert store.find("f") is None
        old, young, cancelled = create("f").id, create("f").id, create("f").id
        create("g")
        with store.engine.begin() as connection:
            for created_at, job_id in ((1.0, old), (2.0, young), (3.0, cancelled)):
                connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(created_at=created_at))
        store.release(_acquired(store, cancelled), "cancelled")
        found = store.find("f")
        assert found is not None
        assert found.id == young

    def test_the_newest_job_at_a_place(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        assert store.at(STRANGE) is None
        old, young, cancelled = create().id, create().id, create().id
        create(place="elsewhere")
        _age(store, old, young, cancelled)
        store.release(_acquired(store, cancelled), "cancelled")
        for place in (STRANGE, STRANGE + "/", STRANGE + "//"):
            found = store.at(place)
            assert found is not None
            assert found.id == young
        assert store.at(STRANGE[:-1]) is None
        root = create(place="/").id
        found = store.at("/")
        assert found is not None
        assert (found.id, found.place) == (root, "/")

    def test_a_job_that_waits_is_found_by_its_place(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        begun = create(place="/out").id
        waiting = store.enqueue({"source": ["/in"], "model": "m", "out": "/out"}).id
        _age(store, begun, waiting)
        found = store.at("/out/"), store.at("/out", begun=True)
        assert [each.id for each in found if each] == [waiting, begun]
        assert {each.id for each in store.list(place="/out").jobs} == {begun, waiting}
        store.give_up(waiting, "failed", error="there is no model")
        failed = store.at("/out")
        assert failed is not None
        assert failed.error == "there is no model"

    def test_a_job_is_found_by_the_table_that_its_rows_go_to(self, store: JobStore) -> None:
        url = "postgresql://host/db#Rows"
        spec = {"source": ["/in"], "model": "m", "out": "/home/outputs/1", "push": {"url": url}}
        job_id = store.enqueue(spec).id
        store.enqueue({**spec, "push": {"url": f"{url}2"}})
        store.enqueue({**spec, "push": None})
        store.enqueue({"source": ["/in"], "model": "m", "out": "/home/outputs/1"})
        found = store.at(url)
        assert found is not None
        assert found.id == job_id
        assert [each.id for each in store.list(place=url).jobs] == [job_id]
        assert store.at(url.lower()) is None

    def test_a_place_is_found_by_an_index(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        create()
        with store.engine.begin() as connection:
            row = dict(connection.execute(sa.select(jobs)).mappings().one())
            many = [{**row, "id": f"many{n}", "place": f"s3://bucket/{n}", "created_at": n} for n in range(3000)]
            connection.execute(sa.insert(jobs), many)
        with store.engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("ANALYZE jobs")
        plans: list[str] = []

        @sa.event.listens_for(store.engine, "before_cursor_execute")
        def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *more: Any) -> None:
            command = "EXPLAIN QUERY PLAN" if store.engine.dialect.name == "sqlite" else "EXPLAIN"
            if "FROM jobs" in statement:
                cursor.execute(f"{command} {statement}", parameters)
                plans.append("\n".join(str(row[-1]) for row in cursor.fetchall()))

        found = store.at("s3://bucket/1234")
        assert found is not None
        assert found.id == "many1234"
        store.list(limit=20)
        store.parts("many7")
        sa.event.remove(store.engine, "before_cursor_execute", explain)
        by_place, by_creation, by_parent = plans
        assert "jobs_by_place" in by_place
        assert "jobs_by_creation" in by_creation
        assert "jobs_by_parent" in by_parent
        for plan in plans:
            assert "Sort" not in plan
            assert "TEMP B-TREE" not in plan

    def test_pages_hold_every_job_once(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        ids = [create().id for _ in range(7)]
        _age(store, *ids)
        with store.engine.begin() as connection:  # several of the same moment
            connection.execute(sa.update(jobs).where(jobs.c.id.in_(ids[2:5])).values(created_at=3.3))
        expected = sorted(ids, key=lambda each: (store.get(each).created_at, each), reverse=True)
        page = store.list(limit=2)
        seen = [record.id for record in page.jobs]
        while page.next is not None:
            create()  # a job that is created meanwhile moves nothing
            page = store.list(limit=2, after=page.next)
            seen += [record.id for record in page.jobs]
        assert seen == expected
        assert store.list(limit=7, until=1000.0).next is None
        for wrong in ("", "x", "x y"):
            with pytest.raises(SpecError, match="after"):
                store.list(after=wrong)

    def test_lists_are_filtered(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        spec = {"source": ["s3://bucket/Photos 100%/"], "model": "models:/pumps@production", "out": "/data/out_1"}
        pumps = create(spec=spec, model={"name": "pumps"}, place="/data/out_1")
        other = create(place="/data/out21", model={"name": "pump"})
        _age(store, other.id, pumps.id)

        def found(**filters: Any) -> list[str]:
            return [record.id for record in store.list(**filters).jobs]

        assert found() == [pumps.id, other.id]
        assert found(model="pumps") == [pumps.id]
        assert found(model="PUMPS") == []
        assert found(place="/data/out_1/") == [pumps.id]
        assert found(text="photos 100%") == found(text="@PRODUCTION") == found(text="t_1") == [pumps.id]
        assert found(text=pumps.id[2:8]) == [pumps.id]
        assert found(text="0%/x") == found(text="_t_") == []
        assert found(since=2.0) == [pumps.id]
        assert found(since=1.0, until=2.0) == [other.id]
        assert found(since=1.0, until=3.0, model="pumps", text="photos", place="/data/out_1") == [pumps.id]
        store.respec(other.id, {**spec, "model": "kittens.onnx"}, output={**OUTPUT, "place": "/moved"})
        assert found(text="kittens") == found(place="/moved") == [other.id]

    def test_lists_show_a_job_without_coordinator_as_interrupted(
        self, store: JobStore, create: Callable[..., JobRecord]
    ) -> None:
        new, alive, expired, gone, elsewhere, stopped, finished = (create().id for _ in range(7))
        for job_id in (alive, expired, gone, elsewhere):
            _acquired(store, job_id)
        for job_id, state in ((stopped, "interrupted"), (finished, "finished")):
            store.release(_acquired(store, job_id), state)
        expire(store, expired)
        process = subprocess.Popen([sys.executable, "-c", ""])
        process.wait(DEADLINE)
        with store.engine.begin() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == gone).values(owner_pid=process.pid))
            there = {"owner_pid": process.pid, "owner_host": "elsewhere"}
            connection.execute(sa.update(jobs).where(jobs.c.id == elsewhere).values(**there))

        def found(state: str) -> set[str]:
            records = store.list(state=state).jobs
            assert {record.state for record in records} <= {state}
            return {record.id for record in records}

        assert found("created") == {new}
        assert found("running") == {alive, elsewhere}
        assert found("interrupted") == {expired, gone, stopped}
        assert found("finished") == {finished}
        assert found("no such state") == set()
        assert {record.id for record in store.orphaned()} == {expired, gone}
        assert store.acquire(gone, seconds=LONG) is not None
        assert {record.id for record in store.orphaned()} == {expired}

    # Owning a job ---------------------------------------------------------------------------------

    def test_one_coordinator_at_a_time(
        self, store: JobStore, other: JobStore, create: Callable[..., JobRecord]
    ) -> None:
        job_id = create().id
        lease = _acquired(store, job_id)
        assert other.acquire(job_id, seconds=LONG) is None
        assert store.acquire(job_id, seconds=LONG) is None
        record = other.get(job_id)
        assert (record.state, record.alive, record.owner_pid) == ("running", True, os.getpid())
        assert record.started_at is not None
        store.release(lease, "interrupted")
        assert not other.get(job_id).alive
        assert other.acquire(job_id, seconds=LONG) is not None

    def test_the_lease_runs_out(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        with store.engine.begin() as connection:  # of a process on another machine
            connection.execute(sa.update(jobs).values(owner_host="elsewhere", owner_pid=1))
        assert other.acquire(lease.job_id, seconds=LONG) is None
        expire(store, lease.job_id)
        record = other.get(lease.job_id)
        assert (record.state, record.alive) == ("interrupted", False)
        assert store.renew(lease, seconds=LONG) == "run"  # nobody was faster
        assert other.acquire(lease.job_id, seconds=LONG) is None
        expire(store, lease.job_id)
        assert other.acquire(lease.job_id, seconds=LONG) is not None

    def test_the_process_is_gone(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait(DEADLINE)
        with store.engine.begin() as connection:
            connection.execute(sa.update(jobs).values(owner_pid=gone.pid))
        assert other.get(lease.job_id).state == "interrupted"
        assert other.acquire(lease.job_id, seconds=LONG) is not None

    def test_a_job_that_is_being_started_is_its_starters(self, store: JobStore) -> None:
        record = store.create(fingerprint="f", spec={}, model={}, output={"place": "out"}, hold=60)
        assert (store.get(record.id).state, store.get(record.id).alive) == ("created", True)
        with store.engine.begin() as connection:  # as another process sees it
            connection.execute(
                sa.update(jobs).where(jobs.c.id == record.id).values(owner_pid=os.getppid(), owner_started=None)
            )
        assert store.acquire(record.id, seconds=60) is None
        with store.engine.begin() as connection:
            connection.execute(
                sa.update(jobs).where(jobs.c.id == record.id).values(owner_pid=os.getpid(), owner_started=None)
            )
        assert store.acquire(record.id, seconds=60) is not None
        assert store.acquire(record.id, seconds=60) is None

    def test_taking_over_takes_what_was_handed_out(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 2), chunk(2, 2), chunk(4, 2)], complete=True)
        _, (first, second) = store.commit(lease, take=2)
        store.commit(lease, done=[done(first)])
        expire(store, lease.job_id)
        taken_over = _acquired(other, lease.job_id)
        assert other.counts(lease.job_id) == {"pending": 2, "running": 0, "done": 1}
        record = other.get(lease.job_id)
        assert (record.planned, record.items, record.done, record.plan_cursor) == (True, 6, 2, "after 6")
        _, taken = other.commit(taken_over, take=9)
        assert [(each.chunk.first, each.attempts) for each in taken] == [(2, 2), (4, 1)]
        assert taken[0].id == second.id
        assert taken[0].attempt != second.attempt

    def test_who_lost_the_job_changes_nothing(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 2), chunk(2, 2)])
        _, (first, second) = store.commit(lease, take=2)
        expire(store, lease.job_id)
        _acquired(other, lease.job_id)
        before = everything(store)
        attempts: list[Callable[[], object]] = [
            lambda: store.confirm(lease),
            lambda: store.renew(lease, seconds=LONG),
            lambda: store.commit(lease),
            lambda: store.commit(lease, planned=[chunk(4, 2)], complete=True),
            lambda: store.commit(lease, done=[done(first, 1)]),
            lambda: store.commit(lease, lost=[Lost(second.id, [(second.chunk, 1)])]),
            lambda: store.commit(lease, usage={"seconds": 1.0}),
            lambda: store.commit(lease, take=2),
            lambda: store.second_attempt(lease, first.id),
            lambda: store.reopen(lease, [chunk(0, 1)], published=True),
            lambda: store.advance(lease),
            lambda: store.commit(lease, planned=[chunk(4, 1)], received=[["key"]]),
            lambda: store.forget_keys(lease, older_than=-1.0),
            lambda: store.remark(lease, "hello"),
            lambda: store.mark(lease, "paused"),
            lambda: store.release(lease, "finished", manifest={"files": []}),
        ]
        for attempt in attempts:
            with pytest.raises(OwnershipLostError, match=lease.job_id):
                attempt()
            assert everything(store) == before

    def test_a_lease_reaches_no_other_job(
        self, store: JobStore, lease: Lease, create: Callable[..., JobRecord]
    ) -> None:
        theirs = _acquired(store, create("g").id)
        store.commit(theirs, planned=[chunk(0, 4)], received=[["a", "b", "c", "d"]])
        _, (stored,) = store.commit(theirs, take=1)
        before = everything(store)
        assert store.commit(lease, done=[done(stored)], lost=[Lost(stored.id, [(stored.chunk, 1)])]) == ([], [])
        store.second_attempt(lease, stored.id)
        assert everything(store)[1:] == before[1:]

    # Chunks ---------------------------------------------------------------------------------------

    def test_chunks_are_handed_out_in_order_and_counted(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 3), chunk(3, 3)])
        store.commit(lease, planned=[chunk(6, 1)])
        record = store.get(lease.job_id)
        assert (record.items, record.planned, record.plan_cursor) == (7, False, "after 7")
        _, one = store.commit(lease, take=1)
        _, rest = store.commit(lease, take=5, complete=True)
        assert [each.chunk.first for each in one + rest] == [0, 3, 6]
        assert [each.chunk.count for each in one + rest] == [3, 3, 1]
        assert one[0].chunk.payload == chunk(0, 3).payload
        assert [each.attempts for each in one + rest] == [1, 1, 1]
        assert len({each.attempt for each in one + rest}) == 3
        assert [each.attempt for each in one + rest] == sorted(each.attempt for each in one + rest)
        assert store.commit(lease, take=5) == ([], [])
        assert store.counts(lease.job_id) == {"pending": 0, "running": 3, "done": 0}
        assert store.get(lease.job_id).planned

    def test_payloads_come_back_as_they_were(self, store: JobStore, lease: Lease) -> None:
        payload = {"names": [STRANGE, "\ud83d", "ß" * 300], "offset": 2**60, "part": 0.1, "nothing": None}
        store.commit(lease, planned=[Chunk(0, 3, payload, json.dumps({"after": STRANGE}))])
        _, (stored,) = store.commit(lease, take=1)
        assert stored.chunk.payload == payload
        cursor = store.get(lease.job_id).plan_cursor
        assert cursor is not None
        assert json.loads(cursor) == {"after": STRANGE}

    def test_totals_add_up(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 3), chunk(3, 3)], complete=True)
        _, (first, second) = store.commit(lease, take=2)
        counted, _ = store.commit(lease, done=[done(first, 1, read=0.5, chunks=1)], usage={"seconds": 2.0})
        assert [each.id for each in counted] == [first.id]
        store.commit(lease, done=[done(second, 0, 2, read=0.25, write=1.0, chunks=1)])
        record = store.get(lease.job_id)
        assert (record.done, record.dead, record.rows, record.bytes) == (6, 3, 3, 600)
        assert record.usage == {"read": 0.75, "chunks": 2, "seconds": 2.0, "write": 1.0}

    def test_of_two_attempts_the_first_commit_wins(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 3), chunk(3, 3)])
        _, (first, second) = store.commit(lease, take=2)
        straggler = store.second_attempt(lease, first.id)
        assert straggler != first.attempt
        counted, _ = store.commit(lease, done=[done(first, 0, attempt=straggler)])
        assert [each.attempt for each in counted] == [straggler]
        before = everything(store)
        assert store.commit(lease, done=[done(first)]) == ([], [])
        assert everything(store) == before
        counted, _ = store.commit(lease, done=[done(second, attempt="a"), done(second, attempt="b")])
        assert [each.attempt for each in counted] == ["a"]
        assert [each.files for each in store.outputs(lease.job_id)] == [[f"{straggler}.parquet"], ["a.parquet"]]
        assert store.get(lease.job_id).done == 6

    def test_more_attempts_are_counted(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 3)])
        _, (stored,) = store.commit(lease, take=1)
        store.second_attempt(lease, stored.id)
        store.release(lease, "interrupted")
        _, (stored,) = other.commit(_acquired(other, lease.job_id), take=1)
        assert stored.attempts == 3

    def test_parts_take_the_place_of_a_lost_chunk(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 2), chunk(2, 6), chunk(8, 2)], complete=True)
        _, (_, lost, _) = store.commit(lease, take=3)
        parts = [(part(lost.chunk, 0, 2), 0), (part(lost.chunk, 2, 3), 2), (part(lost.chunk, 3, 6), 0)]
        _, taken = store.commit(lease, lost=[Lost(lost.id, parts)], take=9)
        assert [(each.chunk.first, each.chunk.count, each.losses) for each in taken] == [
            (2, 2, 0),
            (4, 1, 2),
            (5, 3, 0),
        ]
        assert [each.chunk.payload for each in taken] == [chunk.payload for chunk, _ in parts]
        assert all(each.attempts == 1 for each in taken)
        assert store.counts(lease.job_id)["running"] == 5

    def test_a_late_outcome_of_a_lost_chunk_is_no_outcome_of_its_parts(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 8)], complete=True)
        _, (lost,) = store.commit(lease, take=1)
        halves = [(part(lost.chunk, 0, 4), 1), (part(lost.chunk, 4, 8), 1)]
        store.commit(lease, lost=[Lost(lost.id, halves)], take=2)
        before = everything(store)
        assert store.commit(lease, done=[done(lost)]) == ([], [])
        assert store.commit(lease, lost=[Lost(lost.id, [(lost.chunk, 1)])]) == ([], [])
        assert everything(store) == before

    def test_a_chunk_that_is_done_cannot_be_lost(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 8)])
        _, (stored,) = store.commit(lease, take=1)
        store.commit(lease, done=[done(stored)])
        before = everything(store)
        store.commit(lease, lost=[Lost(stored.id, [(stored.chunk, 1)])])
        assert everything(store) == before

    def test_a_commit_happens_as_a_whole_or_not_at_all(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 2), chunk(2, 2), chunk(4, 2)])
        _, (first, second) = store.commit(lease, take=2)
        before = everything(store)
        unstorable = Dead("key", "score", "no good", Chunk(0, 1, {"names": object()}))
        with pytest.raises(TypeError):
            store.commit(
                lease,
                planned=[chunk(6, 2)],
                complete=True,
                lost=[Lost(second.id, [(second.chunk, 1)])],
                done=[Done(first.id, first.attempt, 2, Output(), [unstorable])],
                take=1,
            )
        assert everything(store) == before
        counted, taken = store.commit(lease, done=[done(first)], take=1)
        assert (len(counted), len(taken)) == (1, 1)

    def test_many_chunks_in_one_commit(self, store: JobStore, lease: Lease) -> None:
        facts = {"names": [STRANGE, "\ud83d", '"\\u0000'], "part": 0.1}
        store.commit(lease, planned=[chunk(first, 1) for first in range(2500)], complete=True)
        _, taken = store.commit(lease, take=2400)
        assert [each.chunk.first for each in taken] == list(range(2400))
        outcomes = [
            Done(each.id, each.attempt, 1, Output([STRANGE], rows=1, facts=facts), done(each, 0).dead, {"chunks": 1})
            for each in taken[:2300]
        ]
        lost = [Lost(each.id, [(each.chunk, 1)]) for each in taken[2300:]]
        counted, taken = store.commit(lease, done=outcomes, lost=lost, take=2500)
        assert counted == outcomes
        assert [(each.chunk.first, each.losses) for each in taken] == [
            (first, int(first < 2400)) for first in range(2300, 2500)
        ]
        record = store.get(lease.job_id)
        assert (record.done, record.dead, record.usage) == (2300, 2300, {"chunks": 2300})
        assert [(each.files, each.facts) for each in store.outputs(lease.job_id)] == [([STRANGE], facts)] * 2300
        assert store.counts(lease.job_id) == {"pending": 0, "running": 200, "done": 2300}

    # Tried again, as the answer was lost -----------------------------------------------------------

    def test_a_commit_is_made_once_however_often_it_is_tried(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(first, 4) for first in range(0, 40, 4)])
        _, (first, second, third) = store.commit(lease, take=3)
        store.commit(lease, done=[done(first)])

        def commit(nonce: str) -> tuple[list[Done], list[StoredChunk]]:
            return store.commit(
                lease,
                planned=[chunk(40, 4)],
                complete=True,
                done=[done(first), done(second, 1, seconds=1.0), done(second, attempt="late")],
                lost=[Lost(third.id, [(part(third.chunk, 0, 2), 1), (part(third.chunk, 2, 4), 1)])],
                usage={"seconds": 0.5},
                take=4,
                nonce=nonce,
            )

        counted, taken = commit("once")
        assert [each.attempt for each in counted] == [second.attempt]
        assert [each.chunk.first for each in taken] == [8, 10, 12, 16]
        before = everything(store)
        assert commit("once") == (counted, taken)
        assert everything(store) == before
        assert store.commit(lease, done=[done(taken[0])], nonce="twice")[0] == [done(taken[0])]
        assert everything(store) != before

    def test_a_commit_of_nothing_may_be_tried_again_too(self, store: JobStore, lease: Lease) -> None:
        before = everything(store)
        for _ in range(2):
            assert store.commit(lease, take=5, nonce="once") == ([], [])
        assert everything(store) == before

    def test_an_attempt_more_is_counted_once(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 3)])
        _, (stored,) = store.commit(lease, take=1)
        first = store.second_attempt(lease, stored.id, nonce="once")
        assert store.second_attempt(lease, stored.id, nonce="once") == first
        store.release(lease, "interrupted")
        _, (stored,) = other.commit(_acquired(other, lease.job_id), take=1)
        assert stored.attempts == 3

    def test_dead_items_are_replayed_once(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 4)], complete=True)
        _, (stored,) = store.commit(lease, take=1)
        store.commit(lease, done=[done(stored, 1, 2)])
        replay = [each.chunk for each in store.dead(lease.job_id)]
        store.reopen(lease, replay, published=True, nonce="once")
        before = everything(store)
        store.reopen(lease, replay, published=True, nonce="once")
        assert everything(store) == before
        assert store.get(lease.job_id).generation == 1

    def test_a_job_is_released_once(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        store.release(lease, "finished", manifest={"files": []})
        before = everything(store)
        store.release(lease, "finished", manifest={"files": []})
        assert everything(store) == before
        _acquired(other, lease.job_id)
        with pytest.raises(OwnershipLostError):
            store.release(lease, "finished")

    def test_a_job_is_acquired_once(self, store: JobStore, create: Callable[..., JobRecord]) -> None:
        job_id, token = create().id, new_token()
        assert store.acquire(job_id, seconds=LONG, token=token) == Lease(job_id, token)
        assert store.acquire(job_id, seconds=LONG, token=token) == Lease(job_id, token)
        assert store.acquire(job_id, seconds=LONG) is None

    # Outputs and dead items -----------------------------------------------------------------------

    def test_outputs_are_in_the_sources_order(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(first, 1) for first in range(20)])
        _, taken = store.commit(lease, take=20)
        random.Random(3).shuffle(taken)  # noqa: S311
        for stored in taken:
            store.commit(lease, done=[done(stored)])
        attempts = sorted(stored.attempt for stored in taken)
        assert [each.files for each in store.outputs(lease.job_id)] == [[f"{attempt}.parquet"] for attempt in attempts]

    def test_dead_items_keep_what_it_takes_to_replay_them(self, store: JobStore, lease: Lease) -> None:
        names = ["good.jpg", STRANGE, "bad.jpg"]
        store.commit(lease, planned=[Chunk(5, 3, {"names": names})])
        _, (stored,) = store.commit(lease, take=1)
        alone = Chunk(6, 1, {"names": [STRANGE]})
        error = "it's broken: \udcff\0 ☃\n  look at it"
        items = [
            Dead("bad.jpg", "decode", "short", Chunk(7, 1, {"names": ["bad.jpg"]})),
            Dead(STRANGE, "read", error, alone),
        ]
        store.commit(lease, done=[Done(stored.id, stored.attempt, 3, Output(rows=1), items)])
        strange, bad = store.dead(lease.job_id)
        assert (bad.key, bad.stage, bad.error) == ("bad.jpg", "decode", "short")
        assert strange.chunk == alone
        assert strange.stage == "read"
        assert (strange.key, strange.error) == (r"caf\udce9/\0/☃.jpg", "it's broken: \\udcff\\0 ☃\n  look at it")

    def test_dead_items_are_replayed_in_a_new_generation(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 4), chunk(4, 4)], complete=True)
        _, (first, second) = store.commit(lease, take=2)
        store.commit(lease, done=[done(first, 1), done(second, 0, 3)])
        store.release(lease, "finished", manifest={"files": ["a"]})
        lease = _acquired(store, lease.job_id)
        store.reopen(lease, (each.chunk for each in store.dead(lease.job_id)), published=True)
        record = store.get(lease.job_id)
        assert (record.generation, record.items, record.done, record.dead, record.rows) == (1, 8, 5, 0, 5)
        assert list(store.dead(lease.job_id)) == []
        _, taken = store.commit(lease, take=9)
        assert [each.chunk.payload["names"] for each in taken] == [["photo-1"], ["photo-4"], ["photo-7"]]
        store.commit(lease, done=[done(taken[0]), done(taken[1], 0), done(taken[2])])
        record = store.get(lease.job_id)
        assert (record.done, record.dead, record.rows) == (8, 1, 7)
        assert [each.key for each in store.dead(lease.job_id)] == ["key-4"]
        names = [[f"{each.attempt}.parquet"] for each in (first, second)]
        again = [[f"{each.attempt}.parquet"] for each in taken]
        assert [each.files for each in store.outputs(lease.job_id, generation=0)] == names
        assert [each.files for each in store.outputs(lease.job_id, generation=1)] == again
        assert sorted(each.files for each in store.outputs(lease.job_id)) == sorted(names + again)

    @pytest.mark.parametrize("scored", [0, 1, 2])
    def test_a_retry_that_comes_to_nothing_leaves_the_job_as_it_was(
        self, store: JobStore, other: JobStore, lease: Lease, scored: int
    ) -> None:
        store.commit(lease, planned=[chunk(0, 4), chunk(4, 4)], complete=True)
        _, (first, second) = store.commit(lease, take=2)
        store.commit(lease, done=[done(first, 1), done(second, 0, 3)])
        facts = {"generation": 0, "items": 8, "scored": 5, "dead": 3, "rows": 5}
        store.release(lease, "finished", manifest=facts)

        def looks(record: JobRecord) -> object:
            return (
                record.state, record.generation, record.items, record.done, record.dead, record.rows, record.bytes,
                record.manifest, list(store.dead(record.id)), list(store.outputs(record.id)), store.counts(record.id),
            )  # fmt: skip

        before = looks(store.get(lease.job_id))
        for begun in (False, True):
            lease = _acquired(store, lease.job_id)
            if begun:
                replay = [each.chunk for each in store.dead(lease.job_id)]
                store.reopen(lease, replay, published=True)
                _, taken = store.commit(lease, take=3)
                store.commit(
                    lease, done=[done(each, *([0] if index else [])) for index, each in enumerate(taken[:scored])]
                )
                assert store.get(lease.job_id).is_retry
                expire(store, lease.job_id)  # its coordinator is lost, and another one gives it up
                lease = _acquired(other, lease.job_id)
            other.undo_retry(lease, error="no model")
            other.undo_retry(lease, error="no model")
            record = store.get(lease.job_id)
            assert looks(record) == before
            assert (record.error, record.alive, record.is_retry) == ("no model", False, False)
        lease = _acquired(store, lease.job_id)
        store.reopen(lease, [each.chunk for each in store.dead(lease.job_id)], published=True)
        _, taken = store.commit(lease, take=3)
        store.commit(lease, done=[done(each) for each in taken])
        store.release(lease, "finished", manifest={**facts, "generation": 1})
        record = store.get(lease.job_id)
        assert (record.done, record.dead, record.rows, list(store.dead(record.id))) == (8, 0, 8, [])

    def test_a_dead_item_may_be_many_when_it_is_replayed(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 3)], complete=True)
        _, (stored,) = store.commit(lease, take=1)
        store.commit(lease, done=[done(stored, 1)])
        store.release(lease, "finished", manifest={"files": ["a"]})
        lease = _acquired(store, lease.job_id)
        store.reopen(lease, [chunk(1, 5)], published=True, model={"name": "m", "hash": "grown"})
        record = store.get(lease.job_id)
        assert (record.items, record.done, record.dead, record.model["hash"]) == (7, 2, 0, "grown")
        _, (again,) = store.commit(lease, take=1)
        store.commit(lease, done=[done(again)])
        record = store.get(lease.job_id)
        assert (record.items, record.done, record.dead, record.generation) == (7, 7, 0, 1)

    def test_reading_goes_on_while_others_write(self, store: JobStore, other: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(first, 1) for first in range(1300)])
        _, taken = store.commit(lease, take=1200)
        store.commit(lease, done=[done(each, 0) for each in taken])
        outputs, dead = store.outputs(lease.job_id), store.dead(lease.job_id)
        assert next(outputs).files == [f"{taken[0].attempt}.parquet"]
        assert next(dead).key == "key-0"
        _, more = store.commit(lease, take=1)
        store.commit(lease, done=[done(more[0])])
        assert other.get(lease.job_id).done == 1201
        assert [each.files for each in outputs][:1199] == [[f"{each.attempt}.parquet"] for each in taken[1:]]
        assert len(list(dead)) == 1199
        # One that is not read to its end gives its connection back too.
        unfinished = [store.outputs(lease.job_id) for _ in range(8)]
        for each in unfinished:
            next(each)
            each.close()  # type: ignore[attr-defined]
        store.renew(lease, seconds=LONG)

    # Endless sources ------------------------------------------------------------------------------

    def test_keys_that_were_received_are_known(self, store: JobStore, lease: Lease) -> None:
        first, second, plain = chunk(0, 2), chunk(2, 3), chunk(5, 2)
        keys = [["a", STRANGE], ["c", "long" * 1000, "e"], []]
        assert store.known_keys(lease.job_id, ["a"]) == {}
        store.commit(lease, planned=[first, second, plain], received=keys)
        every = [key for some in keys for key in some]
        assert store.known_keys(lease.job_id, [*every, "new", "photo-5"]) == dict.fromkeys(every, "pending")
        _, taken = store.commit(lease, take=1)
        assert store.known_keys(lease.job_id, ["a"]) == {"a": "pending"}
        store.commit(lease, done=[done(taken[0], 1)])
        known = {"a": "done", STRANGE: "done", "c": "pending", "long" * 1000: "pending", "e": "pending"}
        assert store.known_keys(lease.job_id, every) == known

    def test_keys_follow_the_parts_of_a_lost_chunk(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(0, 4)], received=[["a", "b", "c", "d"]])
        _, (lost,) = store.commit(lease, take=1)
        halves = [(part(lost.chunk, 0, 1), 1), (part(lost.chunk, 1, 4), 1)]
        _, (small, large) = store.commit(lease, lost=[Lost(lost.id, halves)], take=2)
        store.commit(lease, done=[done(large)])
        known = {"a": "pending", "b": "done", "c": "done", "d": "done"}
        assert store.known_keys(lease.job_id, "abcd") == known
        store.commit(lease, done=[done(small)])
        assert set(store.known_keys(lease.job_id, "abcd").values()) == {"done"}

    def test_keys_are_stored_with_their_chunk_or_not_at_all(
        self, store: JobStore, lease: Lease, create: Callable[..., JobRecord]
    ) -> None:
        for _ in range(2):
            store.commit(lease, planned=[chunk(0, 2)], received=[["a", "b"]], nonce="once")
        before = everything(store)
        assert store.counts(lease.job_id)["pending"] == 1
        mistakes: list[tuple[list[Chunk], list[list[str]]]] = [
            ([chunk(2, 2)], [["c"]]),
            ([chunk(2, 2)], [["c", "d"], ["e"]]),
            ([], [["c"]]),
        ]
        for planned, received in mistakes:
            with pytest.raises(ValueError, match="keys"):
                store.commit(lease, planned=planned, received=received)
        with pytest.raises(sa.exc.IntegrityError):  # what plans a known key has not asked whether it is known
            store.commit(lease, planned=[chunk(2, 2)], received=[["c", "a"]])
        assert everything(store) == before
        theirs = _acquired(store, create("g").id)
        store.commit(theirs, planned=[chunk(0, 1)], received=[["a"]])
        assert store.known_keys(theirs.job_id, ["a", "b"]) == {"a": "pending"}

    def test_many_keys_at_once(self, store: JobStore, lease: Lease) -> None:
        keys = [f"message {number}" for number in range(2500)]
        planned = [chunk(first, 100) for first in range(0, 2500, 100)]
        store.commit(lease, planned=planned, received=[keys[each.first : each.first + 100] for each in planned])
        assert store.known_keys(lease.job_id, ["new", *keys]) == dict.fromkeys(keys, "pending")

    def test_old_keys_of_finished_items_are_forgotten(
        self, store: JobStore, lease: Lease, create: Callable[..., JobRecord]
    ) -> None:
        theirs = _acquired(store, create("g").id)
        for each in (lease, theirs):
            store.commit(each, planned=[chunk(0, 2), chunk(2, 1), chunk(3, 1)], received=[["a", "b"], ["c"], ["d"]])
            _, (first, _, last) = store.commit(each, take=3)
            store.commit(each, done=[done(first), done(last)])
        with store.engine.begin() as connection:
            old = received_keys.c.position < 3
            connection.execute(sa.update(received_keys).where(old).values(at=now() - 1000))
        assert store.forget_keys(lease, older_than=2000) == 0
        assert store.forget_keys(lease, older_than=500) == 2
        assert store.known_keys(lease.job_id, "abcd") == {"c": "pending", "d": "done"}
        assert len(store.known_keys(theirs.job_id, "abcd")) == 4

    def test_what_is_done_once_a_generation_is_settled_belongs_to_the_next(
        self, store: JobStore, other: JobStore, lease: Lease
    ) -> None:
        store.commit(lease, planned=[chunk(0, 2), chunk(2, 2), chunk(4, 2)], received=[["a", "b"], [], []])
        _, (first, second) = store.commit(lease, take=2)
        store.commit(lease, done=[done(first)])
        assert store.advance(lease, nonce="once") == 1
        before = everything(store)
        assert store.advance(lease, nonce="once") == 1
        assert everything(store) == before
        assert store.get(lease.job_id).generation == 1
        store.commit(lease, planned=[chunk(6, 2)], done=[done(second)])

        def files(generation: int) -> list[list[str]]:
            return [each.files for each in store.outputs(lease.job_id, generation=generation)]

        assert files(0) == [[f"{first.attempt}.parquet"]]
        assert files(1) == [[f"{second.attempt}.parquet"]]
        assert store.advance(lease) == 2
        expire(store, lease.job_id)
        lease = _acquired(other, lease.job_id)
        _, taken = other.commit(lease, take=9)
        assert [each.chunk.first for each in taken] == [4, 6]
        other.commit(lease, done=[done(each) for each in taken])
        assert (files(0), files(1)) == ([[f"{first.attempt}.parquet"]], [[f"{second.attempt}.parquet"]])
        assert files(2) == [[f"{each.attempt}.parquet"] for each in taken]
        record = store.get(lease.job_id)
        assert (record.items, record.done, record.rows, record.generation) == (8, 8, 8, 2)

    # Requests -------------------------------------------------------------------------------------

    @pytest.mark.parametrize("asked", ["pause", "cancel", "run"])
    def test_the_coordinator_learns_of_requests(
        self, store: JobStore, other: JobStore, lease: Lease, asked: Request
    ) -> None:
        assert store.renew(lease, seconds=LONG) == "run"
        other.request(lease.job_id, asked)
        assert store.renew(lease, seconds=LONG) == asked
        store.release(lease, "interrupted")
        lease = _acquired(store, lease.job_id)
        assert store.renew(lease, seconds=LONG) == ("cancel" if asked == "cancel" else "run")

    def test_nobody_takes_a_job_that_has_ended(
        self, store: JobStore, other: JobStore, lease: Lease, create: Callable[..., JobRecord]
    ) -> None:
        store.release(lease, "cancelled")
        for retry in (False, True):
            with pytest.raises(JobStateError, match="is cancelled"):
                other.acquire(lease.job_id, seconds=LONG, retry=retry)
        assert store.get(lease.job_id).state == "cancelled"
        finished = _acquired(store, create("g").id)
        store.release(finished, "finished", manifest={"files": []})
        with pytest.raises(JobStateError, match="is finished"):
            other.acquire(finished.job_id, seconds=LONG)
        assert other.acquire(finished.job_id, seconds=LONG, retry=True) is not None

    def test_who_takes_a_job_is_told_of_every_cancellation(
        self, store: JobStore, other: JobStore, create: Callable[..., JobRecord]
    ) -> None:
        """Cancelled by one process while another was about to take it: whatever the order, it ends cancelled."""
        for number in range(20):
            job_id = create(f"race-{number}").id
            store.release(_acquired(store, job_id), "interrupted")
            with ThreadPoolExecutor(2) as pool:
                asked = pool.submit(store.request, job_id, "cancel")
                lease = pool.submit(other.acquire, job_id, seconds=LONG).result(DEADLINE)
                asked.result(DEADLINE)
            assert lease is not None
            assert other.renew(lease, seconds=LONG) == "cancel"

    def test_a_job_that_has_ended_takes_no_requests(
        self, store: JobStore, lease: Lease, create: Callable[..., JobRecord]
    ) -> None:
        store.release(lease, "finished")
        with pytest.raises(JobStateError, match="is finished"):
            store.request(lease.job_id, "pause")
        with pytest.raises(JobNotFoundError):
            store.request("nosuchjob", "pause")

    def test_pausing_shows(self, store: JobStore, lease: Lease) -> None:
        store.mark(lease, "paused")
        assert store.get(lease.job_id).state == "paused"
        store.mark(lease, "running")
        assert store.get(lease.job_id).state == "running"

    def test_remarks_are_kept_once(self, store: JobStore, lease: Lease) -> None:
        for text in ("one", STRANGE, "one"):
            store.remark(lease, text)
        assert store.get(lease.job_id).remarks == ["one", STRANGE]

    @pytest.mark.parametrize("state", ["finished", "failed", "cancelled", "interrupted", "paused"])
    def test_release(self, store: JobStore, lease: Lease, state: str) -> None:
        store.commit(lease, planned=[chunk(0, 2)])
        store.commit(lease, take=1)
        store.release(lease, state, error=f"cannot write {STRANGE}" if state == "failed" else None, manifest={"a": 1})
        record = store.get(lease.job_id)
        assert (record.state, record.alive, record.owner, record.lease_until) == (state, False, None, None)
        assert record.manifest == {"a": 1}
        assert record.error == (r"cannot write caf\udce9/\0/☃.jpg" if state == "failed" else None)
        assert (record.finished_at is not None) == (state in ("finished", "cancelled"))
        assert store.counts(lease.job_id) == {"pending": 1, "running": 0, "done": 0}
        with pytest.raises(OwnershipLostError):
            store.renew(lease, seconds=LONG)
        if state != "cancelled":
            _acquired(store, lease.job_id)
            record = store.get(lease.job_id)
            assert (record.state, record.error, record.finished_at) == ("running", None, None)

    def test_delete_forgets_one_job(self, store: JobStore, lease: Lease, create: Callable[..., JobRecord]) -> None:
        kept = _acquired(store, create("g").id)
        for each in (lease, kept):
            store.commit(each, planned=[chunk(0, 2), chunk(2, 2), chunk(4, 1)], received=[[], [], ["key"]])
            _, (stored, _) = store.commit(each, take=2)
            store.commit(each, done=[done(stored, 0)])
        store.delete(lease.job_id)
        with pytest.raises(JobNotFoundError):
            store.get(lease.job_id)
        with pytest.raises(OwnershipLostError):
            store.commit(lease, take=1)
        assert [len(rows) for rows in everything(store)] == [1, 3, 1, 1]
        assert store.counts(kept.job_id) == {"pending": 1, "running": 1, "done": 1}
        assert store.known_keys(kept.job_id, ["key"]) == {"key": "pending"}
        store.delete(lease.job_id)

    # Several at once ------------------------------------------------------------------------------

    def test_of_many_that_acquire_at_once_one_gets_it(
        self, store: JobStore, other: JobStore, create: Callable[..., JobRecord]
    ) -> None:
        for _ in range(5):
            job_id = create().id
            start = threading.Barrier(4, timeout=DEADLINE)

            def acquire(each: JobStore, job_id: str = job_id, start: threading.Barrier = start) -> Lease | None:
                start.wait()
                return each.acquire(job_id, seconds=LONG)

            with ThreadPoolExecutor(4) as pool:
                leases = [each for each in pool.map(acquire, [store, other, store, other]) if each is not None]
            assert len(leases) == 1
            assert store.get(job_id).owner == leases[0].token

    def test_many_coordinators_lose_and_repeat_nothing(self, store: JobStore, lease: Lease) -> None:
        store.commit(lease, planned=[chunk(3 * number, 3) for number in range(60)], complete=True)
        store.release(lease, "interrupted")
        url = store.engine.url.render_as_string(hide_password=False)
        line = "import json, sys; from tally.testing.jobs import contend; print(json.dumps(contend(*sys.argv[1:3], 2)))"
        processes = [
            subprocess.Popen([sys.executable, "-c", line, url, lease.job_id], stdout=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        try:
            counted = [json.loads(each.communicate(timeout=DEADLINE)[0]) for each in processes]
        finally:
            for each in processes:
                each.kill()
                each.wait()
        ids = [chunk_id for threads in counted for chunk_ids in threads for chunk_id in chunk_ids]
        assert len(ids) == len(set(ids)) == 60
        record = store.get(lease.job_id)
        assert (record.state, record.done, record.rows, record.dead) == ("finished", 180, 180, 0)
        assert store.counts(lease.job_id) == {"pending": 0, "running": 0, "done": 60}

    @pytest.mark.parametrize("seed", [1, 2, 3])
    def test_the_books_balance_whatever_happens(
        self, store: JobStore, other: JobStore, lease: Lease, seed: int
    ) -> None:
        chance = random.Random(seed)  # noqa: S311
        stores = [store, other]
        running: list[StoredChunk] = []
        late: list[Done] = []
        deposed: list[tuple[JobStore, Lease]] = []
        replayed: Counter[int] = Counter()
        planned = 0
        for _ in range(150):
            store, job_id = stores[0], lease.job_id
            match chance.randrange(8):
                case 0 if planned < 200:
                    new: list[Chunk] = []
                    for _ in range(chance.randint(1, 4)):
                        new.append(chunk(planned, chance.randint(1, 8)))
                        planned += new[-1].count
                    store.commit(lease, planned=new)
                case 1 | 2:
                    running += store.commit(lease, take=chance.randint(1, 4))[1]
                case 3 | 4 if running:
                    stored = running.pop(chance.randrange(len(running)))
                    dead = [p for p in range(stored.chunk.count) if chance.random() < 0.2]
                    assert len(store.commit(lease, done=[done(stored, *dead)])[0]) == 1
                    late.append(done(stored))
                case 5 if running:
                    stored = running.pop(chance.randrange(len(running)))
                    cut = chance.randint(0, stored.chunk.count - 1)
                    bounds = [(0, cut), (cut, stored.chunk.count)]
                    parts = [(part(stored.chunk, a, b), stored.losses + 1) for a, b in bounds if a < b]
                    store.commit(lease, lost=[Lost(stored.id, parts)])
                    late.append(done(stored))
                case 6 if late:
                    assert store.commit(lease, done=[chance.choice(late)]) == ([], [])
                    if deposed:
                        past, old = chance.choice(deposed)
                        with pytest.raises(OwnershipLostError):
                            past.commit(old, planned=[chunk(planned, 1)], done=[done(each) for each in running], take=1)
                case 7:
                    deposed.append((store, lease))
                    stores.reverse()
                    if chance.random() < 0.5:
                        expire(store, job_id)
                    else:
                        store.release(lease, "interrupted")
                    lease = _acquired(stores[0], job_id)
                    running.clear()
                    if chance.random() < 0.5:
                        replay = [each.chunk for each in stores[0].dead(job_id)]
                        counts = store.counts(job_id)
                        stores[0].reopen(lease, replay, published=counts["pending"] + counts["running"] == 0)
                        replayed.update(each.first for each in replay)
            _audit(stores[1], job_id, len(running), Counter(range(planned)) + replayed)

    # At a glance ----------------------------------------------------------------------------------

    def test_chunks_at_a_glance_are_as_few_as_asked_for(self, store: JobStore, lease: Lease) -> None:
        assert store.cells(lease.job_id, limit=3) == []
        assert store.pace(lease.job_id, running=True, limit=3) is None
        sizes = [1, 2, 4, 8, 16, 32]
        firsts = [sum(sizes[:number]) for number in range(len(sizes))]
        planned = [chunk(first, size) for first, size in zip(firsts, sizes, strict=True)]
        _, taken = store.commit(lease, planned=planned, complete=True, take=4)
        store.commit(lease, done=[done(taken[0]), done(taken[1]), done(taken[2], 1)])

        cells = store.cells(lease.job_id, limit=100)
        assert [each.first for each in cells] == firsts
        assert [each.state for each in cells] == ["done", "done", "done", "running", "waiting", "waiting"]
        assert [each.dead for each in cells] == [False, False, True, False, False, False]
        cells = store.cells(lease.job_id, limit=3)
        assert [(each.first, each.chunks, each.done) for each in cells] == [(0, 2, 2), (3, 2, 1), (15, 2, 0)]
        assert [(each.state, each.dead) for each in cells] == [("done", False), ("running", True), ("waiting", False)]

    def test_the_pace_holds_every_item_that_is_done(self, store: JobStore, lease: Lease) -> None:
        _, taken = store.commit(lease, planned=[chunk(10 * n, 10) for n in range(4)], complete=True, take=4)
        store.commit(lease, done=[done(each) for each in taken])
        with store.engine.begin() as connection:
            for each, at in zip(taken, (1000.0, 1000.0, 1090.0, 1120.0), strict=True):
                connection.execute(sa.update(chunks).where(chunks.c.id == each.id).values(done_at=at))
        pace = store.pace(lease.job_id, running=False, limit=4)
        assert pace is not None
        assert (pace.begin, pace.seconds, pace.per) == (1000.0, 30.0, 30.0)
        assert pace.rates == (20.0, 0.0, 0.0, 20.0), "nothing is said of a minute that did not pass"
        assert store.pace(lease.job_id, running=False, limit=1) == replace(pace, seconds=120.0, per=60.0, rates=(20.0,))
        running = store.pace(lease.job_id, running=True, limit=4)
        assert running is not None
        assert running.begin + 4 * running.seconds > 1e9, "it reaches up to now"
        assert running.per == 60.0
        assert sum(running.rates) * running.seconds / running.per == pytest.approx(40)

    # -- split jobs --------------------------------------------------------------------------------

    def test_parts_are_their_jobs(self, store: JobStore, lease: Lease, create: Callable[..., JobRecord]) -> None:
        spec = {"out": "/of/the/parts", "alerts": []}
        store.split(lease, [{"number": 1, "between": [None, "m"]}, {"number": 2, "between": ["m", None]}], spec)
        store.split(lease, [{"number": 1, "shard": "1/1"}], spec)  # again, after a crash: they stay as they are
        one, two = store.parts(lease.job_id)
        whole = store.get(lease.job_id)
        assert [each.part for each in (one, two)] == [
            {"number": 1, "between": [None, "m"]}, {"number": 2, "between": ["m", None]}
        ]  # fmt: skip
        assert {(each.parent, each.state, each.place, each.fingerprint) for each in (one, two)} == {
            (whole.id, "created", whole.place, "")
        }
        assert one.spec == spec
        assert one.output == whole.output
        # Nobody finds them but by their ids.
        assert [each.id for each in store.newest()] == [whole.id]
        assert store.at(STRANGE) == whole
        assert store.counts_by_state() == {**dict.fromkeys(store.counts_by_state(), 0), "running": 1}
        assert store.get(one.id) == one
        with pytest.raises(JobNotFoundError):
            store.get(one.id[:9])
        assert store.parts(create("other", place="/elsewhere").id) == []

    def test_a_split_job_has_what_its_parts_have(self, store: JobStore, lease: Lease) -> None:
        store.split(lease, [{"number": 1}, {"number": 2}, {"number": 3}], {"out": "x"})
        one, two, three = (_acquired(store, part.id) for part in store.parts(lease.job_id))
        _, taken = store.commit(one, planned=[chunk(0, 4), chunk(4, 4)], complete=True, take=2)
        store.commit(one, done=[done(taken[0], score=1.0), done(taken[1], 1, score=1.0)])
        _, taken = store.commit(two, planned=[chunk(0, 3, name="other")], complete=True, take=1)
        store.commit(two, done=[done(taken[0], 0, 2, score=0.5)])
        store.commit(three, planned=[chunk(0, 2, name="last")], take=1)
        store.remark(two, "odd")

        parts = store.gather(lease, seconds=7.0)
        record = store.get(lease.job_id)
        assert [each.remarks for each in parts] == [[], ["odd"], []]
        assert (record.items, record.done, record.dead, record.rows, record.bytes) == (13, 11, 3, 8, 1100)
        assert not record.planned
        assert record.usage == {"score": 2.5, "seconds": 7.0}
        assert store.gather(lease, seconds=7.0) == parts
        assert store.get(lease.job_id) == record  # however often it is added up
        assert store.share_of_dead(lease.job_id) == (11, 3)
        assert store.counts(lease.job_id) == {"pending": 0, "running": 1, "done": 3}
        assert sorted(each.key for each in store.dead(lease.job_id)) == ["key-0", "key-2", "key-5"]
        assert len(list(store.outputs(lease.job_id))) == 3
        assert sum(cell.chunks for cell in store.cells(lease.job_id, limit=10)) == 4
        pace = store.pace(lease.job_id, running=True, limit=10)
        assert pace is not None
        assert sum(pace.rates) > 0
        assert set(store.reasons(lease.job_id, ["key-5", "key-3"])) == {"key-5"}

        store.commit(three, complete=True, usage={"seconds": 9.0})
        with store.engine.connect() as connection:
            left = connection.execute(sa.select(chunks.c.id, chunks.c.attempt).where(chunks.c.state == "running")).one()
        store.commit(three, done=[Done(left.id, "late", 2, Output(["late.parquet"], 2, 200), [], {})])
        for part in (one, two, three):
            store.release(part, "finished")
        store.gather(lease, seconds=8.0)
        assert store.get(lease.job_id).usage["seconds"] == 9.0  # as long as a part, which went on alone
        outputs, dead = list(store.outputs(lease.job_id)), [each.key for each in store.dead(lease.job_id)]
        store.join(lease)
        store.join(lease)  # again, after a crash
        assert store.parts(lease.job_id) == []
        joined = store.get(lease.job_id)
        assert (joined.items, joined.done, joined.dead, joined.planned) == (13, 13, 3, True)
        assert store.counts(lease.job_id) == {"pending": 0, "running": 0, "done": 4}
        assert sorted(map(str, store.outputs(lease.job_id))) == sorted(map(str, outputs))
        # In the order of the parts, whose items follow each other.
        assert [output.rows for output in store.outputs(lease.job_id)] == [4, 3, 1, 2]
        assert [(each.key, each.chunk.first) for each in store.dead(lease.job_id)] == [
            ("key-5", 5), ("key-0", 8), ("key-2", 10)
        ]  # fmt: skip
        assert sorted(dead) == ["key-0", "key-2", "key-5"]
        store.release(lease, "finished", manifest={"generation": 0})
        with store.engine.connect() as connection:
            assert set(connection.scalars(sa.select(chunks.c.job_id))) == {lease.job_id}

    def test_parts_without_coordinator_are_orphans_while_their_job_goes_on(self, store: JobStore, lease: Lease) -> None:
        store.split(lease, [{"number": 1}, {"number": 2}], {"out": "x"})
        one, two = (_acquired(store, part.id) for part in store.parts(lease.job_id))
        expire(store, one.job_id)
        assert [each.id for each in store.orphaned()] == [one.job_id]
        expire(store, lease.job_id)
        assert {each.id for each in store.orphaned()} == {one.job_id, lease.job_id}
        store.release(lease, "interrupted")
        assert store.orphaned() == []
        store.confirm(two)

    def test_a_split_job_is_deleted_with_its_parts(
        self, store: JobStore, lease: Lease, create: Callable[..., JobRecord]
    ) -> None:
        other = create("other", place="/elsewhere").id
        store.split(lease, [{"number": 1}], {"out": "x"})
        part = _acquired(store, store.parts(lease.job_id)[0].id)
        _, taken = store.commit(part, planned=[chunk(0, 4)], complete=True, take=1)
        store.commit(part, done=[done(taken[0], 1)])
        store.delete(lease.job_id)
        assert [each.id for each in store.newest()] == [other]
        assert everything(store)[1:] == [[]] * len(everything(store)[1:])
        with pytest.raises(OwnershipLostError):
            store.commit(part, complete=True)


def _age(store: JobStore, *ids: str) -> None:
    """The jobs were created one second after another, the first at 1.0."""
    with store.engine.begin() as connection:
        for second, job_id in enumerate(ids, 1):
            connection.execute(sa.update(jobs).where(jobs.c.id == job_id).values(created_at=float(second)))


def _acquired(store: JobStore, job_id: str) -> Lease:
    lease = store.acquire(job_id, seconds=LONG, retry=True)
    assert lease is not None
    return lease


def _audit(store: JobStore, job_id: str, running: int, handed: Counter[int]) -> None:
    """What has been added up agrees with what is there; ``handed`` counts the chunks that each item was put into."""
    record = store.get(job_id)
    with store.engine.connect().execution_options(reading=True) as connection:
        rows = connection.execute(sa.select(chunks).where(chunks.c.job_id == job_id)).mappings().all()
    held = Counter(position for row in rows for position in range(row["first"], row["first"] + row["count"]))
    assert held == handed
    assert record.items == len(handed)
    assert record.done + sum(row["count"] for row in rows if row["state"] != "done") == record.items
    assert store.counts(job_id)["running"] == running
    assert record.dead == len(list(store.dead(job_id)))
    assert record.rows == sum(output.rows for output in store.outputs(job_id)) == record.done - record.dead
    assert sum(row["payload"] is None for row in rows) == store.counts(job_id)["done"]
