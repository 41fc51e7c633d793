"""The coordinator's loop, with workers that are futures of the test's."""

from __future__ import annotations

import gc
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from tests.postgres import PrivatePostgres
from tests.services import CUT_LISTENERS, postgres_database, private_postgres

from tally.database.connect import connect
from tally.database.renewer import LeaseRenewer
from tally.database.tables import jobs
from tally.engines.base import Engine, Limits
from tally.errors import (
    DatabaseAwayError,
    ModelError,
    OwnershipLostError,
    WorkerCrashedError,
    WorkerError,
    WorkerTimeoutError,
)
from tally.jobs import coordinator as module
from tally.jobs import lease_renewer, policy, scaling, worker
from tally.jobs.coordinator import Coordinator
from tally.jobs.events import (
    ChunkDone,
    Event,
    Events,
    Finished,
    ItemDead,
    Note,
    Progress,
    Started,
    StateChanged,
    Waiting,
    Warned,
    WorkerLost,
)
from tally.jobs.spec import JobSpec
from tally.jobs.store import JobStore, Lease
from tally.sinks.base import Output, OutputDescription, Sink
from tally.sources.base import Chunk, ChunkLimit, Source, Timings

# The loop ---------------------------------------------------------------------------------------------

DEADLINE = 60.0


class Hands(Engine):
    """Workers whose tasks the test ends."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self.sizes: list[int] = []
        self.tasks: queue.SimpleQueue[tuple[Future[Any], Chunk, str]] = queue.SimpleQueue()
        self.why: str | None = None
        self.asked = 0

    def start(
        self, setup: Callable[..., Any], args: tuple[Any, ...], *, slots: int, limits: Limits, log: Path | None = None
    ) -> None:
        raise NotImplementedError

    def submit(self, function: Callable[..., Any], *arguments: Any, reports: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        if function is worker.describe:
            future.set_result("hands")
        else:
            future.set_running_or_notify_cancel()
            self.tasks.put((future, *arguments))
        return future

    def end(self, count: int = 1) -> None:
        """End so many tasks."""
        for _ in range(count):
            future, chunk, attempt = self.tasks.get(timeout=DEADLINE)
            output = Output([f"{attempt}.parquet"], rows=chunk.count)
            future.set_result(worker.Outcome(output, [], Timings(), 0.01))

    def lose(self, error: WorkerError) -> None:
        """Lose the worker that has the oldest task."""
        self.tasks.get(timeout=DEADLINE)[0].set_exception(error)

    def remark(self) -> str | None:
        self.asked += 1
        return self.why

    def default_slots(self) -> int:
        raise NotImplementedError

    def default_memory(self, slots: int) -> int | None:
        raise NotImplementedError

    @property
    def slots(self) -> int:
        return self._slots

    def stop_task(self, future: Future[Any], *, seconds: float) -> None:
        raise NotImplementedError

    def resize(self, slots: int) -> None:
        self._slots = slots
        self.sizes.append(slots)

    def stop(self, *, kill: bool = False) -> None:
        pass


class Numbers(Source):
    """Chunks of one item."""

    def __init__(self, chunks: int) -> None:
        self.chunks, self.go_on = chunks, threading.Event()
        self.pause_after = chunks

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        for number in range(first, self.chunks):
            if number == self.pause_after:
                assert self.go_on.wait(DEADLINE)
            yield Chunk(number, 1, {}, cursor=str(number))

    def read(self, chunk: Chunk, scorer: Any, timings: Timings) -> Iterator[Any]:
        raise NotImplementedError

    def keys(self, chunk: Chunk) -> Sequence[str]:
        return [str(chunk.first)]

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        return Chunk(chunk.first + start, stop - start, {})


class Memory(Sink):
    """Keeps what was finalized."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.released = self.withdrawn = False
        self.between: Callable[[], None] = lambda: None

    def describe(self) -> OutputDescription:
        return OutputDescription("rows", "memory")

    def claim(self, job_id: str, *, overwrite: bool = False) -> None: ...
    def holder(self) -> str | None: ...
    def manifest(self) -> dict[str, Any] | None: ...
    def open(self, attempt: str, chunk: Chunk) -> Any: ...
    def committed(self, outputs: Iterable[Output]) -> tuple[str, list[str]]:
        raise NotImplementedError

    def release(self) -> None:
        self.released = True

    def withdraw(self) -> None:
        self.withdrawn = True

    def finalize(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        files = [file for output in outputs for file in output.files]
        self.between()
        confirm()
        self.files = files
        return {"files": len(files)}


class Driven:
    """A coordinator in a thread of its own."""

    def __init__(self, url: str, chunks: int, *, workers: tuple[int, int], slots: int) -> None:
        self.store, self.engine, self.source, self.sink = (
            JobStore(connect(url)),
            Hands(slots),
            Numbers(chunks),
            Memory(),
        )
        self.job = self.store.create(fingerprint="f", spec={"out": "o"}, model={}, output={"place": "o"}).id
        lease = self.store.acquire(self.job, seconds=600)
        assert lease is not None
        self.lease: Lease = lease
        self.said: list[str] = []
        self.events: list[Event] = []
        self.outcome: str | BaseException | None = None
        self.coordinator = Coordinator(
            self.store, self.store.get(self.job), lease,
            spec=JobSpec(source=["s"], model="m", out="o"), source=self.source, sink=self.sink, engine=self.engine,
            workers=workers, batch_size=1, manifest={}, events=Events(self._hear),
        )  # fmt: skip
        self.thread = threading.Thread(target=self._run)

    def _hear(self, event: Event) -> None:
        if isinstance(event, Note | Waiting | Warned):
            self.said.append(event.text)
        if not isinstance(event, Progress):
            self.events.append(event)

    def _run(self) -> None:
        try:
            self.outcome = self.coordinator.run()
        except BaseException as error:
            self.outcome = error

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for it."""
        deadline = time.monotonic() + DEADLINE
        while not condition():
            assert time.monotonic() < deadline, (self.said, self.outcome, self.engine.sizes)
            time.sleep(0.01)

    def end(self) -> str | BaseException | None:
        """Wait for its end; returns what it returned or raised."""
        self.thread.join(DEADLINE)
        assert not self.thread.is_alive()
        return self.outcome


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driven]]:
    driven: list[Driven] = []

    def drive(
        chunks: int, *, workers: tuple[int, int] = (2, 2), slots: int = 2, url: str | None = None, **source: Any
    ) -> Driven:
        each = Driven(url or f"sqlite:///{tmp_path / 'tally.db'}", chunks, workers=workers, slots=slots)
        vars(each.source).update(source)
        driven.append(each)
        each.thread.start()
        return each

    yield drive
    for each in driven:
        each.source.go_on.set()
        each.coordinator.stop(now=True)
        each.thread.join(DEADLINE)
        each.store.engine.dispose()


def test_workers_follow_the_backlog(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "SHRINK_SECONDS", 0.0)
    monkeypatch.setattr(scaling, "IDLE_SECONDS", 0.0)
    it = drive(45, workers=(2, 8), slots=2, pause_after=40)
    it.until(lambda: it.engine.slots == 8)
    assert it.engine.sizes == sorted(it.engine.sizes), "it only grows while there is more to do"
    it.engine.end(38)
    it.until(lambda: it.engine.slots == 2)
    it.engine.end(2)
    it.until(lambda: it.engine.slots == 0)
    it.source.go_on.set()
    it.until(lambda: it.engine.slots >= 2)
    it.engine.end(5)
    assert it.end() == "finished"
    assert max(it.engine.sizes) == 8
    assert len(it.sink.files) == 45


def test_a_job_from_no_workers_at_all(drive: Callable[..., Driven]) -> None:
    it = drive(3, workers=(0, 4), slots=0)
    it.engine.end(3)
    assert it.end() == "finished"
    assert it.engine.sizes[0] == 1


def test_a_paused_job_gives_its_workers_back(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "IDLE_SECONDS", 0.0)
    it = drive(20, workers=(1, 4), slots=1)
    it.until(lambda: it.engine.slots == 4)
    it.store.request(it.job, "pause")
    it.until(lambda: it.store.get(it.job).state == "paused")
    assert StateChanged("paused") in it.events
    running = it.store.counts(it.job)["running"]
    it.engine.end(running)
    it.until(lambda: it.engine.slots == 0)
    it.store.request(it.job, "run")
    it.engine.end(20 - running)
    assert it.end() == "finished"


def test_a_fixed_number_of_workers_stays(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(scaling, "SHRINK_SECONDS", 0.0)
    it = drive(10, workers=(4, 4), slots=4, pause_after=5)
    it.engine.end(5)
    it.until(lambda: it.store.get(it.job).done == 5)
    it.source.go_on.set()
    it.engine.end(5)
    assert it.end() == "finished"
    assert it.engine.sizes == []


def test_the_engine_says_why_nothing_happens(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    it = drive(2)
    it.engine.why = "there is no room for a worker"
    it.until(lambda: Warned("there is no room for a worker") in it.events)
    it.engine.end(2)
    assert it.end() == "finished"
    assert it.events.count(Warned("there is no room for a worker")) == 1


def test_what_is_slow_is_run_a_second_time(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "STRAGGLER_SECONDS", 0.0)
    monkeypatch.setattr(policy, "STRAGGLER_FACTOR", 0.0)
    it = drive(2)
    it.engine.end()
    slow = it.engine.tasks.get(timeout=DEADLINE)
    it.engine.end()
    assert it.end() == "finished"
    assert not slow[0].done()
    assert len(it.sink.files) == 2


@pytest.mark.parametrize(("kind", "rounds"), [(WorkerTimeoutError, 1), (WorkerCrashedError, 3)])
def test_what_hangs_with_idle_workers_beside_it_ends(
    drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch, kind: type[WorkerError], rounds: int
) -> None:
    """When an attempt is lost, the next one has begun already: it is not followed by another before its end."""
    monkeypatch.setattr(policy, "STRAGGLER_SECONDS", 0.0)
    monkeypatch.setattr(policy, "STRAGGLER_FACTOR", 0.0)
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    it = drive(2)
    it.engine.end()
    for _ in range(rounds):
        it.until(lambda: it.engine.tasks.qsize() == 2)
        it.engine.lose(kind("lost", suspects=(0, 1)))
        seen = it.engine.asked
        it.until(lambda: it.engine.asked > seen + 2)  # noqa: B023 - it has looked round
        assert it.engine.tasks.qsize() == 1
        it.engine.lose(kind("lost", suspects=(0, 1)))
    assert it.end() == "finished"
    record = it.store.get(it.job)
    assert (record.done, record.dead) == (2, 1)


def test_workers_that_cannot_load_any_more_end_the_job(
    drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few are an accident."""
    monkeypatch.setattr(module, "LOADING_LOSSES", 3)
    it = drive(3, workers=(1, 1), slots=1)
    for _ in range(2):
        it.engine.lose(WorkerCrashedError("killed by SIGSEGV"))
        it.engine.lose(WorkerCrashedError("killed by SIGSEGV"))
        it.engine.end()
    for _ in range(3):
        it.engine.lose(WorkerCrashedError("killed by SIGSEGV"))
    error = it.end()
    assert isinstance(error, ModelError)
    assert "3 workers in a row were lost while they started or loaded the model, the last: killed by" in error.message
    record = it.store.get(it.job)
    assert (record.state, record.done, record.dead) == ("failed", 2, 0)


def test_events_tell_what_happens_in_order(drive: Callable[..., Driven]) -> None:
    it = drive(2, workers=(1, 1), slots=1)
    it.engine.end()
    for _ in range(3):
        it.engine.lose(WorkerCrashedError("killed by SIGSEGV", suspects=(0, 1)))
    assert it.end() == "finished"
    told = [event for event in it.events if not isinstance(event, Note)]
    assert told[0] == Started(it.job, "items")
    assert told[-1] == Finished(it.job, "finished")
    lost = WorkerLost(1, 1, "killed by SIGSEGV")
    dead = ItemDead("1", "score", "killed by SIGSEGV while scoring this item alone")
    assert [event for event in told if isinstance(event, WorkerLost | ItemDead)] == [lost, lost, lost, dead]
    chunks = [(event.first, event.count, event.dead, event.rows) for event in told if isinstance(event, ChunkDone)]
    assert chunks == [(0, 1, 0, 1), (1, 1, 1, 0)]


def test_a_job_that_fails_says_why_in_its_last_event(
    drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOADING_LOSSES", 1)
    it = drive(1, workers=(1, 1), slots=1)
    it.engine.lose(WorkerCrashedError("killed by SIGSEGV"))
    error = it.end()
    assert isinstance(error, ModelError)
    assert it.events[-1] == Finished(it.job, "failed", error)


def test_a_subscriber_that_raises_harms_nobody(drive: Callable[..., Driven], caplog: pytest.LogCaptureFixture) -> None:
    it = drive(2)

    def raises(event: Event) -> None:
        raise ZeroDivisionError

    it.coordinator._events.subscribe(raises)
    it.engine.end(2)
    assert it.end() == "finished"
    assert "a subscriber failed" in caplog.text


def test_more_chunks_than_one_commit_hands_out(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TAKEN", 3)
    it = drive(40, workers=(10, 10), slots=10)
    it.engine.end(40)
    assert it.end() == "finished"
    assert len(it.sink.files) == 40


def test_garbage_is_collected_rarely_meanwhile(drive: Callable[..., Driven]) -> None:
    before, usual = gc.get_threshold(), (700, 10, 10)
    try:
        gc.set_threshold(*usual)
        it = drive(2)
        it.until(lambda: it.store.counts(it.job)["running"] == 2)
        assert gc.get_threshold()[0] > usual[0]
        it.engine.end(2)
        assert it.end() == "finished"
        assert gc.get_threshold() == usual
        gc.set_threshold(0)
        it = drive(2)
        it.until(lambda: it.store.counts(it.job)["running"] == 2)
        assert gc.get_threshold()[0] == 0, "who turned it off wants it off"
        it.engine.end(2)
        assert it.end() == "finished"
    finally:
        gc.set_threshold(*before)


def taken_over(it: Driven) -> Lease:
    """Another coordinator has it."""
    with it.store.engine.begin() as connection:
        connection.execute(sa.update(jobs).values(lease_until=0, owner_host="elsewhere"))
    lease = it.store.acquire(it.job, seconds=600)
    assert lease is not None
    return lease


def test_who_lost_the_job_publishes_nothing(drive: Callable[..., Driven]) -> None:
    it = drive(2)
    it.sink.between = lambda: (taken_over(it), setattr(it.coordinator, "_confirmed_at", 0.0))  # type: ignore[assignment]
    it.engine.end(2)
    assert isinstance(it.end(), OwnershipLostError)
    assert it.sink.files == []
    assert it.sink.withdrawn
    assert it.store.get(it.job).state == "running"


def test_who_lost_the_job_removes_nothing(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_renewer, "RENEW_SECONDS", 600.0)  # it does not notice before it is to cancel
    it = drive(20)
    it.until(lambda: it.store.counts(it.job)["running"] == 4)
    it.coordinator._obey("pause")
    taken_over(it)
    it.coordinator._inbox.put(("wanted", "cancel"))
    it.engine.end(4)
    assert isinstance(it.end(), OwnershipLostError)
    assert it.sink.withdrawn
    assert not it.sink.released


class LostAnswers(JobStore):
    """Every other change is made, and its answer lost."""

    lost = 0


def forgetful(name: str) -> Callable[..., Any]:
    def change(self: LostAnswers, *arguments: Any, **more: Any) -> Any:
        answer = getattr(JobStore, name)(self, *arguments, **more)
        self.lost += 1
        if self.lost % 2:
            raise DatabaseAwayError("the database is away: cut off", reason="cut off")
        return answer

    return change


for _name in ("commit", "remark", "mark", "second_attempt", "release", "confirm", "get", "counts"):
    setattr(LostAnswers, _name, forgetful(_name))


def test_answers_that_are_lost(drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tally.database.waiting.FIRST_PAUSE", 0.001)
    whole = JobStore(connect(f"sqlite:///{tmp_path / 'tally.db'}"))
    it = Driven(f"sqlite:///{tmp_path / 'tally.db'}", 60, workers=(2, 2), slots=2)
    it.coordinator._store = LostAnswers(it.store.engine)
    it.thread.start()
    it.engine.end(60)
    assert it.end() == "finished"
    record = whole.get(it.job)
    assert (record.state, record.items, record.done, record.rows) == ("finished", 60, 60, 60)
    assert record.usage["chunks"] == 60
    assert len(it.sink.files) == len(set(it.sink.files)) == 60
    assert it.said.count("the database is away (cut off); the job waits") >= 1
    whole.engine.dispose()
    it.store.engine.dispose()


@pytest.fixture(scope="module")
def private() -> Iterator[PrivatePostgres]:
    with private_postgres() as server:
        yield server


def test_the_job_waits_for_its_database(drive: Callable[..., Driven], private: PrivatePostgres) -> None:
    it = drive(8, url=private.url)
    it.engine.end(2)
    private.stop()
    it.engine.end(2)  # workers go on
    it.until(lambda: any(line.startswith("the database is away") for line in it.said))
    private.start()
    it.engine.end(4)
    assert it.end() == "finished"
    assert it.said[-1] == "the database is back"
    assert len(it.said) == 3  # the model was loaded, too
    assert it.store.get(it.job).rows == 8


def test_told_to_stop_while_the_database_is_away(drive: Callable[..., Driven], private: PrivatePostgres) -> None:
    it = drive(8, url=private.url)
    it.engine.end(2)
    private.kill()
    it.until(lambda: any(line.startswith("the database is away") for line in it.said))
    it.coordinator.stop(now=True)
    assert isinstance(it.end(), DatabaseAwayError)
    private.start()
    assert it.store.get(it.job).done <= 2


@pytest.mark.parametrize("notified", [True, False])
def test_a_request_is_noticed_by_notification_or_without(
    drive: Callable[..., Driven], monkeypatch: pytest.MonkeyPatch, notified: bool
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(postgres_database())
        it = drive(20, url=url)
        renewers: list[Any] = []

        def listens() -> bool:
            renewers[:] = [each for each in threading.enumerate() if isinstance(each, LeaseRenewer)]
            return any(each._listener is not None for each in renewers)

        it.until(listens)
        (renewer,) = renewers
        if notified:
            monkeypatch.setattr(renewer, "_every", 600.0)
            it.store.request(it.job, "pause")
            it.until(lambda: it.store.get(it.job).state == "paused")  # the next look is ten minutes away
        else:
            with it.store.engine.begin() as connection:
                connection.exec_driver_sql(CUT_LISTENERS)
            it.until(lambda: renewer._listener is None)
        it.store.request(it.job, "cancel")
        assert it.end() == "cancelled"
        assert it.sink.released
        it.store.engine.dispose()
