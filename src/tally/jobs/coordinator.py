"""The coordinator: drives one job from the first chunk to the finished output.

One thread runs the loop below. Three others feed its queue: the planner (new chunks), the engine
(finished futures), and the lease renewer (the user's requests; that the job was lost). Each turn of the
loop drains the queue and puts everything that has come up into one transaction, together with the next
hand-outs; only then are those handed to the engine. So an attempt is counted before it can do harm, and a
kill at any moment loses at most work that was not committed, never a committed row.

While the database is away (PostgreSQL is restarted, say), whatever needs it waits, and is then tried again: the
store's changes may be. Workers go on with what they have.
"""

from __future__ import annotations

import gc
import logging
import queue
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice, pairwise
from typing import Any, TypeVar

from tally.database.waiting import Patience
from tally.engines.base import Engine
from tally.errors import (
    ClusterLostError,
    DatabaseAwayError,
    JobError,
    ModelError,
    OwnershipLostError,
    StorageError,
    TallyError,
    WorkerError,
    WorkerMemoryError,
    WorkerTimeoutError,
)
from tally.jobs import worker
from tally.jobs.chunks import Dead, Done, Lost, StoredChunk, new_nonce
from tally.jobs.lease_renewer import lease_renewer
from tally.jobs.plan import ChunkSizer, Planner
from tally.jobs.spec import JobSpec
from tally.jobs.store import JobRecord, JobStore, Lease
from tally.sinks.base import Output, Sink
from tally.sources.base import Chunk, Source

log = logging.getLogger("tally")

T = TypeVar("T")

GRACE_SECONDS = 20.0
"""How long running chunks may take to finish once the job is told to stop, and a database that is away to be back."""
CONFIRM_SECONDS = 1.0
"""While the output is published, the job is known to be one's own for so long."""
STRAGGLER_SECONDS = 10.0
STRAGGLER_FACTOR = 3.0
LAST_SHARES = 4
"""Near the end, a chunk holds at most such a part of what each slot has left to do: all of them end together."""
SHORT_SECONDS = 0.5
"""A chunk that takes no longer is not cut to share it out."""
MOST_TAKEN = 4096
"""So many chunks are handed out in one transaction, at most."""
MOST_AHEAD = 2048
"""So many planned chunks wait to be stored, at most."""
CHUNKS_PER_SLOT = 2
"""A slot has its next chunk at hand when it is done with one; where slots may be added, so many chunks make up one."""
SHRINK_SECONDS = 10.0
"""So long there have been idle slots before some are given back."""
IDLE_SECONDS = 60.0
"""So long there has been nothing to hand out before all slots are given back."""
QUIET_SECONDS = 5.0
"""Nothing has come back for so long: the engine may know why."""
COLLECTION_THRESHOLDS = (50_000, 20, 20)
"""Of Python's garbage collector. It counts objects, and each chunk at hand is twenty or so, none of them garbage: with
thousands of workers, and Python's own thresholds, a quarter of the time went into looking at them."""
UNSETTLED_ATTEMPTS = 10
"""Handed out so often without any outcome, a chunk is halved: it may be what kills its coordinator."""
LOADING_LOSSES = 10
"""So many workers for each slot, lost one after the other while they started or loaded the model, end the job."""


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
    """A chunk in the engine's hands: one future per live attempt. doubled: whether there has been a second."""

    stored: StoredChunk
    since: float
    futures: list[Future[Any]] = field(default_factory=list)
    doubled: bool = False


