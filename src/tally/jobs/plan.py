"""Planning: cutting the source into chunks, in a thread of its own, while scoring already runs.

Chunks are sized so that one takes about as long as the source asks for: small enough that a lost worker costs
little and progress is smooth, large enough that handing out and committing cost nothing beside scoring.
The first few hold one batch each, to get the first rows out soon; from then on the measured rate decides. It is
too low at first, while everything is still warming up: until it can be trusted, few chunks are cut ahead.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from tally.errors import JobError, TallyError, error_line
from tally.sources.base import Chunk, ChunkLimit, Source
from tally.sources.selection import Selection

MAX_BYTES = 256 * 2**20
FIRST_CHUNKS_PER_SLOT = 2
OPEN_CHUNKS_PER_SLOT = 3
"""Chunks that are planned and not done, while the rate cannot be trusted: as many as keep every slot busy."""
PATIENCE_SECONDS = 30.0
GROWTH = 4
"""A chunk is at most so many times as large as the largest before it: one lucky measurement is not a rate."""
_MEMORY = 0.7


class ChunkSizer:
    """How large the next chunk is to be. Thread-safe.

    target: seconds that one should take. most: items that one may hold.
    """

    def __init__(
        self, batch_size: int, slots: int, target: float = Source.chunk_seconds, most: int = Source.chunk_items
    ) -> None:
        self._batch, self._slots, self._target, self._most = batch_size, slots, target, most
        self._asked = self._observed = 0
        self._largest = batch_size
        self._items = self._seconds = 0.0  # lately: what is older counts less
        self._longest = self._total = 0.0
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._stopped = False

    def observe(self, items: int, seconds: float) -> None:
        """A worker took ``seconds`` for a chunk of ``items``."""
        with self._lock:
            self._observed += 1
            self._items = _MEMORY * self._items + items
            self._seconds = _MEMORY * self._seconds + max(seconds, 1e-4)
            self._longest = max(self._longest, seconds)
            self._total += seconds
            self._changed.notify_all()

    def dropped(self, chunks: int) -> None:
        """So many chunks held nothing new: no worker is going to measure them, and nobody is to wait for that."""
        with self._lock:
            self._asked -= chunks
            self._changed.notify_all()

    def stop(self) -> None:
        """Let a waiting planner go."""
        with self._lock:
            self._stopped = True
            self._changed.notify_all()

    def seconds(self, items: int) -> float:
        """Seconds that a chunk of this many items should take; infinity if unknown."""
        with self._lock:
            return items * self._seconds / self._items if self._items else float("inf")

    def __call__(self) -> ChunkLimit:
        """After the first chunks, waits until something has been measured, or for :data:`PATIENCE_SECONDS`: if every
        worker is lost, nothing ever is, and chunks keep their first size, one at a time.
        """
        with self._lock:
            self._asked += 1
            if self._asked <= FIRST_CHUNKS_PER_SLOT * self._slots:
                return ChunkLimit(self._batch, MAX_BYTES)
            self._changed.wait_for(self._may_go_on, PATIENCE_SECONDS)
            wanted = int(self._items / self._seconds * self._target) if self._seconds else 0
            items = max(min(wanted, self._largest * GROWTH, self._most), self._batch)
            items -= items % self._batch
            self._largest = max(self._largest, items)
            seconds = self._seconds / self._items if self._items else math.inf
            return ChunkLimit(items, MAX_BYTES, seconds, self._slots)

    def _may_go_on(self) -> bool:
        if self._stopped or self._asked <= FIRST_CHUNKS_PER_SLOT * self._slots:
            return True
        trusted = self._longest >= self._target / 2 or self._total >= 2 * self._target * self._slots
        return bool(self._observed) and (trusted or self._asked - self._observed <= OPEN_CHUNKS_PER_SLOT * self._slots)


class Planner(threading.Thread):
    """Makes the source ready, lists it, and hands over chunks.

    selection: of its items. planned: there is nothing left to list. prepared: called once the source is ready.
    deliver: called in this thread with each new chunk, at most ``ahead`` of them before :meth:`taken` says
        that the earlier ones are stored: memory stays flat however fast the listing is.
    ended: called once, with None or the error that stopped planning.
    """

    def __init__(
        self,
        source: Source,
        *,
        after: str | None,
        first: int,
        planned: bool,
        sizer: ChunkSizer,
        prepared: Callable[[], None],
        deliver: Callable[[Chunk], None],
        ended: Callable[[Exception | None], None],
        ahead: int = 16,
        selection: Selection | None = None,
    ) -> None:
        super().__init__(name="tally-planner", daemon=True)
        self._source, self._after, self._first, self._sizer = source, after, first, sizer
        self._selection = selection or Selection()
        self._planned, self._prepared, self._deliver, self._ended = planned, prepared, deliver, ended
        self._room = threading.Semaphore(ahead)
        self._stopping = threading.Event()

    def taken(self, count: int) -> None:
        """``count`` delivered chunks are stored."""
        if count:
            self._room.release(count)

    def stop(self) -> None:
        """Stop soon; nothing more is delivered."""
        self._stopping.set()
        self._sizer.stop()
        self._room.release()

    def run(self) -> None:
        try:
            self._source.prepare()
            self._prepared()
            if self._planned:
                return
            given = self._after, self._first, self._sizer
            chosen = self._selection.plan(self._source, *given) if self._selection else self._source.plan(*given)
            for chunk in chosen:
                self._room.acquire()
                if self._stopping.is_set():
                    return
                self._deliver(chunk)
        except TallyError as error:
            self._ended(error)
        except Exception as error:  # of a source that an installed package brought, say
            failure = JobError(f"listing the source failed: {error_line(error)}")
            failure.__cause__ = error
            self._ended(failure)
        else:
            self._ended(None)
