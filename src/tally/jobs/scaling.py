"""How many workers a job should have: pure decisions, no engine."""

from __future__ import annotations

CHUNKS_PER_SLOT = 2
"""Chunks for each slot: the next one waits while the first is scored. Where slots may be added, one is added for
each so many waiting chunks."""
SHRINK_SECONDS = 10.0
"""Seconds of idleness before scaling down to what there is to do."""
IDLE_SECONDS = 60.0
"""Seconds without any work before all slots are given back."""


class Scaler:
    """Adds slots at once, removes them after a while, and removes all when there is nothing to do for long.

    least, most: slots. Where they are equal, nothing is ever changed.
    """

    def __init__(self, least: int, most: int) -> None:
        self.least, self.most = least, most
        self._shrinks_since: float | None = None
        self._idle_since: float | None = None

    def target(self, now: float, *, slots: int, busy: int, open_chunks: int, running: bool) -> int | None:
        """The number of slots to change to, or None to leave them.

        now: seconds of a clock that only goes forward. busy: slots that have a task. open_chunks: planned and not
        done. running: whether chunks are handed out at all (the job is not paused).
        """
        if self.least == self.most:
            return None
        if open_chunks and running:
            self._idle_since = None
            return self._for_work(now, slots, busy, open_chunks)
        self._shrinks_since = None
        if busy or not slots:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        if self._idle_since is not None and now - self._idle_since >= IDLE_SECONDS:
            self._idle_since = None
            return 0
        return None

    def _for_work(self, now: float, slots: int, busy: int, open_chunks: int) -> int | None:
        wanted = max(1, self.least, min(self.most, -(-open_chunks // CHUNKS_PER_SLOT)))
        if wanted < slots and busy < slots:
            if self._shrinks_since is None:
                self._shrinks_since = now
            if now - self._shrinks_since < SHRINK_SECONDS:
                return None
        self._shrinks_since = None
        return wanted if wanted > slots or (wanted < slots and busy < slots) else None
