"""Takes each message of an endless source once, and acknowledges it when its outcome is committed.

A queue delivers again what was not acknowledged: after a crash, say, or when a connection was cut. Messages are known
by their keys. One that is planned already is dropped, as its chunk is in the store; one that is done already is
acknowledged at once, as only its acknowledgement was lost.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tally.database.waiting import Patience
from tally.errors import TallyError, error_line
from tally.jobs.events import Events
from tally.jobs.store import JobStore
from tally.sources.base import Chunk, Source

AGAIN_SECONDS = 1.0
"""Seconds until an acknowledgement that failed is tried again."""


class Intake:
    """Takes and acknowledges the messages of one job. Used only by the coordinator's thread."""

    def __init__(self, store: JobStore, job_id: str, source: Source, patience: Patience, events: Events) -> None:
        self._store, self._job, self._source = store, job_id, source
        self._patience, self._events = patience, events
        self._unacknowledged: list[Chunk] = []
        self._dead: dict[str, str] = {}
        self._again_at = 0.0
        self._failed = False

    def admit(self, delivered: Sequence[Chunk], first: int) -> tuple[list[Chunk], list[list[str]]]:
        """The chunks that hold what is new, numbered on from ``first``, and the keys of each."""
        keys = [list(self._source.keys(chunk)) for chunk in delivered]
        asked = [key for each in keys for key in each]
        known = self._patience(lambda: self._store.known_keys(self._job, asked)) if asked else {}
        chunks: list[Chunk] = []
        received: list[list[str]] = []
        seen: set[str] = set()
        done: list[Chunk] = []
        for chunk, names in zip(delivered, keys, strict=True):
            done += self._cut(chunk, [known.get(name) == "done" for name in names])
            new: list[bool] = []
            for name in names:
                new.append(name not in known and name not in seen)
                seen.add(name)
            for start, stop in _runs(new):
                part = self._source.slice(chunk, start, stop) if stop - start < chunk.count else chunk
                chunks.append(replace(part, first=first))
                received.append(names[start:stop])
                first += stop - start
        again = [name for name in asked if known.get(name) == "done"]
        self.acknowledge(done, self._patience(lambda: self._store.reasons(self._job, again)) if again else {})
        return chunks, received

    def acknowledge(self, chunks: Sequence[Chunk], dead: Mapping[str, str]) -> None:
        """Acknowledge what is committed; what fails is left to :meth:`acknowledge_again`.

        dead: why items of these chunks are dead, by key.
        """
        self._unacknowledged += chunks
        self._dead |= dead
        self.acknowledge_again()

    def acknowledge_again(self) -> None:
        """Acknowledge what could not be, if it is time. To be called now and then: nothing else may come meanwhile."""
        if not self._unacknowledged or (self._failed and time.monotonic() < self._again_at):
            return
        try:
            self._source.acknowledge(self._unacknowledged, self._dead)
        except Exception as error:  # the results are safe; the message would come again, and be known
            self._again_at = time.monotonic() + AGAIN_SECONDS
            if not self._failed:
                told = error.message if isinstance(error, TallyError) else error_line(error)
                self._events.waiting(f"what is done cannot be acknowledged: {told}; it is tried again")
            self._failed = True
        else:
            self._unacknowledged, self._dead = [], {}
            if self._failed:
                self._events.waiting("acknowledgements are accepted again")
            self._failed = False

    def _cut(self, chunk: Chunk, chosen: Sequence[bool]) -> Iterator[Chunk]:
        for start, stop in _runs(chosen):
            yield self._source.slice(chunk, start, stop)


def _runs(chosen: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Half-open ranges of positions that are chosen one after the other."""
    start: int | None = None
    for position, each in enumerate([*chosen, False]):
        if each and start is None:
            start = position
        elif not each and start is not None:
            yield start, position
            start = None
