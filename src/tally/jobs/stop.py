"""Stops a job that this process drives or follows, at any moment and from any thread."""

from __future__ import annotations

import threading
from typing import Protocol


class Stoppable(Protocol):
    def stop(self, *, now: bool = False) -> None: ...


class Stop:
    """A request to stop. It may come before there is anything to stop: whatever is attached later receives it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._target: Stoppable | None = None
        self._now = False
        self._asked = threading.Event()

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    @property
    def attached(self) -> bool:
        """Whether there is something to stop."""
        return self._target is not None

    def __call__(self, *, now: bool = False) -> None:
        """Let running chunks finish and be saved or, with ``now``, kill them."""
        with self._lock:
            self._now |= now
            self._asked.set()
            if self._target is not None:
                self._target.stop(now=now)

    def attach(self, target: Stoppable) -> None:
        """Pass earlier and later requests to ``target``."""
        with self._lock:
            self._target = target
            if self.asked:
                target.stop(now=self._now)

    def wait(self, seconds: float) -> bool:
        """Wait until a stop is requested, at most so many seconds. Returns whether it was requested."""
        return self._asked.wait(seconds)
