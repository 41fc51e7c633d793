"""How many rows are scored the fastest together.

More in one batch is not always better: on a processor, the intermediate values of a large batch leave its caches (a
MobileNet takes 1.3 times as long for each picture in batches of 16 as alone), while a GPU wants all it can get. So it
is measured, while requests are answered: a size is compared with its half and its double, and the better one kept.
"""

from __future__ import annotations

from collections import deque
from statistics import median

TRIES = 3
"""Batches of a size before it is judged."""
KEPT = 7
"""Batches of each size that are remembered."""
BETTER = 0.97
"""A size takes the place of another if a row takes so much of its time with it, or less."""
SOON, LATE = 16, 1024
"""Batches between two trials: at first, and once they have come to nothing again and again."""


class Pace:
    """Used by the thread that scores. most: rows in one batch."""

    def __init__(self, most: int) -> None:
        self._sizes = [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]
        self._seconds: list[deque[float]] = [deque(maxlen=KEPT) for _ in self._sizes]
        self._best = len(self._sizes) - 1
        self._trial: int | None = None
        self._step = -1
        self._pause, self._since = SOON, 0

    @property
    def rows(self) -> int:
        """How many rows the next batch should have, at most."""
        return self._sizes[self._best if self._trial is None else self._trial]

    def took(self, rows: int, seconds: float) -> None:
        """So many rows have been scored together, in so long."""
        index = max((at for at, size in enumerate(self._sizes) if size <= rows), default=0)
        self._seconds[index].append(seconds / rows)
        self._since += 1
        if self._trial is None:
            if self._since >= self._pause and len(self._seconds[self._best]) >= TRIES:
                self._try()
        elif len(self._seconds[self._trial]) >= TRIES:
            self._judge(self._trial)
        elif self._since > 2 * TRIES:  # too few requests come to fill it
            self._trial, self._since = None, 0

    def _try(self) -> None:
        for step in (self._step, -self._step):
            if 0 <= self._best + step < len(self._sizes):
                self._begin(self._best + step)
                self._step = step
                return

    def _begin(self, trial: int) -> None:
        self._trial, self._since = trial, 0
        self._seconds[trial].clear()  # what was long ago tells nothing of now

    def _judge(self, trial: int) -> None:
        self._trial, self._since = None, 0
        if median(self._seconds[trial]) > BETTER * median(self._seconds[self._best]):
            self._pause, self._step = min(2 * self._pause, LATE), -self._step
            return
        self._best, self._pause = trial, SOON
        if 0 <= trial + self._step < len(self._sizes):  # further, the same way
            self._begin(trial + self._step)
