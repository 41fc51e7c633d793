"""The source contract: where items come from.

A source enumerates items in a stable order, cut into chunks, in the coordinator; and reads one chunk in
a worker. The object itself is small and picklable: it travels to the workers.

An endless source (``bounded = False``), such as a queue, never runs out of items. For it, this holds too:

- :meth:`Source.plan` waits for messages, and returns soon after :meth:`Source.close` was called.
- A message is acknowledged after its chunk is committed, never before, so that a crash loses none.
- After a crash the broker delivers again what was not acknowledged, and the source plans it again. Messages are known
  by their keys, which the job keeps: the coordinator drops what was planned before, and has it acknowledged if it is
  done. So a source acknowledges by key, whatever chunk the key came in: every delivery of it that it has in hand.
- While a key is in hand, another message with the same key is not planned.
- A chunk's payload holds the messages themselves: workers cannot ask the broker for them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

from tally.errors import ItemError
from tally.models.reference import ModelRef
from tally.scorers.base import Input, Scorer

Unit: TypeAlias = Literal["items", "frames", "rows"]
Media: TypeAlias = Literal["image", "video", "table", "archive"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of items: the unit of execution, retry and commit.

    first: ordinal of its first item in the source's order (0 is the job's first item).
    count: number of items.
    payload: JSON-able; all that the source needs to read these items again, on any machine, and to tell whether they
        are what they were when they were planned (see :meth:`tally.storage.Store.marked`).
    cursor: hand it to :meth:`Source.plan` to go on after this chunk.
    """

    first: int
    count: int
    payload: dict[str, Any]
    cursor: str = ""


@dataclass(frozen=True, slots=True)
class ChunkLimit:
    """The most that the next chunk may hold. ``items`` is a multiple of the scorer's batch size.

    seconds: how long a worker takes for one item, lately; infinity if that is not known. slots: how many workers share
    the job.
    """

    items: int
    bytes: int
    seconds: float = math.inf
    slots: int = 1


@dataclass(slots=True)
class Batch:
    """The items that the scorer is given at once.

    Batches are windows over the chunk's positions ``start <= p < stop``, never topped up from the next
    window: the same items always meet in the same batch, whatever failed before them.

    keys, values: of the items that could be read, in order; values are the outcome of ``Scorer.prepare``.
    positions: position inside the chunk of each of them.
    info: for each of them, columns that the source adds to its rows (a frame's number and time); None if there
        are none.
    Of tables, keys are a ``pyarrow.Array`` of strings, values and info a ``pyarrow.Table``, positions an array
    ``int64[n]``: each has one row for each item.
    dead: position and error of each item that could not.
    """

    start: int
    stop: int
    keys: Any = field(default_factory=list)
    values: Any = field(default_factory=list)
    positions: Any = field(default_factory=list)
    info: Any = None
    dead: list[tuple[int, ItemError]] = field(default_factory=list)


STAGES = ("read", "decode", "score", "write")
"""What a worker spends its time on."""


@dataclass(slots=True)
class Timings:
    """Seconds spent per stage, summed over threads; each stage adds its own."""

    read: float = 0.0
    decode: float = 0.0
    score: float = 0.0
    write: float = 0.0

    def as_dict(self) -> dict[str, float]:
        return {stage: getattr(self, stage) for stage in STAGES}


