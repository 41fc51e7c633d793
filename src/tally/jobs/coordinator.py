"""The coordinator: drives one job from the first chunk to the finished output.

One thread runs the loop below. Three others feed its queue: the planner (new chunks), the engine
(finished futures), and the lease's keeper (what the user wants; that the job was lost). Each turn of the
loop drains the queue and puts everything that has come up into one transaction, together with the next
hand-outs; only then are those handed to the engine. So an attempt is counted before it can do harm, and a
kill at any moment loses at most work that was not committed, never a committed row.
"""

from __future__ import annotations

import logging
import queue
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from tally.engines.base import Engine
from tally.errors import (
    JobError,
    ModelError,
    OwnershipLostError,
    StorageError,
    TallyError,
    WorkerError,
    WorkerMemoryError,
    WorkerTimeoutError,
)
from tally.jobs import work
from tally.jobs.plan import ChunkSizer, Planner
from tally.jobs.spec import JobSpec
from tally.jobs.store import Dead, Done, JobRecord, JobStore, Lease, Lost, StoredChunk
from tally.sinks.base import Output, Sink
from tally.sources.base import Chunk, Source

log = logging.getLogger("tally")

LEASE_SECONDS = 30.0
LOOK_SECONDS = 1.0
"""How often the lease's keeper looks what the user wants."""
GRACE_SECONDS = 20.0
"""How long running chunks may take to finish once the job is told to stop."""
STRAGGLER_SECONDS = 10.0
STRAGGLER_FACTOR = 3.0
LAST_SHARES = 4
"""Near the end, a chunk holds at most such a part of what each slot has left to do: all of them end together."""
SHORT_SECONDS = 0.5
"""A chunk that takes no longer is not cut to share it out."""
UNSETTLED_ATTEMPTS = 10
"""Handed out so often without any outcome, a chunk is halved: it may be what kills its coordinator."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a job stands. rate: items per second, lately."""

    state: str
    items: int
    planned: bool
    done: int
    dead: int
    rate: float


@dataclass(slots=True)
class _Running:
    """A chunk in the engine's hands: one future per live attempt."""

    stored: StoredChunk
    since: float
    futures: list[Future[Any]] = field(default_factory=list)


