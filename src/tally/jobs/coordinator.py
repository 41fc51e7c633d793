"""The coordinator: drives one job from the first chunk to the finished output.

One thread runs the loop below. Three others feed its queue: the planner (new chunks), the engine
(finished futures), and the lease renewer (the user's requests; that the job was lost). Each turn of the
loop drains the queue and puts everything that has come up into one transaction, together with the next
hand-outs; only then are those handed to the engine. So an attempt is counted before it can do harm, and a
kill at any moment loses at most work that was not committed, never a committed row.

While the database is away (PostgreSQL is restarted, say), whatever needs it waits and is tried again; all changes of
the store may be repeated. Workers continue with what they have.
"""

from __future__ import annotations

import gc
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice, repeat
from typing import Any, TypeVar

from tally import garbage
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
    WorkerTimeoutError,
)
from tally.jobs import worker
from tally.jobs.chunks import Dead, Done, Lost, StoredChunk, new_nonce
from tally.jobs.events import (
    Assumed,
    ChunkDone,
    Events,
    Finalizing,
    Finished,
    ItemDead,
    Planned,
    Progress,
    Started,
    StateChanged,
    WorkerLost,
)
from tally.jobs.intake import Intake
from tally.jobs.lease_renewer import lease_renewer
from tally.jobs.packed import PackedChunk
from tally.jobs.plan import ChunkSizer, Planner
from tally.jobs.policy import (
    LOADING_LOSSES,
    UNSETTLED_ATTEMPTS,
    DeadLimit,
    ItemIsDead,
    JobFails,
    LoadAgain,
    LoadingLosses,
    Part,
    RetryPolicy,
    RunAgain,
    Stragglers,
    had_begun,
    is_too_large_a_share,
)
from tally.jobs.pusher import Pusher, refusal
from tally.jobs.scaling import CHUNKS_PER_SLOT, Scaler
from tally.jobs.spec import JobSpec
from tally.jobs.store import JobRecord, JobStore, Lease
from tally.jobs.tidy import undo_retry
from tally.push.base import Receiver
from tally.sinks.base import Output, Sink
from tally.sources.base import STAGES, Chunk, Source
from tally.sources.selection import Selection
from tally.text import iso_time

log = logging.getLogger("tally")

T = TypeVar("T")

GRACE_SECONDS = 20.0
"""Once the job is told to stop, seconds for running chunks to finish, and for a database that is away to come back."""
CONFIRM_SECONDS = 1.0
"""While the output is published: seconds for which it is taken as known that the job is still ours."""
MOST_TAKEN = 4096
"""The most chunks that are handed out in one transaction."""
MOST_AHEAD = 2048
"""The most planned chunks that wait to be stored."""
PUBLISH_SECONDS = 60.0
"""Seconds between two generations of results of an endless source."""
KEYS_SECONDS = 7 * 86_400.0
"""Seconds for which the keys of finished messages are kept, to recognise one that is delivered late."""
QUIET_SECONDS = 5.0
"""Seconds without any outcome before the engine is asked why."""


@dataclass(slots=True)
class _Running:
    """A chunk in the engine's hands: one future per live attempt. doubled: whether there has been a second."""

    stored: StoredChunk
    since: float
    futures: list[Future[Any]] = field(default_factory=list)
    doubled: bool = False


@dataclass(slots=True)
class _Turn:
    """What has come up since the last commit. settled: the chunks of ``done``, by their number in the store."""

    planned: list[Chunk] = field(default_factory=list)
    complete: bool = False
    done: list[Done] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    settled: dict[int, PackedChunk] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.planned or self.complete or self.done or self.lost)


