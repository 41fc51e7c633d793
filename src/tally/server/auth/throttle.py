"""Slows down who guesses keys."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

FREE_FAILURES = 5
"""Failures of one address that cost nothing: people mistype."""
_LONGEST = 300.0
_REMEMBERED = 10_000
"""Addresses, at most: a botnet does not fill the memory."""


@dataclass(slots=True)
class _Failures:
    count: int = 0
    until: float = 0.0


class Throttle:
    """Counts failures by address. After the first few, each doubles the time in which the address is refused."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def wait(self, address: str) -> float:
        """Seconds for which the address is refused; 0 if it may try."""
        with self._lock:
            found = self._failures.get(address)
            return 0.0 if found is None else max(0.0, found.until - self._clock())

    def failed(self, address: str) -> None:
        """The address has shown a wrong key."""
        with self._lock:
            found = self._failures.setdefault(address, _Failures())
            self._failures.move_to_end(address)
            found.count += 1
            if found.count > FREE_FAILURES:
                found.until = self._clock() + min(2.0 ** (found.count - FREE_FAILURES), _LONGEST)
            while len(self._failures) > _REMEMBERED:
                self._failures.popitem(last=False)

    def succeeded(self, address: str) -> None:
        """The address has shown a valid key: what was before is forgotten."""
        with self._lock:
            self._failures.pop(address, None)