class Coordinator:
    """Owns one job by a lease. :meth:`run` returns when the job is finished, stopped or lost."""

    def __init__(
        self,
        store: JobStore,
        record: JobRecord,
        lease: Lease,
        *,
        spec: JobSpec,
        source: Source,
        sink: Sink,
        engine: Engine,
        batch_size: int,
        manifest: dict[str, Any],
        listen: Callable[[Progress], None] = lambda progress: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._store, self._lease, self._spec = store, lease, spec
        self._source, self._sink, self._engine = source, sink, engine
        self._manifest, self._listen, self._say = manifest, listen, say
        self._items, self._planned = record.items, record.planned
        self._done, self._dead = record.done, record.dead
        self._rates: deque[tuple[float, int]] = deque([(time.monotonic(), record.done)], maxlen=64)
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._sizer = ChunkSizer(batch_size, engine.slots, source.chunk_seconds, source.chunk_items)
        self._batch_size = batch_size
        self._planner: Planner | None = None
        self._durations: deque[float] = deque(maxlen=64)
        self._starved = False
        self._loading_losses = 0
        self._doubled = False
        self._state = "running"
        self._stop: str | None = None
        self._error: Exception | None = None
        self._deadline: float | None = None
        self._accounted = time.monotonic()
        self._cursor = record.plan_cursor

    def stop(self, *, now: bool = False) -> None:
        """Stop: let running chunks finish within a grace time, or, with ``now``, kill them. Any thread."""
        self._events.put(("stop", now))

    # -- the life of a job -------------------------------------------------------------------------

    def run(self) -> str:
        """Drive the job; returns its state. Raises what made it fail, after saving that."""
        keeper = _Keeper(self._store, self._lease, self._events)
        keeper.start()
        try:
            self._load()
            self._plan()
            self._loop()
            return self._end()
        except OwnershipLostError:
            raise
        except Exception as error:
            if error is not self._error:
                with suppress(TallyError):  # the error at hand is the one to tell
                    self._store.release(self._lease, "failed", error=str(error))
            raise
        finally:
            keeper.stop()
            if self._planner is not None:
                self._planner.stop()
            self._engine.stop(kill=True)

    def _load(self) -> None:
        """Have a worker load the model, before anything is handed out."""
        future = self._engine.submit(work.describe)
        future.add_done_callback(lambda done: self._events.put(("ready", done)))

    def _plan(self) -> None:
        def ended(error: Exception | None) -> None:
            self._events.put(("planned", error))

        self._planner = Planner(
            self._source,
            after=self._cursor,
            first=self._items,
            planned=self._planned,
            sizer=self._sizer,
            prepared=lambda: self._events.put(("prepared",)),
            deliver=lambda chunk: self._events.put(("chunk", chunk)),
            ended=ended,
        )
        self._planner.start()

    def _loop(self) -> None:
        loaded = prepared = False
        while True:
            chunks: list[Chunk] = []
            done: list[Done] = []
            lost: list[Lost] = []
            complete = False
            for event in self._drain():
                match event:
                    case ("ready", future):
                        loaded = self._greet(future)
                    case ("prepared",):
                        prepared = True
                    case ("chunk", chunk):
                        chunks.append(chunk)
                    case ("planned", None):
                        complete = True
                    case ("planned", error):
                        self._fail(error)
                    case ("done", stored, attempt, future):
                        self._settle(stored, attempt, future, done, lost)
                    case ("stop", now):
                        self._halt("interrupted", grace=0.0 if now else GRACE_SECONDS)
                    case ("wanted", wanted):
                        self._obey(wanted)
                    case ("lost", error):
                        raise error
            self._commit(loaded and prepared, chunks, complete, done, lost)
            self._listen(self.progress())
            if self._stop is not None:
                self._drop_waiting()
                if not self._running or (self._deadline is not None and time.monotonic() > self._deadline):
                    return
            elif self._planned and not self._running and self._starved and self._state == "running":
                return

    def _drain(self) -> Sequence[tuple[Any, ...]]:
        """Everything that is in the queue, waiting for the first of it; empty after a while without any."""
        events: list[tuple[Any, ...]] = []
        try:
            events.append(self._events.get(timeout=0.2))
            while len(events) < 4096:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        return events

    def _commit(self, ready: bool, chunks: list[Chunk], complete: bool, done: list[Done], lost: list[Lost]) -> None:
        """One transaction for all that has come up, with the next hand-outs."""
        handing_out = ready and self._stop is None and self._state == "running"
        take = max(0, 2 * self._engine.slots - len(self._running)) if handing_out else 0
        if chunks or complete or lost:
            self._starved = False
        if self._starved:
            take = 0
        if not (chunks or complete or done or lost or take):
            if handing_out:
                self._run_stragglers_again()
            return
        now = time.monotonic()
        usage = {"seconds": now - self._accounted} if done else {}
        counted, taken = self._store.commit(
            self._lease, planned=chunks, complete=complete, done=done, lost=lost, usage=usage, take=take
        )
        if done:
            self._accounted = now
        if chunks:
            self._items = chunks[-1].first + chunks[-1].count
            if self._planner is not None:
                self._planner.taken(len(chunks))
        if complete:
            self._planned = True
            if remark := self._source.remark():
                self._store.remark(self._lease, remark)
                self._say(remark)
        for each in counted:
            self._done += each.count
            self._dead += len(each.dead)
        if counted:
            self._rates.append((now, self._done))
        if take:
            self._starved = len(taken) < take
        for stored in taken:
            self._hand_out(stored)
        self._check_dead()

    def _greet(self, future: Future[Any]) -> bool:
        """The first worker has loaded the model, or could not."""
        error = future.exception() if not future.cancelled() else CancelledError()
        if error is None:
            self._say(future.result())
            return True
        if self._stop is None:
            if isinstance(error, WorkerError):
                self._loading_losses += 1
                if self._loading_losses < self._spec.attempts:
                    self._load()
                    return False
                error = ModelError(
                    f"loading the model killed {self._loading_losses} workers, the last: {error.message}",
                    hint=f"It left this stack:\n{error.trace}" if error.trace else "Check the memory that it needs.",
                )
            self._fail(error)
        return False

    # -- handing out, and what comes back ----------------------------------------------------------

    def _hand_out(self, stored: StoredChunk) -> None:
        unsettled = stored.attempts > UNSETTLED_ATTEMPTS and stored.chunk.count > 1
        if unsettled or self._is_too_large_a_share(stored):
            parts = [(half, stored.losses) for half in self._halves(stored.chunk)]
            self._store.commit(self._lease, lost=[Lost(stored.id, parts)])
            self._starved = False
            self._events.put(("halved",))  # the halves are waiting: look again at once
            return
        self._running[stored.id] = _Running(stored, time.monotonic())
        self._submit(stored, stored.attempt)

    def _is_too_large_a_share(self, stored: StoredChunk) -> bool:
        """Whether, near the end, this chunk would keep one slot busy while the others have run out of work."""
        count, left = stored.chunk.count, self._items - self._done
        fresh = stored.attempts == 1 and stored.losses == 0
        large = count > self._batch_size and self._sizer.seconds(count) > SHORT_SECONDS
        return self._planned and fresh and large and count * LAST_SHARES * self._engine.slots > left

    def _submit(self, stored: StoredChunk, attempt: str) -> None:
        future = self._engine.submit(work.run_chunk, stored.chunk, attempt)
        self._running[stored.id].futures.append(future)
        future.add_done_callback(lambda done: self._events.put(("done", stored, attempt, done)))

    def _settle(
        self, stored: StoredChunk, attempt: str, future: Future[Any], done: list[Done], lost: list[Lost]
    ) -> None:
        running = self._running.get(stored.id)
        if running is None:
            return  # the other attempt at a straggler was first
        running.futures.remove(future)
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            outcome: work.Outcome = future.result()
            del self._running[stored.id]
            self._sizer.observe(stored.chunk.count, outcome.seconds)
            self._durations.append(outcome.seconds)
            done.append(self._done_from(stored, attempt, outcome))
        elif running.futures:
            return  # another attempt is still at it
        else:
            del self._running[stored.id]
            if isinstance(error, CancelledError) or self._stop is not None:
                return  # stays "running" in the store; goes back to pending when the job is released
            # The planner waits for a first measurement: this is one, if a poor one.
            self._sizer.observe(stored.chunk.count, time.monotonic() - running.since)
            self._retry(stored, attempt, error, done, lost)

    def _done_from(self, stored: StoredChunk, attempt: str, outcome: work.Outcome) -> Done:
        dead = [
            Dead(each.key, each.stage, each.error, self._source.slice(stored.chunk, each.position, each.position + 1))
            for each in outcome.dead
        ]
        usage = {**outcome.timings.as_dict(), "worker_seconds": outcome.seconds, "chunks": 1}
        return Done(stored.id, attempt, stored.chunk.count, outcome.output, dead, usage)

    def _retry(
        self, stored: StoredChunk, attempt: str, error: BaseException, done: list[Done], lost: list[Lost]
    ) -> None:
        chunk, losses = stored.chunk, stored.losses + 1
        log.info("chunk %d+%d: %s", chunk.first, chunk.count, error)
        if isinstance(error, WorkerError) and not _had_begun(error) and stored.attempts <= UNSETTLED_ATTEMPTS:
            # It was lost while it started or loaded the model: no item is to blame.
            lost.append(Lost(stored.id, [(chunk, stored.losses)]))
            return
        if not isinstance(error, WorkerError):
            # Not an item's fault and not a lost worker's: the output, the model or Tally itself.
            if isinstance(error, (ModelError, StorageError)) or losses >= self._spec.attempts:
                self._fail(error)
            else:
                lost.append(Lost(stored.id, [(chunk, losses)]))
            return
        certain = isinstance(error, (WorkerTimeoutError, WorkerMemoryError))
        if chunk.count > 1:
            lost.append(Lost(stored.id, self._bisect(chunk, losses, error.suspects, certain)))
        elif certain or losses >= self._spec.attempts:
            key = self._source.keys(chunk)[0]
            dead = Dead(key, "score", _reason(error, self._spec), chunk)
            done.append(Done(stored.id, attempt, 1, Output(), [dead], {"losses": 1}))
        else:
            lost.append(Lost(stored.id, [(chunk, losses)]))

    def _bisect(
        self, chunk: Chunk, losses: int, suspects: tuple[int, int] | None, certain: bool
    ) -> list[tuple[Chunk, int]]:
        """Cut out what the worker was busy with; if that was all of the chunk already, halve it.

        A loss without a certain cause may have come from outside (kill -9, a lost machine): such suspects
        are first run again as they were, ``attempts`` times in all.
        """
        start, stop = suspects or (0, chunk.count)
        start, stop = max(0, start), min(stop, chunk.count)
        if start < stop and (start, stop) != (0, chunk.count):
            cuts = sorted({0, start, stop, chunk.count})
            parts = [self._source.slice(chunk, a, b) for a, b in pairwise(cuts)]
            return [(part, losses if part.first == chunk.first + start else 0) for part in parts]
        if not certain and losses < self._spec.attempts:
            return [(chunk, losses)]
        # From here on every loss halves, and an item alone has to be lost twice.
        last = self._spec.attempts - 1
        return [(half, last if half.count > 1 else max(0, last - 1)) for half in self._halves(chunk)]

    def _halves(self, chunk: Chunk) -> list[Chunk]:
        """Two parts, cut between batches where there are several: items keep the company they had."""
        batches = -(-chunk.count // self._batch_size)
        cut = (batches // 2) * self._batch_size if batches > 1 else chunk.count // 2
        return [self._source.slice(chunk, 0, cut), self._source.slice(chunk, cut, chunk.count)]

    def _run_stragglers_again(self) -> None:
        """Near the end, idle slots run what takes longest a second time; the first commit wins."""
        idle = self._engine.slots - sum(len(each.futures) for each in self._running.values())
        if idle <= 0 or not (self._planned and self._starved) or not self._durations:
            return
        patience = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(self._durations))
        now = time.monotonic()
        slow = [each for each in self._running.values() if len(each.futures) == 1 and now - each.since > patience]
        for each in sorted(slow, key=lambda running: running.since)[:idle]:
            self._doubled = True
            self._submit(each.stored, self._store.again(self._lease, each.stored.id))

    # -- stopping ----------------------------------------------------------------------------------

    def _obey(self, wanted: str) -> None:
        if wanted == "cancel":
            self._halt("cancelled", grace=0.0)
        elif (wanted == "pause") != (self._state == "paused") and self._stop is None:
            self._state = "paused" if wanted == "pause" else "running"
            self._accounted = time.monotonic()  # waiting costs nothing
            self._store.mark(self._lease, self._state)
            self._say("paused; go on with: tally jobs resume " + self._lease.job_id if wanted == "pause" else "resumed")

    def _halt(self, state: str, *, grace: float) -> None:
        if self._stop is None or state == "cancelled":
            self._stop = state
        deadline = time.monotonic() + grace
        self._deadline = deadline if self._deadline is None else min(self._deadline, deadline)

    def _fail(self, error: BaseException) -> None:
        if self._stop is None:
            self._error = error if isinstance(error, Exception) else JobError(str(error))
            self._halt("failed", grace=GRACE_SECONDS)

    def _drop_waiting(self) -> None:
        """Take back what the engine has not begun."""
        for each in list(self._running.values()):
            for future in each.futures:
                future.cancel()

    def _check_dead(self) -> None:
        spec = self._spec
        if self._stop is None and spec.strict and self._dead:
            self._fail(
                JobError(
                    f"stopped, as --strict asks: {self._dead:,} of the first {self._done:,} items failed; "
                    f"the first was {_first_dead(self._store, self._lease.job_id)}",
                    hint=f"{_mend(self._lease.job_id)} Without --strict, the rest is scored.",
                )
            )
        if self._stop is None and self._done >= spec.min_dead and self._dead > spec.max_dead * self._done:
            self._fail(
                JobError(
                    f"stopped early: {self._dead:,} of the first {self._done:,} items failed, over the limit of "
                    f"{spec.max_dead:.0%}; the first was {_first_dead(self._store, self._lease.job_id)}",
                    hint=f"{_mend(self._lease.job_id)} To go on regardless, raise --max-dead.",
                )
            )

    def _end(self) -> str:
        store, lease = self._store, self._lease
        # What may still run has had its grace, or is the slower attempt at something that is done.
        self._engine.stop(kill=self._deadline is not None or self._doubled)
        if self._stop == "cancelled":
            self._account()
            self._sink.release()
            store.release(lease, "cancelled")
            return "cancelled"
        self._check_dead()
        if self._stop is None and 0 < self._done == self._dead:
            self._fail(
                JobError(
                    f"all {self._done:,} items failed; the first was {_first_dead(store, lease.job_id)}",
                    hint=_mend(lease.job_id),
                )
            )
        if self._stop is None:
            try:
                manifest = self._finalize()
            except Exception as error:
                self._fail(error)
            else:
                store.release(lease, "finished", manifest=manifest)
                self._state = "finished"
                self._listen(self.progress())
                return "finished"
        with suppress(StorageError):  # on a full disk: the error at hand is the one to tell
            self._account()
        if self._error is not None:
            store.release(lease, "failed", error=str(self._error))
            raise self._error
        store.release(lease, self._stop or "interrupted")
        return self._stop or "interrupted"

    def _account(self) -> None:
        """Book the time since the last commit; waiting while paused costs nothing."""
        if self._state == "running":
            now = time.monotonic()
            self._store.commit(self._lease, usage={"seconds": now - self._accounted})
            self._accounted = now

    def _finalize(self) -> dict[str, Any]:
        self._account()
        record = self._store.get(self._lease.job_id)
        dead = ({"key": each.key, "stage": each.stage, "error": each.error} for each in self._store.dead(record.id))
        return self._sink.finalize(
            self._store.outputs(record.id, generation=record.generation),
            dead,
            {
                **self._manifest,
                "job": record.id,
                "generation": record.generation,
                "items": record.items,
                "scored": record.done - record.dead,
                "dead": record.dead,
                "rows": record.rows,
                "created_at": _iso(record.created_at),
                "started_at": _iso(record.started_at),
                "usage": record.usage,
            },
        )

    def progress(self) -> Progress:
        """Where the job stands now."""
        (then, done), now = self._rates[0], time.monotonic()
        rate = (self._done - done) / (now - then) if now > then else 0.0
        return Progress(
            state=self._stop or self._state,
            items=self._items,
            planned=self._planned,
            done=self._done,
            dead=self._dead,
            rate=rate,
        )


class _Keeper(threading.Thread):
    """Renews the lease, and tells the loop what the user wants."""

    def __init__(self, store: JobStore, lease: Lease, events: queue.SimpleQueue[tuple[Any, ...]]) -> None:
        super().__init__(name="tally-lease", daemon=True)
        self._store, self._lease, self._events = store, lease, events
        self._stopping = threading.Event()

    def stop(self) -> None:
        self._stopping.set()
        self.join()

    def run(self) -> None:
        wanted = "run"
        while not self._stopping.wait(LOOK_SECONDS):
            try:
                now = self._store.renew(self._lease, seconds=LEASE_SECONDS)
            except OwnershipLostError as error:
                self._events.put(("lost", error))
                return
            except Exception as error:  # the database is away: the lease holds for a while
                log.warning("cannot renew the lease of job %s: %s", self._lease.job_id, error)
                continue
            if now != wanted:
                wanted = now
                self._events.put(("wanted", wanted))


def _had_begun(error: WorkerError) -> bool:
    """Whether the lost worker was at items of its chunk."""
    return error.suspects is not None and error.suspects[0] < error.suspects[1]


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _reason(error: WorkerError, spec: JobSpec) -> str:
    what = error.message
    if isinstance(error, WorkerTimeoutError):
        what += f" of {spec.timeout:g} s"
    return f"{what} while scoring this item alone" + (f"\n{error.trace}" if error.trace else "")


def _mend(job_id: str) -> str:
    return f"See them with 'tally jobs dead {job_id}'; after mending the cause, 'tally jobs retry {job_id} --dead'."


def _first_dead(store: JobStore, job_id: str) -> str:
    for dead in store.dead(job_id):
        return f"{dead.key}: {dead.error.splitlines()[0]}"
    return "not recorded"