class Coordinator:
    """Owns one job by a lease. :meth:`run` returns when the job is finished, stopped or lost.

    workers: the least and the most slots of the engine; between them, there are as many as there is work for.
    receiver: gets all rows as they are committed.
    selection: of the source's items; that of the spec by default.
    complete: all is scored, and only the output is to be made: no worker is needed.
    A part of a split job (:mod:`tally.jobs.split`) has too many dead items if the whole has, and makes no output.
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
        events: Events | None = None,
        receiver: Receiver | None = None,
        selection: Selection | None = None,
        complete: bool = False,
    ) -> None:
        self._store, self._lease, self._spec = store, lease, spec
        self._source, self._sink, self._engine = source, sink, engine
        self._least, self._most = workers or (engine.slots, engine.slots)
        self._manifest, self._events = manifest, events if events is not None else Events()
        self._unit, self._items, self._planned = record.unit, record.items, record.planned
        self._done, self._dead = record.done, record.dead
        self._assumed = set(record.assumed)
        self._rates: deque[tuple[float, int]] = deque([(time.monotonic(), record.done)], maxlen=64)
        self._patience = Patience(self._events.waiting)
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._running: dict[int, _Running] = {}
        self._batch_size = batch_size
        self._retry = RetryPolicy(spec.attempts, batch_size)
        self._dead_limit = DeadLimit(spec.max_dead, spec.min_dead, spec.strict)
        self._scaler = Scaler(self._least, self._most)
        self._stragglers = Stragglers()
        self._loading_losses = LoadingLosses()
        most = min(source.chunk_items, spec.worker_items or source.chunk_items)
        self._sizer = ChunkSizer(batch_size, self._most, source.chunk_seconds, most)
        self._planner: Planner | None = None
        self._intake = None if source.bounded else Intake(store, lease.job_id, source, self._patience, self._events)
        self._pusher: Pusher | None = None
        if receiver is not None:
            self._pusher = Pusher(
                store, lease, sink, receiver, columns=sink.describe().columns, confirm=self._confirm,
                whole=spec.push is not None and spec.push.when == "finished",
                patience=self._patience, events=self._events, failed=lambda error: self._inbox.put(("unpushed", error)),
            )  # fmt: skip
        self._published_at = time.monotonic()
        self._unpublished = False
        self._loaded = self._prepared = self._starved = False
        self._doubled = False
        self._state = "running"
        self._stop: str | None = None
        self._stopping = False
        self._error: Exception | None = None
        self._deadline: float | None = None
        self._accounted = time.monotonic()
        self._cursor = record.plan_cursor
        self._open = 0  # chunks that are planned and not done
        self._heard_at = self._asked_at = time.monotonic()
        self._remark: str | None = None
        self._confirmed_at = float("-inf")
        self._is_retry = record.is_retry
        self._whole, self._is_part = record.parent or record.id, record.parent is not None
        self._selection, self._complete = selection or spec.selection, complete

    def stop(self, *, now: bool = False) -> None:
        """Stop: let running chunks finish within a grace time, or, with ``now``, kill them. Any thread.

        What cannot be saved within that time because the database is away is done again when the job is resumed.
        """
        if not self._stopping:
            self._stopping = True
            self._events.note("stopping: running chunks are finished and saved (again to kill them)")
        self._patience.give_up(0.0 if now else GRACE_SECONDS)
        self._inbox.put(("stop", now))

    # -- the life of a job -------------------------------------------------------------------------

    def run(self) -> str:
        """Drive the job; returns its state. Raises what made it fail, after saving that."""
        job = self._lease.job_id
        self._events(Started(job, self._unit))
        with _collecting_rarely():
            try:
                state = self._drive()
            except OwnershipLostError:  # and its workers have ended
                with suppress(TallyError):
                    self._sink.withdraw()
                raise
            except Exception as error:
                interrupted = isinstance(error, (ClusterLostError, DatabaseAwayError))
                self._events(Finished(job, "interrupted" if interrupted else "failed", error))
                raise
        self._events(Finished(job, state))
        return state

    def _drive(self) -> str:
        renewer = lease_renewer(self._store, self._lease, self._inbox, self._patience)
        renewer.start()
        try:
            counts = self._patience(lambda: self._store.counts(self._lease.job_id))
            self._open = counts["pending"] + counts["running"]
            if self._intake is not None:
                self._publish_settled()
            if self._pusher is not None:
                self._pusher.start()
            if not self._complete:
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
                with suppress(TallyError):  # the error at hand is the one to tell
                    if isinstance(error, ClusterLostError):
                        self._store.release(self._lease, "interrupted", error=str(error))
                    else:
                        self._give_up(error)
            raise
        finally:
            renewer.stop()
            if self._planner is not None:
                self._planner.stop()
            if self._pusher is not None:
                self._pusher.stop()
            self._source.close()
            self._engine.stop(kill=True)

    def _load(self) -> None:
        """Have a worker load the model, before anything is handed out."""
        if self._engine.slots == 0:
            self._engine.resize(1)
        future = self._engine.submit(worker.describe)
        future.add_done_callback(lambda done: self._inbox.put(("ready", done)))

    def _plan(self) -> None:
        if self._planned:
            self._events(Planned(self._items))

        def ended(error: Exception | None) -> None:
            self._inbox.put(("planned", error))

        self._planner = Planner(
            self._source,
            after=self._cursor,
            first=self._items,
            planned=self._planned,
            sizer=self._sizer,
            prepared=lambda: self._inbox.put(("prepared",)),
            deliver=lambda chunk: self._inbox.put(("chunk", chunk)),
            ended=ended,
            ahead=max(16, min(self._most, MOST_AHEAD)),
            selection=self._selection,
        )
        self._planner.start()

    def _loop(self) -> None:
        while not self._is_over():
            turn = _Turn()
            for message in self._drain():
                self._take_in(message, turn)
            if self._loaded:
                self._scale()
            self._commit(turn)
            if self._intake is not None:
                self._intake.acknowledge_again()
            self._publish_now_and_then()
            self._ask_why_it_is_quiet()
            self._events(self.progress())
            if self._stop is not None:
                self._drop_waiting()

    def _is_over(self) -> bool:
        """Whether nothing runs any more, and nothing is to come."""
        if self._stop is not None:
            return not self._running or (self._deadline is not None and time.monotonic() > self._deadline)
        return self._planned and not self._running and self._starved and self._state == "running"

    def _take_in(self, message: tuple[Any, ...], turn: _Turn) -> None:
        match message:  # what comes most often is looked for first
            case ("done", stored, attempt, future):
                self._heard_at = time.monotonic()
                self._settle(stored, attempt, future, turn)
            case ("chunk", chunk):
                turn.planned.append(chunk)
            case ("ready", future):
                self._heard_at = time.monotonic()
                self._loaded = self._greet(future)
            case ("prepared",):
                self._prepared = True
            case ("planned", None):
                turn.complete = True
            case ("planned", error):
                self._fail(error)
            case ("unpushed", error):
                self._fail(error)
            case ("stop", now):
                self._halt("interrupted", grace=0.0 if now else GRACE_SECONDS)
            case ("wanted", wanted):
                self._obey(wanted)
            case ("lost", error):
                raise error

    def _drain(self) -> Sequence[tuple[Any, ...]]:
        """Everything that is in the queue, after waiting for the first of it; empty if nothing comes for a while."""
        messages: list[tuple[Any, ...]] = []
        try:
            messages.append(self._inbox.get(timeout=0.2))
            while len(messages) < 4096:
                messages.append(self._inbox.get_nowait())
        except queue.Empty:
            pass
        return messages

    def _commit(self, turn: _Turn) -> None:
        """Save everything of this turn in one transaction, together with the next hand-outs."""
        handing_out = self._loaded and self._prepared and self._stop is None and self._state == "running"
        room = max(1, CHUNKS_PER_SLOT * self._engine.slots) - len(self._running)
        take = max(0, min(room, MOST_TAKEN)) if handing_out else 0
        if turn.planned or turn.complete or turn.lost:
            self._starved = False
        if self._starved:
            take = 0
        if not (turn or take):
            if handing_out:
                self._run_stragglers_again()
            return
        now = time.monotonic()
        usage = {"seconds": now - self._accounted} if turn.done else {}
        planned: list[Chunk] = turn.planned
        received: list[list[str]] = []
        if self._intake is not None:
            planned, received = self._intake.admit(turn.planned, first=self._items)
        counted, taken = self._save(
            planned=planned,
            received=received,
            complete=turn.complete,
            done=turn.done,
            lost=turn.lost,
            usage=usage,
            push=self._to_push(turn),
            take=take,
        )
        if turn.done:
            self._accounted = now
        if planned:
            self._items = planned[-1].first + planned[-1].count
        if turn.planned and self._planner is not None:
            self._planner.taken(len(turn.planned))
            self._sizer.dropped(max(0, len(turn.planned) - len(planned)))
        if turn.complete:
            self._planned = True
            self._events(Planned(self._items))
            if remark := self._source.remark():
                self._events.warn(remark)
        for each in counted:
            self._done += each.count
            self._dead += len(each.dead)
            self._tell(turn.settled[each.id], each)
        if counted:
            self._rates.append((now, self._done))
            self._unpublished = True
            if self._pusher is not None:
                self._pusher.wake()
        if self._intake is not None:
            dead = {item.key: item.error for each in counted for item in each.dead}
            self._intake.acknowledge([turn.settled[each.id].unpacked() for each in counted], dead)
        if take:
            self._starved = len(taken) < take
            if len(taken) == take < room:
                self._inbox.put(("more",))  # look again at once
        self._hand_out(taken)
        self._check_dead()

    def _to_push(self, turn: _Turn) -> dict[int, dict[str, Mapping[str, Any] | None]]:
        """The keys of what was scored, by chunk, if rows are pushed, and what is told of each."""
        if self._pusher is None:
            return {}
        dead = {each.key for done in turn.done for each in done.dead}
        found: dict[int, dict[str, Mapping[str, Any] | None]] = {}
        for done in turn.done:
            chunk = turn.settled[done.id].unpacked()
            keys, info = self._source.keys(chunk), self._source.info(chunk) or repeat(None)
            found[done.id] = {key: each for key, each in zip(keys, info, strict=False) if key not in dead}
        return found

    def _tell(self, chunk: PackedChunk, done: Done) -> None:
        """Send the events of a committed chunk."""
        if not self._events:
            return
        seconds = done.usage.get("worker_seconds", 0.0)
        stages = {stage: done.usage[stage] for stage in STAGES if stage in done.usage}
        self._events(ChunkDone(chunk.first, chunk.count, len(done.dead), done.output.rows, seconds, stages))
        for dead in done.dead:
            self._events(ItemDead(dead.key, dead.stage, dead.error))

    def _save(
        self, *, planned: Sequence[Chunk] = (), lost: Sequence[Lost] = (), **more: Any
    ) -> tuple[list[Done], list[StoredChunk]]:
        """Commit, waiting for the database if it is away."""
        nonce = new_nonce()
        counted, taken = self._patience(
            lambda: self._store.commit(self._lease, planned=planned, lost=lost, nonce=nonce, **more)
        )
        self._open += len(planned) + sum(len(each.parts) - 1 for each in lost) - len(counted)
        return counted, taken

    def _scale(self) -> None:
        """As many slots as there is work for: more at once, fewer after a while, none when there is nothing to do."""
        if self._stop is not None:
            return
        target = self._scaler.target(
            time.monotonic(),
            slots=self._engine.slots,
            busy=self._attempts_running(),
            open_chunks=self._open,
            running=self._state == "running",
        )
        if target is not None:
            self._engine.resize(target)

    def _attempts_running(self) -> int:
        return sum(len(each.futures) for each in self._running.values())

    def _ask_why_it_is_quiet(self) -> None:
        now = time.monotonic()
        if min(now - self._heard_at, now - self._asked_at) < QUIET_SECONDS or self._state != "running":
            return
        self._asked_at = now
        remark = self._engine.remark()
        if remark is not None and remark != self._remark:
            self._events.warn(remark)
        self._remark = remark

    def _greet(self, future: Future[Any]) -> bool:
        """The first worker has loaded the model, or could not."""
        error = future.exception() if not future.cancelled() else CancelledError()
        if error is None:
            self._events.note(future.result())
            return True
        if isinstance(error, ClusterLostError):
            raise error
        if self._stop is None:
            if not isinstance(error, WorkerError):
                self._fail(error)
            elif self._may_load_again(error, self._spec.attempts):
                self._load()
        return False

    def _may_load_again(self, error: BaseException, most: int) -> bool:
        """Count a worker that was lost while it started or loaded the model; that many in a row are no accident."""
        if self._loading_losses.add(most):
            return True
        assert isinstance(error, WorkerError)
        self._fail(
            ModelError(
                f"{self._loading_losses.count} workers in a row were lost while they started or loaded the model, "
                f"the last: {error.message}",
                hint=f"It left this stack:\n{error.trace}" if error.trace else "Check the memory that it needs.",
            )
        )
        return False

    # -- handing out, and what comes back ----------------------------------------------------------

    def _hand_out(self, taken: Sequence[StoredChunk]) -> None:
        halved: list[Lost] = []
        for stored in taken:
            unsettled = stored.attempts > UNSETTLED_ATTEMPTS and stored.packed.count > 1
            if unsettled or self._is_too_large_a_share(stored):
                halved.append(self._replaced(stored, self._retry.halves(stored.packed.count, stored.losses)))
                continue
            self._running[stored.id] = _Running(stored, time.monotonic())
            self._submit(stored, stored.attempt)
        if halved:
            self._save(lost=halved)
            self._starved = False
            self._inbox.put(("halved",))  # the halves are waiting: look again at once

    def _is_too_large_a_share(self, stored: StoredChunk) -> bool:
        fresh = stored.attempts == 1 and stored.losses == 0
        return (
            self._planned
            and fresh
            and is_too_large_a_share(
                stored.packed.count,
                left=self._items - self._done,
                slots=self._engine.slots,
                batch_size=self._batch_size,
                seconds=self._sizer.seconds(stored.packed.count),
            )
        )

    def _replaced(self, stored: StoredChunk, parts: Sequence[Part]) -> Lost:
        """The parts in the place of the chunk."""
        chunk = stored.chunk
        if len(parts) == 1:
            return Lost(stored.id, [(chunk, parts[0].losses)])
        return Lost(stored.id, [(self._source.slice(chunk, part.start, part.stop), part.losses) for part in parts])

    def _submit(self, stored: StoredChunk, attempt: str) -> None:
        future = self._engine.submit(worker.run_chunk, stored.packed, attempt)
        self._running[stored.id].futures.append(future)
        future.add_done_callback(lambda done: self._inbox.put(("done", stored, attempt, done)))

    def _settle(self, stored: StoredChunk, attempt: str, future: Future[Any], turn: _Turn) -> None:
        running = self._running.get(stored.id)
        if running is None:
            return  # the other attempt at a straggler was first
        running.futures.remove(future)
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None or (isinstance(error, WorkerError) and had_begun(error)):
            self._loading_losses.reset()
        if error is None:
            outcome: worker.Outcome = future.result()
            del self._running[stored.id]
            self._tell_assumed(outcome.assumed)
            self._sizer.observe(stored.packed.count, outcome.seconds)
            self._stragglers.observe(outcome.seconds)
            turn.done.append(self._done_from(stored, attempt, outcome))
            turn.settled[stored.id] = stored.packed
        elif running.futures:
            return  # another attempt is still at it
        else:
            del self._running[stored.id]
            if future.cancelled() or self._stop is not None:
                return  # stays "running" in the store; goes back to pending when the job is released
            # The planner waits for a first measurement: this is one, if a poor one.
            self._sizer.observe(stored.packed.count, time.monotonic() - running.since)
            self._after_loss(stored, attempt, error, turn)

    def _tell_assumed(self, sentences: Sequence[str]) -> None:
        """Tell what a worker took for granted, once however many workers do."""
        for sentence in sentences:
            if sentence not in self._assumed:
                self._assumed.add(sentence)
                self._events(Assumed(sentence))

    def _done_from(self, stored: StoredChunk, attempt: str, outcome: worker.Outcome) -> Done:
        dead = [
            Dead(each.key, each.stage, each.error, self._source.alone(stored.chunk, each.position, each.key))
            for each in outcome.dead
        ]
        usage = {**outcome.timings.as_dict(), "worker_seconds": outcome.seconds, "chunks": 1}
        return Done(stored.id, attempt, stored.packed.count, outcome.output, dead, usage)

    def _after_loss(self, stored: StoredChunk, attempt: str, error: BaseException, turn: _Turn) -> None:
        chunk = stored.chunk
        if isinstance(error, ClusterLostError):
            raise error  # nothing can be run any more, and nothing is wrong with the job
        if isinstance(error, WorkerError):
            self._events(WorkerLost(chunk.first, chunk.count, str(error)))
        match self._retry.decide(chunk.count, error, losses=stored.losses, handed_out=stored.attempts):
            case LoadAgain():
                if self._may_load_again(error, LOADING_LOSSES * max(1, self._engine.slots)):
                    turn.lost.append(Lost(stored.id, [(chunk, stored.losses)]))
            case RunAgain(parts):
                turn.lost.append(self._replaced(stored, parts))
            case ItemIsDead():
                key = self._source.keys(chunk)[0]
                dead = Dead(key, "score", _reason(error, self._spec), self._source.alone(chunk, 0, key))
                turn.done.append(Done(stored.id, attempt, 1, Output(), [dead], {"losses": 1}))
                turn.settled[stored.id] = stored.packed
            case JobFails():
                self._fail(error)

    def _run_stragglers_again(self) -> None:
        """Near the end, idle slots run what takes longest a second time; the first commit wins."""
        if not (self._planned and self._starved):
            return
        idle = self._engine.slots - self._attempts_running()
        for each in self._stragglers.pick(self._running.values(), idle=idle, now=time.monotonic()):
            each.doubled = self._doubled = True
            self._submit(each.stored, self._again(each.stored.id))

    def _again(self, chunk_id: int) -> str:
        nonce = new_nonce()
        return self._patience(lambda: self._store.second_attempt(self._lease, chunk_id, nonce=nonce))

    # -- stopping ----------------------------------------------------------------------------------

    def _obey(self, wanted: str) -> None:
        if wanted == "cancel":
            self._halt("cancelled", grace=0.0)
        elif wanted == "stop":
            self._halt("interrupted", grace=GRACE_SECONDS)
        elif (wanted == "pause") != (self._state == "paused") and self._stop is None:
            self._state = "paused" if wanted == "pause" else "running"
            self._accounted = time.monotonic()  # waiting costs nothing
            self._patience(lambda: self._store.mark(self._lease, self._state))
            self._events(StateChanged(self._state))

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
        if self._stop is not None:
            return
        done, dead = self._done, self._dead
        if self._is_part and dead:
            done, dead = self._patience(lambda: self._store.share_of_dead(self._whole))
        match self._dead_limit.reached(done, dead):
            case "strict":
                self._fail(
                    JobError(
                        f"stopped, as --strict asks: {dead:,} of the first {done:,} items failed; "
                        f"the first was {self._first_dead()}",
                        hint=f"{_mend(self._whole)} Without --strict, the rest is scored.",
                    )
                )
            case "share":
                self._fail(
                    JobError(
                        f"stopped early: {dead:,} of the first {done:,} items failed, over the limit of "
                        f"{self._spec.max_dead:.0%}; the first was {self._first_dead()}",
                        hint=f"{_mend(self._whole)} To go on regardless, raise --max-dead.",
                    )
                )

    def _end(self) -> str:
        # What may still run has had its grace, or is the slower attempt at something that is done.
        self._engine.stop(kill=self._deadline is not None or self._doubled)
        if self._stop == "cancelled":
            self._account()
            self._confirm()
            self._publish()  # what was acknowledged does not come again
            if self._is_retry:
                self._patience(lambda: undo_retry(self._store, self._lease, self._sink))
                return "finished"
            if not self._is_part:
                self._sink.release()
            self._release("cancelled")
            return "cancelled"
        self._check_dead()
        if self._stop is None and 0 < self._done == self._dead and not self._is_part:
            failed = "the only item failed:" if self._done == 1 else f"all {self._done:,} items failed; the first was"
            self._fail(JobError(f"{failed} {self._first_dead()}", hint=_mend_all(self._whole)))
        if self._stop is None and self._pusher is not None:
            self._arrive(self._pusher)
        if self._stop is None:
            try:
                manifest = None if self._is_part else self._finalize()
            except (OwnershipLostError, DatabaseAwayError):
                raise
            except Exception as error:
                self._fail(error)
            else:
                if self._is_part:
                    self._account()
                self._release("finished", manifest=manifest)
                self._state = "finished"
                self._events(self.progress())
                return "finished"
        with suppress(StorageError):  # on a full disk: the error at hand is the one to tell
            self._account()
            self._publish()
        if self._error is not None:
            self._give_up(self._error)
            raise self._error
        self._release(self._stop or "interrupted")
        return self._stop or "interrupted"

    def _arrive(self, pusher: Pusher) -> None:
        """Wait until all rows have arrived where they are pushed."""
        try:
            pusher.drain(stopped=lambda: self._stopping)
        except TallyError as error:
            self._fail(error)
            return
        if self._stopping:
            self._halt("interrupted", grace=0.0)
        elif refused := self._patience(lambda: self._store.refused(self._lease.job_id)):
            self._fail(refusal(refused, self._whole))
        elif self._spec.push is not None:
            self._events.note(f"all rows have arrived at {self._spec.push.shown}")

    def _give_up(self, error: Exception) -> None:
        """The job has failed; one that was finished before it was retried is as finished as it was."""
        if self._is_retry:
            self._patience(lambda: undo_retry(self._store, self._lease, self._sink, error))
        else:
            self._release("failed", error=str(error))

    def _release(self, state: str, **more: Any) -> None:
        self._patience(lambda: self._store.release(self._lease, state, **more))

    def _account(self) -> None:
        """Book the time since the last commit; waiting while paused costs nothing."""
        if self._state == "running":
            now = time.monotonic()
            self._save(usage={"seconds": now - self._accounted})
            self._accounted = now

    def _finalize(self) -> dict[str, Any]:
        self._events(Finalizing())
        self._account()
        if self._intake is not None:
            self._publish_settled()
        record = self._patience(lambda: self._store.get(self._lease.job_id))
        return self._write_output(self._sink.finalize, record, record.generation)

    def _write_output(self, write: Callable[..., dict[str, Any]], record: JobRecord, generation: int) -> dict[str, Any]:
        """Have the sink finalize or publish what is committed of one generation."""
        store, job_id = self._store, record.id
        dead = self._streamed(lambda: store.dead(job_id))
        return write(
            self._streamed(lambda: store.outputs(job_id, generation=generation)),
            ({"key": each.key, "stage": each.stage, "error": each.error} for each in dead),
            {
                **self._manifest,
                **({"source_read": facts} if (facts := self._source.facts()) else {}),
                "assumed": record.assumed,
                "warnings": record.remarks,
                "job": record.id,
                "generation": generation,
                "items": record.items,
                "scored": record.done - record.dead,
                "dead": record.dead,
                "rows": record.rows,
                "created_at": iso_time(record.created_at),
                "started_at": iso_time(record.started_at),
                "usage": record.usage,
            },
            confirm=self._confirm,
        )

    # -- endless sources ---------------------------------------------------------------------------

    def _publish_now_and_then(self) -> None:
        """Results of an endless source are published while the job runs, a generation at a time."""
        if time.monotonic() - self._published_at >= PUBLISH_SECONDS and self._stop is None:
            self._publish()

    def _publish(self) -> None:
        """Publish what is committed and not published yet."""
        if self._intake is None or not self._unpublished:
            return
        if self._pusher is not None and self._stop != "cancelled" and not self._pusher.idle:
            return  # what is published is not staged any more, and could not be pushed
        nonce = new_nonce()
        self._patience(lambda: self._store.advance(self._lease, nonce=nonce))
        self._publish_settled()
        self._patience(lambda: self._store.forget_keys(self._lease, older_than=KEYS_SECONDS))
        self._published_at = time.monotonic()

    def _publish_settled(self) -> None:
        """Publish the generations that nothing is added to any more, and that are not published yet.

        A generation is settled before it is published: after a crash, the same is published again.
        """
        record = self._patience(lambda: self._store.get(self._lease.job_id))
        manifest = self._sink.manifest() or {}
        published = manifest["generation"] if manifest.get("job") == record.id else -1
        for generation in range(published + 1, record.generation):
            self._write_output(self._sink.publish, record, generation)
        current = self._streamed(lambda: self._store.outputs(record.id, generation=record.generation))
        self._unpublished = next(current, None) is not None

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
        for dead in self._streamed(lambda: self._store.dead(self._whole)):
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
    if not 0 < before[0] < garbage.THRESHOLDS[0]:  # the caller has turned it off, or made it rarer still
        yield
        return
    # Each chunk at hand is twenty objects or so, none of them garbage: with thousands of workers, and Python's own
    # thresholds, a quarter of the time went into looking at them.
    garbage.look_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _reason(error: BaseException, spec: JobSpec) -> str:
    assert isinstance(error, WorkerError)
    what = error.message
    if isinstance(error, WorkerTimeoutError):
        what += f" of {spec.timeout:g} s"
    return f"{what} while scoring this item alone" + (f"\n{error.trace}" if error.trace else "")


def _mend(job_id: str) -> str:
    return f"See them with 'tally jobs dead {job_id}'; after mending the cause, 'tally jobs retry {job_id} --dead'."


def _mend_all(job_id: str) -> str:
    """What to do where nothing was scored: a mended model may be the cause, too."""
    return f"{_mend(job_id)} After mending the model, give the same command again."
