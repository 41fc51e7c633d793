"""How many requests may do at once what takes long: those beyond are refused at once.

Each request holds a thread until it is answered. If what takes long could hold all of them, nothing else would be
answered.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tally.errors import RefusedError

THREADS = 80
"""Requests that are carried out at once, at most; all rooms together have fewer places."""
AGAIN_SECONDS = 5.0
"""After how long to ask again where a room is full."""


class Room:
    """So many places. Safe to use from several threads."""

    def __init__(self, places: int) -> None:
        self._places = threading.BoundedSemaphore(places)

    @contextmanager
    def place(self, what: str) -> Iterator[None]:
        """A place, for as long as something is done. what: that is, for messages. Raises RefusedError (503)."""
        if not self._places.acquire(blocking=False):
            raise busy(what)
        try:
            yield
        finally:
            self._places.release()


def busy(what: str) -> RefusedError:
    """Why something is not done now."""
    return RefusedError(
        503, f"the server is busy with others, and {what} would have to wait", hint="Ask again in a moment.",
        retry_after=AGAIN_SECONDS,
    )  # fmt: skip
