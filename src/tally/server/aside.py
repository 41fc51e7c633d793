"""What takes long or may go wrong, in a process beside the server's: bounded in time, and no page waits for it.

That process has no database and no key of the server.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import TimeoutError as LateError
from multiprocessing.context import SpawnContext
from typing import Any, TypeVar

from pebble import ProcessExpired, ProcessPool

from tally.engines.spawn import Process
from tally.errors import SpecError, StorageError
from tally.server.room import Room, busy

PROCESSES = 2
CALLS = 32
"""Calls that are carried out or wait, at most."""
WAIT_SECONDS = 20.0
"""For which a call waits for a process, at most."""

Answer = TypeVar("Answer")


class _Context(SpawnContext):
    Process = Process


class Aside:
    """Calls functions in other processes. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._room = Room(CALLS)
        self._pool: Any = None

    def call(self, function: Callable[..., Answer], *args: Any, seconds: float, what: str) -> Answer:
        """What the function returns or raises. what: is being done, for messages.

        Raises SpecError where it takes longer, StorageError where its process ends, RefusedError (503) where too much
        is being done already.
        """
        with self._room.place(what):
            return self._call(function, args, seconds, what)

    def _call(self, function: Callable[..., Answer], args: tuple[Any, ...], seconds: float, what: str) -> Answer:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPool(max_workers=PROCESSES, context=_Context())
            pool = self._pool
        future = pool.schedule(function, args=args, timeout=seconds)
        try:
            answer: Answer = future.result(timeout=WAIT_SECONDS + seconds)
        except LateError:
            if not future.done():
                future.cancel()
                raise busy(what) from None
            raise SpecError(f"{what} was stopped after {seconds:g} s", hint="Ask for less.") from None
        except ProcessExpired:
            raise StorageError(f"the process for {what} has ended", hint="Ask for less.") from None
        return answer

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
