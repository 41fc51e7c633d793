"""Pushes a job's committed rows to their receiver, in a thread of its own beside the coordinator's."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from tally.database.waiting import Patience, pause
from tally.errors import OwnershipLostError, StorageAwayError, StorageError, TallyError
from tally.jobs.events import Events
from tally.jobs.outbox import Refused, Waiting
from tally.jobs.store import JobStore, Lease
from tally.push.base import KEY, Parcel, Receiver
from tally.sinks.base import Sink

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")

log = logging.getLogger("tally")

CHECK_SECONDS = 10.0
"""How long a job waits, before it begins, for what a look at the receiver says. What is said later ends it later."""
AT_ONCE = 64
"""Parcels that are read from the store at once."""
AWAY_SECONDS = 180.0
"""How long a job that has nothing else to do waits for a receiver that does not answer."""


class Pusher:
    """Delivers what the store's outbox holds, oldest first, while the job runs. Thread-safe.

    columns: of the rows, without the key: column name to Arrow type name; None where they are not known before.
    whole: deliver nothing before :meth:`drain`, and then everything at once. confirm: raises if the job is no longer
    ours.
    failed: called, in the pusher's thread, with an error after which nothing can be pushed.
    """

    def __init__(
        self,
        store: JobStore,
        lease: Lease,
        sink: Sink,
        receiver: Receiver,
        *,
        columns: Mapping[str, str] | None,
        whole: bool = False,
        confirm: Callable[[], None] = lambda: None,
        patience: Patience,
        events: Events,
        failed: Callable[[Exception], None],
    ) -> None:
        self._store, self._lease, self._sink, self._receiver = store, lease, sink, receiver
        self._columns, self._patience, self._events, self._failed = columns, patience, events, failed
        self._whole, self._confirm, self._draining = whole, confirm, False
        self._checked = threading.Event()
        self._changed = threading.Condition()
        self._wanted = self._idle = self._stopping = self._begun = False
        self._error: Exception | None = None
        self._away: tuple[float, StorageAwayError] | None = None
        self._thread = threading.Thread(target=self._run, name="tally-pusher", daemon=True)

    def start(self) -> None:
        """Begin, with what is left from before, also with what was refused then.

        Raises StorageError if nothing can be pushed: the table lacks a column, say, or has gone.
        """
        pushes = self._patience(lambda: self._store.pushes(self._lease.job_id))
        self._begun = pushes is not None and pushes.delivered > 0
        self._patience(lambda: self._store.push_refused_again(self._lease))
        self._wanted = True
        self._thread.start()
        self._checked.wait(CHECK_SECONDS)
        with self._changed:
            if self._error is not None:
                raise self._error

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""
        return self._idle

    def wake(self) -> None:
        """There is more."""
        with self._changed:
            self._wanted, self._idle = True, False
            self._changed.notify_all()

    def drain(self, *, stopped: Callable[[], bool] = lambda: False) -> None:
        """Return once everything has arrived, but for what was refused, or when ``stopped`` says so.

        Raises what keeps it from arriving: StorageAwayError if the receiver has not answered for three minutes.
        """
        begun = time.monotonic()
        self._draining = True
        self.wake()
        with self._changed:
            while not (self._idle or self._error or stopped()):
                self._changed.wait(0.2)
                if self._away is not None and time.monotonic() - max(begun, self._away[0]) > AWAY_SECONDS:
                    raise self._away[1]
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """End; what has not arrived stays in the outbox. Idempotent."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._receiver.close()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._check()
            while self._next():
                if self._whole:
                    if self._draining:
                        self._push_all()
                    continue
                for waiting in self._all():
                    self._push(waiting)
                    if self._stopping:
                        return
        except OwnershipLostError:
            pass  # the coordinator hears of it, too
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
            self._checked.set()
            self._failed(error)

    def _check(self) -> None:
        from tally.sinks.columns import schema_of

        with suppress(StorageAwayError):  # that it is away is told when there is something to push
            self._receiver.check(schema_of(self._columns), begun=self._begun)
        self._checked.set()

    def _next(self) -> bool:
        """Wait until there is more; False to stop."""
        with self._changed:
            if not self._wanted:
                self._idle = True
                self._changed.notify_all()
            while not (self._wanted or self._stopping):
                self._changed.wait()
            self._wanted = False
            return not self._stopping

    def _all(self, *, settling: bool = True) -> Iterator[Waiting]:
        """What waits, oldest first. settling: whether each leaves before the next is asked for."""
        after = 0
        while some := self._patience(partial(self._store.unpushed, self._lease, limit=AT_ONCE, after=after)):
            yield from some
            after = 0 if settling else some[-1].id

    def _parcel(self, waiting: Waiting) -> Parcel:
        return Parcel(waiting.name, waiting.keys, self._rows(waiting), waiting.info)

    def _push(self, waiting: Waiting) -> None:
        parcel = self._parcel(waiting)
        refusals = self._tried(lambda: self._receiver.deliver(parcel, confirm=self._confirm))
        if refusals is None:
            return
        refused = [
            Refused(each.key, each.reason, _alone(parcel.rows, each.key), waiting.info.get(each.key))
            for each in refusals
        ]
        for each in refusals:
            log.warning("%s was refused where it was pushed: %s", each.key, each.reason)
        self._patience(partial(self._store.pushed, self._lease, waiting.id, refused))

    def _push_all(self) -> None:
        def deliver() -> bool:
            self._receiver.deliver_all(lambda: map(self._parcel, self._all(settling=False)), confirm=self._confirm)
            return True

        if next(self._all(), None) is not None and self._tried(deliver):
            for waiting in self._all():
                self._patience(partial(self._store.pushed, self._lease, waiting.id))

    def _tried(self, deliver: Callable[[], T]) -> T | None:
        """What it gives, after waiting for a receiver that does not answer; None if it was told to stop meanwhile."""
        tries = 0
        while not self._stopping:
            try:
                found = deliver()
            except StorageAwayError as error:
                self._wait(error, tries)
                tries += 1
                continue
            self._is_back()
            return found
        return None

    def _rows(self, waiting: Waiting) -> pa.Table:
        import pyarrow as pa

        if waiting.rows is not None:
            with pa.ipc.open_stream(waiting.rows) as reader:
                return reader.read_all()
        assert waiting.output is not None
        tables = list(self._sink.staged_rows(waiting.output))
        return (
            pa.concat_tables(tables, promote_options="permissive")
            if tables
            else pa.table({KEY: pa.array([], "string")})
        )

    def _wait(self, error: StorageAwayError, tries: int) -> None:
        if self._away is None:
            self._events.waiting(f"rows cannot be pushed: {error.message}; that is tried again")
        with self._changed:
            self._away = (time.monotonic() if self._away is None else self._away[0], error)
            if not self._stopping:
                self._changed.wait(pause(tries))

    def _is_back(self) -> None:
        if self._away is not None:
            self._away = None
            self._events.waiting("rows are pushed again")


def _alone(rows: pa.Table, key: str) -> bytes:
    """The rows of one item, in Arrow's stream format."""
    import pyarrow as pa
    import pyarrow.compute as pc

    table = rows.filter(pc.equal(rows[KEY], key))
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, table.schema) as writer:
        writer.write_table(table)
    return bytes(buffer.getvalue())


def refusal(refused: list[tuple[str, str]], job_id: str) -> TallyError:
    """What a job ends with whose rows were not all taken."""
    key, reason = refused[0]
    count = f"{len(refused):,} items were" if len(refused) > 1 else "one item was"
    return StorageError(
        f"{count} refused where rows are pushed; the first was {key}: {reason}",
        hint=f"All else has arrived. Mend the cause, then: tally jobs resume {job_id}",
    )