class Coordinator:
    """Owns one job by a lease. :meth:`run` returns when the job is finished, stopped or lost.

    workers: the least and the most slots of the engine; between them, there are as many as there is work for.
    """

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
        workers: tuple[int, int] | None = None,
        batch_size: int,
        manifest: dict[str, Any],
        listen: Callable[[Progress], None] = lambda progress: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._store, self._lease, self._spec = store, lease, spec
        self._source, self._sink, self._engine = source, sink, engine
        self._least, self._most = workers or (engine.slots, engine.slots)
        self._manifest, self._listen, self._say = manifest, listen, say
        self._items, self._planned = record.items, record.planned
        self._done, self._dead = record.done, record.dead
        self._rates: deque[tuple[float, int]] = deque([(time.monotonic(), record.done)], maxlen=64)
        self._events: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._sizer = ChunkSizer(batch_size, self._most, source.chunk_seconds, source.chunk_items)
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
        self._patience = Patience(say)
        self._open = 0  # chunks that are planned and not done
        self._shrinks_since: float | None = None
        self._idle_since: float | None = None
        self._heard_at = self._asked_at = time.monotonic()
        self._remark: str | None = None
        self._confirmed_at = float("-inf")

    def stop(self, *, now: bool = False) -> None:
        """Stop: let running chunks finish within a grace time, or, with ``now``, kill them. Any thread.

        What cannot be saved within that time, as the database is away, is left to whoever goes on with the job.
        """
        self._patience.give_up(0.0 if now else GRACE_SECONDS)
        self._events.put(("stop", now))

    # -- the life of a job -------------------------------------------------------------------------

    def run(self) -> str:
        """Drive the job; returns its state. Raises what made it fail, after saving that."""
        with _collecting_rarely():
            try:
                return self._drive()
            except OwnershipLostError:  # and its workers have ended
                with suppress(TallyError):
                    self._sink.withdraw()
                raise

    def _drive(self) -> str:
        renewer = lease_renewer(self._store, self._lease, self._events, self._patience)
        renewer.start()
        try:
            counts = self._patience(lambda: self._store.counts(self._lease.job_id))
            self._open = counts["pending"] + counts["running"]
            self._load()
            self._plan()
            self._loop()
            return self._end()
        except OwnershipLostError:
            raise
        except DatabaseAwayError:  # we were told to stop meanwhile
            with suppress(TallyError):
                self._store.release(self._lease, "interrupted")
                return "interrupted"
            raise
        except Exception as error:
            if error is not self._error:
                state = "interrupted" if isinstance(error, ClusterLostError) else "failed"
                with suppress(TallyError):  # the error at hand is the one to tell
                    self._store.release(self._lease, state, error=str(error))
            raise
        finally:
            renewer.stop()
            if self._planner is not None:
                self._planner.stop()
            self._engine.stop(kill=True)

    def _load(self) -> None:
        """Have a worker load the model, before anything is handed out."""
        if self._engine.slots == 0:
            self._engine.resize(1)
        future = self._engine.submit(worker.describe)
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
            ahead=max(16, min(self._most, MOST_AHEAD)),
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
                        self._heard_at = time.monotonic()
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
                        self._heard_at = time.monotonic()
                        self._settle(stored, attempt, future, done, lost)
                    case ("stop", now):
                        self._halt("interrupted", grace=0.0 if now else GRACE_SECONDS)
                    case ("wanted", wanted):
                        self._obey(wanted)
                    case ("lost", error):
                        raise error
            if loaded:
                self._scale()
            self._commit(loaded and prepared, chunks, complete, done, lost)
            self._ask_why_it_is_quiet()
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
        room = max(1, CHUNKS_PER_SLOT * self._engine.slots) - len(self._running)
        take = max(0, min(room, MOST_TAKEN)) if handing_out else 0
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
        counted, taken = self._save(planned=chunks, complete=complete, done=done, lost=lost, usage=usage, take=take)
        if done:
            self._accounted = now
        if chunks:
            self._items = chunks[-1].first + chunks[-1].count
            if self._planner is not None:
                self._planner.taken(len(chunks))
        if complete:
            self._planned = True
            if remark := self._source.remark():
                self._note(remark)
        for each in counted:
            self._done += each.count
            self._dead += len(each.dead)
        if counted:
            self._rates.append((now, self._done))
        if take:
            self._starved = len(taken) < take
            if len(taken) == take < room:
                self._events.put(("more",))  # look again at once
        self._hand_out(taken)
        self._check_dead()

    def _save(
        self, *, planned: Sequence[Chunk] = (), lost: Sequence[Lost] = (), **more: Any
    ) -> tuple[list[Done], list[StoredChunk]]:
        """Commit, however long it takes for the database to be there."""
        nonce = new_nonce()
        counted, taken = self._patience(
            lambda: self._store.commit(self._lease, planned=planned, lost=lost, nonce=nonce, **more)
        )
        self._open += len(planned) + sum(len(each.parts) - 1 for each in lost) - len(counted)
        return counted, taken

    def _note(self, remark: str) -> None:
        """Tell the user, also one who looks later."""
        self._patience(lambda: self._store.remark(self._lease, remark))
        self._say(remark)

    def _scale(self) -> None:
        """As many slots as there is work for: more at once, fewer after a while, none when there is nothing to do."""
        if self._least == self._most or self._stop is not None:
            return
        now, slots = time.monotonic(), self._engine.slots
        if self._open and self._state == "running":
            self._idle_since = None
            wanted = max(1, self._least, min(self._most, -(-self._open // CHUNKS_PER_SLOT)))
            idle = slots > sum(len(each.futures) for each in self._running.values())
            if wanted > slots or (wanted < slots and idle and self._has_lasted("_shrinks_since", now, SHRINK_SECONDS)):
                self._engine.resize(wanted)
                self._shrinks_since = None
            elif wanted >= slots or not idle:
                self._shrinks_since = None
        elif self._running:
            self._idle_since = None
        elif slots and self._has_lasted("_idle_since", now, IDLE_SECONDS):
            self._engine.resize(0)

    def _has_lasted(self, name: str, now: float, seconds: float) -> bool:
        since: float | None = getattr(self, name)
        if since is None:
            setattr(self, name, now)
        return since is not None and now - since >= seconds

    def _ask_why_it_is_quiet(self) -> None:
        now = time.monotonic()
        if min(now - self._heard_at, now - self._asked_at) < QUIET_SECONDS or self._state != "running":
            return
        self._asked_at = now
        remark = self._engine.remark()
        if remark is not None and remark != self._remark:
            self._note(remark)
        self._remark = remark

    def _greet(self, future: Future[Any]) -> bool:
        """The first worker has loaded the model, or could not."""
        error = future.exception() if not future.cancelled() else CancelledError()
        if error is None:
            self._say(future.result())
            return True
        if isinstance(error, ClusterLostError):
            raise error
        if self._stop is None:
            if not isinstance(error, WorkerError):
                self._fail(error)
            elif self._may_load_again(error, self._spec.attempts):
                self._load()
        return False

    def _may_load_again(self, error: WorkerError, most: int) -> bool:
        """Count a worker that was lost while it started or loaded the model; that many in a row are no accident."""
        self._loading_losses += 1
        if self._loading_losses < most:
            return True
        self._fail(
            ModelError(
                f"{self._loading_losses} workers in a row were lost while they started or loaded the model, "
                f"the last: {error.message}",
                hint=f"It left this stack:\n{error.trace}" if error.trace else "Check the memory that it needs.",
            )
        )
        return False

    # -- handing out, and what comes back ----------------------------------------------------------

    def _hand_out(self, taken: Sequence[StoredChunk]) -> None:
        halved: list[Lost] = []
        for stored in taken:
            unsettled = stored.attempts > UNSETTLED_ATTEMPTS and stored.chunk.count > 1
            if unsettled or self._is_too_large_a_share(stored):
                halved.append(Lost(stored.id, [(half, stored.losses) for half in self._halves(stored.chunk)]))
                continue
            self._running[stored.id] = _Running(stored, time.monotonic())
            self._submit(stored, stored.attempt)
        if halved:
            self._save(lost=halved)
            self._starved = False
            self._events.put(("halved",))  # the halves are waiting: look again at once

    def _is_too_large_a_share(self, stored: StoredChunk) -> bool:
        """Whether, near the end, this chunk would keep one slot busy while the others have run out of work."""
        count, left = stored.chunk.count, self._items - self._done
        fresh = stored.attempts == 1 and stored.losses == 0
        large = count > self._batch_size and self._sizer.seconds(count) > SHORT_SECONDS
        return self._planned and fresh and large and count * LAST_SHARES * self._engine.slots > left

    def _submit(self, stored: StoredChunk, attempt: str) -> None:
        future = self._engine.submit(worker.run_chunk, stored.chunk, attempt)
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
        if error is None or (isinstance(error, WorkerError) and _had_begun(error)):
            self._loading_losses = 0
        if error is None:
            outcome: worker.Outcome = future.result()
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

    def _done_from(self, stored: StoredChunk, attempt: str, outcome: worker.Outcome) -> Done:
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
            if self._may_load_again(error, LOADING_LOSSES * max(1, self._engine.slots)):
                lost.append(Lost(stored.id, [(chunk, stored.losses)]))
            return
        if isinstance(error, ClusterLostError):
            raise error  # nothing can be run any more, and nothing is wrong with the job
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
        """Near the end, idle slots run what takes longest a second time; the first commit wins.

        Not a third time: where each attempt begins before the last one is lost, no loss would ever count.
        """
        idle = self._engine.slots - sum(len(each.futures) for each in self._running.values())
        if idle <= 0 or not (self._planned and self._starved) or not self._durations:
            return
        patience = max(STRAGGLER_SECONDS, STRAGGLER_FACTOR * statistics.median(self._durations))
        now = time.monotonic()
        slow = [each for each in self._running.values() if not each.doubled and now - each.since > patience]
        for each in sorted(slow, key=lambda running: running.since)[:idle]:
            each.doubled = self._doubled = True
            self._submit(each.stored, self._again(each.stored.id))

    def _again(self, chunk_id: int) -> str:
        nonce = new_nonce()
        return self._patience(lambda: self._store.second_attempt(self._lease, chunk_id, nonce=nonce))

    # -- stopping ----------------------------------------------------------------------------------

    def _obey(self, wanted: str) -> None:
        if wanted == "cancel":
            self._halt("cancelled", grace=0.0)
        elif (wanted == "pause") != (self._state == "paused") and self._stop is None:
            self._state = "paused" if wanted == "pause" else "running"
            self._accounted = time.monotonic()  # waiting costs nothing
            self._patience(lambda: self._store.mark(self._lease, self._state))
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
                    f"the first was {self._first_dead()}",
                    hint=f"{_mend(self._lease.job_id)} Without --strict, the rest is scored.",
                )
            )
        if self._stop is None and self._done >= spec.min_dead and self._dead > spec.max_dead * self._done:
            self._fail(
                JobError(
                    f"stopped early: {self._dead:,} of the first {self._done:,} items failed, over the limit of "
                    f"{spec.max_dead:.0%}; the first was {self._first_dead()}",
                    hint=f"{_mend(self._lease.job_id)} To go on regardless, raise --max-dead.",
                )
            )

    def _end(self) -> str:
        # What may still run has had its grace, or is the slower attempt at something that is done.
        self._engine.stop(kill=self._deadline is not None or self._doubled)
        if self._stop == "cancelled":
            self._account()
            self._confirm()
            self._sink.release()
            self._release("cancelled")
            return "cancelled"
        self._check_dead()
        if self._stop is None and 0 < self._done == self._dead:
            self._fail(
                JobError(
                    f"all {self._done:,} items failed; the first was {self._first_dead()}",
                    hint=_mend(self._lease.job_id),
                )
            )
        if self._stop is None:
            try:
                manifest = self._finalize()
            except (OwnershipLostError, DatabaseAwayError):
                raise
            except Exception as error:
                self._fail(error)
            else:
                self._release("finished", manifest=manifest)
                self._state = "finished"
                self._listen(self.progress())
                return "finished"
        with suppress(StorageError):  # on a full disk: the error at hand is the one to tell
            self._account()
        if self._error is not None:
            self._release("failed", error=str(self._error))
            raise self._error
        self._release(self._stop or "interrupted")
        return self._stop or "interrupted"

    def _release(self, state: str, **more: Any) -> None:
        self._patience(lambda: self._store.release(self._lease, state, **more))

    def _account(self) -> None:
        """Book the time since the last commit; waiting while paused costs nothing."""
        if self._state == "running":
            now = time.monotonic()
            self._save(usage={"seconds": now - self._accounted})
            self._accounted = now

    def _finalize(self) -> dict[str, Any]:
        self._account()
        store, job_id = self._store, self._lease.job_id
        record = self._patience(lambda: store.get(job_id))
        dead = self._streamed(lambda: store.dead(job_id))
        return self._sink.finalize(
            self._streamed(lambda: store.outputs(job_id, generation=record.generation)),
            ({"key": each.key, "stage": each.stage, "error": each.error} for each in dead),
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
            confirm=self._confirm,
        )

    def _confirm(self) -> None:
        """Raises OwnershipLostError if another coordinator has taken the job: nothing of its output is ours to change.

        Between this look and the change that follows, both of them quick, another could still take the job, if this
        process were stopped just then for longer than its lease lasts.
        """
        now = time.monotonic()
        if now - self._confirmed_at >= CONFIRM_SECONDS:
            self._patience(lambda: self._store.confirm(self._lease))
            self._confirmed_at = now

    def _streamed(self, read: Callable[[], Iterator[T]]) -> Iterator[T]:
        """What ``read`` gives, which is the same each time; read again from where the database went away."""
        given = tries = 0
        while True:
            rows = read()
            try:
                for row in islice(rows, given, None):
                    self._patience.is_back()
                    given, tries = given + 1, 0
                    yield row
                return
            except DatabaseAwayError as error:
                self._patience.wait(error, tries)
                tries += 1

    def _first_dead(self) -> str:
        for dead in self._streamed(lambda: self._store.dead(self._lease.job_id)):
            return f"{dead.key}: {dead.error.splitlines()[0]}"
        return "not recorded"

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


@contextmanager
def _collecting_rarely() -> Iterator[None]:
    before = gc.get_threshold()
    if not 0 < before[0] < COLLECTION_THRESHOLDS[0]:  # whoever uses us has turned it off, or made it rarer still
        yield
        return
    gc.set_threshold(*COLLECTION_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)


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