class Source(ABC):
    """Enumerates items with stable keys, and reads them.

    accepts: the inputs of scorers (see :data:`tally.scorers.base.Input`) that it can serve.
    unit: what people call its items.
    media: what a job records of it, so that it stays what it was taken for; None where that cannot change.
    bounded: False for a source without an end; see the module.
    chunk_seconds: how long a worker should take for one chunk. chunk_items: how many items one may hold.
    """

    accepts: ClassVar[frozenset[Input]] = frozenset()
    unit: ClassVar[Unit] = "items"
    media: ClassVar[Media | None] = None
    bounded: ClassVar[bool] = True
    chunk_seconds: ClassVar[float] = 2.0
    chunk_items: ClassVar[int] = 8192

    @property
    def columns(self) -> Mapping[str, str]:
        """What ``Batch.info`` holds: column name to Arrow type name, in order."""
        return {}

    @property
    def order(self) -> str | None:
        """The one of :attr:`columns` that holds each row's position in the source, if items are planned in another
        order. A merged result is sorted by it; it is not written."""
        return None

    def several(self) -> bool:
        """Whether it holds more than one file, such as more than one video. True unless the source knows better."""
        return True

    def located(self, work: str | None) -> Source:
        """The same source, with a place for its work files.

        work: path or URL of a folder that belongs to the job; None if the output has no such folder. Raises SpecError
        if the source cannot do without.
        """
        return self

    def prepare(self) -> None:  # noqa: B027  # most sources have nothing to make ready
        """Make what :meth:`plan` and :meth:`read` need.

        Called in the coordinator before either, each time a job is started, resumed or replayed. It may take long, and
        the job may be killed meanwhile.
        """

    @abstractmethod
    def plan(self, after: str | None, first: int, limit: Callable[[], ChunkLimit]) -> Iterator[Chunk]:
        """Yield the chunks that follow the cursor ``after`` (None: from the start), listing lazily.

        first: the ordinal of the next item. limit: asked anew before each chunk.
        The order is the same in every call, so that planning goes on where a crash cut it.
        Raises SourceNotFoundError when there is nothing at all to score.
        """

    def indivisible(self) -> str | None:
        """Why the source cannot be shared out among several coordinators, in words that follow "and"; None if it can.

        Each of them plans a part: by :meth:`between` where there are :meth:`cuts`, else all of it, from which it keeps
        a share (:class:`tally.sources.selection.Selection`).
        """
        return None if self.bounded else "the source has no end"

    def cuts(self, count: int) -> list[str] | None:
        """At most ``count - 1`` names, ascending, between which there is about the same to do; see :meth:`between`.

        None: what lies between two names cannot be planned alone.
        """
        return None

    def between(self, after: str | None, until: str | None) -> Source:
        """The same source without the names up to ``after``, and those beyond ``until``. It may hold nothing."""
        raise NotImplementedError

    @abstractmethod
    def read(self, chunk: Chunk, scorer: Scorer, timings: Timings) -> Iterator[Batch]:
        """Read, decode and prepare the chunk's items, in order, ahead of the consumer.

        Closing the iterator stops the threads that work ahead.
        What has changed since it was planned is never scored: such items are dead, or, if the chunk cannot be told
        apart from its neighbours, SourceChangedError is raised. That is also raised if something changes after items
        were handed out: then nothing of this attempt counts, and the chunk is read again.
        """

    def ahead(self, batch_size: int) -> int:
        """The most items beyond the current batch that :meth:`read` may be working on."""
        return 0

    @abstractmethod
    def keys(self, chunk: Chunk) -> Sequence[str]:
        """The keys of the chunk's items, in order."""

    @abstractmethod
    def slice(self, chunk: Chunk, start: int, stop: int) -> Chunk:
        """The part of the chunk at positions ``start <= p < stop``."""

    def choose(self, chunk: Chunk, positions: Sequence[int]) -> list[Chunk]:
        """The items at these positions, ascending and at least one, in few chunks; all have the chunk's cursor.

        Ordinals are those that the items have in the chunk.
        """
        starts = [n for n, each in enumerate(positions) if n == 0 or each != positions[n - 1] + 1]
        stops = [*starts[1:], len(positions)]
        return [
            self.slice(chunk, positions[start], positions[stop - 1] + 1)
            for start, stop in zip(starts, stops, strict=True)
        ]

    def alone(self, chunk: Chunk, position: int, key: str) -> Chunk:
        """One item, which is dead, by its position and its key.

        It holds what it takes to replay the item when the job has ended and its work files are gone.
        """
        return self.slice(chunk, position, position + 1)

    def combine(self, chunks: Sequence[Chunk]) -> list[Chunk]:
        """Dead items, each as :meth:`alone` gave it, in fewer chunks, if possible, for replaying them.

        The source may have been mended. Raises StorageError if they cannot be told any more.
        """
        return list(chunks)

    def unmarked(self, chunk: Chunk) -> Chunk:
        """The same items, whatever they are by now, for a replay; the chunk itself where its items keep their mark."""
        return chunk

    def renew(self) -> None:  # noqa: B027
        """All that was planned is done, and dead items are to be replayed: forget what :meth:`prepare` made."""

    def remark(self) -> str | None:
        """After planning: one line that the user should see (files passed over, say)."""
        return None

    def facts(self) -> Mapping[str, Any]:
        """What the manifest says of how the source was read, besides its name; JSON-able. Asked after planning."""
        return {}

    def model(self, chunk: Chunk) -> ModelRef | None:
        """The model that scores the chunk, where its items choose it; None: that of the job."""
        return None

    def info(self, chunk: Chunk) -> Sequence[Mapping[str, Any]] | None:
        """What results and pushed bodies say of each item, also of one that gives no row; None where that is nothing
        but what its rows say. Its names are among :attr:`columns`."""
        return None

    # -- endless sources only ----------------------------------------------------------------------

    def acknowledge(self, chunks: Sequence[Chunk], dead: Mapping[str, str]) -> None:  # noqa: B027
        """The results of these chunks, or parts of chunks, are committed: the broker may forget their messages.

        dead: why items of theirs are dead, by key; their messages belong into the broker's dead-letter queue, if it has
            one.

        Called in the coordinator, maybe from another thread than :meth:`plan`; after a crash, again for the same
        chunks. Keys that are not in hand are passed over.
        """

    def close(self) -> None:  # noqa: B027
        """Make :meth:`plan` return soon, and release connections. Called from any thread; idempotent.

        Messages that are not acknowledged will be delivered again when the job is resumed.
        """
