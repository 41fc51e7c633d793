"""Waiting while the database is away: it is restarted, fails over, or has no connection to spare."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from tally.errors import DatabaseAwayError

log = logging.getLogger("tally")

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two tries: they grow, and are random, so that not everybody comes back at once."""


class Patience:
    """Repeats calls while the database is away. Thread-safe.

    say: gets one line when the database goes away (``what`` waits), and one when it is back.
    """

    def __init__(self, say: Callable[[str], None] = log.warning, *, what: str = "the job") -> None:
        self._say, self._what = say, what
        self._lock = threading.Lock()
        self._away = False
        self._until: float | None = None

    def give_up(self, after: float) -> None:
        """Stop waiting ``after`` seconds from now. May be called from a signal handler."""
        until = time.monotonic() + after
        self._until = until if self._until is None else min(self._until, until)

    def __call__(self, call: Callable[[], T]) -> T:
        """Call, repeatedly while the database is away, and return the result.

        The call must be repeatable: it may have been carried out although its answer was lost.
        Raises DatabaseAwayError only after :meth:`give_up`.
        """
        tries = 0
        while True:
            try:
                result = call()
            except DatabaseAwayError as error:
                self.wait(error, tries)
                tries += 1
            else:
                self.is_back()
                return result

    def is_away(self, error: DatabaseAwayError) -> None:
        """Note that the database is away; says so once."""
        with self._lock:
            said, self._away = self._away, True
        if not said:
            self._say(f"the database is away ({error.reason}); {self._what} waits")

    def is_back(self) -> None:
        """Note that the database has answered; says so once if it was away."""
        if self._away:
            with self._lock:
                was_away, self._away = self._away, False
            if was_away:
                self._say("the database is back")

    def wait(self, error: DatabaseAwayError, tries: int) -> None:
        """Wait before the next try; ``tries``: how many there were so far. Raises ``error`` to give up."""
        self.is_away(error)
        until = time.monotonic() + pause(tries)
        while (now := time.monotonic()) < until:
            if self._until is not None and now >= self._until:
                raise error
            # In small steps: a signal handler, which may call give_up, must not touch a lock or an event.
            time.sleep(min(0.1, until - now))


def pause(tries: int) -> float:
    """Seconds to wait after ``tries`` tries in a row."""
    return float(min(FIRST_PAUSE * 2.0 ** min(tries, 30), LONGEST_PAUSE) * random.uniform(0.5, 1.0))  # noqa: S311
