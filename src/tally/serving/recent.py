"""How a version has done lately: its rate, how long requests took, how large batches were.

Counted in stretches of a few seconds, in buckets that are 10 % apart, so that it takes little memory and time, and a
latency is told within 5 %. For people; Prometheus has :mod:`tally.serving.metrics`.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

STRETCH_SECONDS = 5.0
STRETCHES = 60
"""How many are kept: five minutes."""
SHARES = (0.5, 0.95, 0.99)
"""The percentiles that are told."""

_GROWTH = 1.1
_BOUNDS = [1e-4 * _GROWTH**power for power in range(150)]
"""Seconds, from 0.1 ms to more than two minutes."""
_SIZES = 18
"""Of batches: 1, 2, up to 4, 8 ... rows."""


@dataclass(slots=True)
class _Stretch:
    number: int
    requests: int = 0
    failed: int = 0
    seconds: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS) + 1))
    rows: int = 0
    sizes: list[int] = field(default_factory=lambda: [0] * _SIZES)


class Recent:
    """Counts what happens. Used in the event loop only."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._stretches: deque[_Stretch] = deque(maxlen=STRETCHES)

    def request(self, seconds: float, status: int) -> None:
        """A request was answered, so long after it had come."""
        now = self._now()
        now.requests += 1
        now.failed += status >= 400
        now.seconds[bisect_left(_BOUNDS, seconds)] += 1

    def batch(self, rows: int) -> None:
        """A batch was scored."""
        now = self._now()
        now.rows += rows
        now.sizes[min(max(rows - 1, 0).bit_length(), _SIZES - 1)] += 1

    def figures(self) -> dict[str, Any]:
        """Of the last five minutes, JSON-able.

        ``rates``: requests per second in each stretch that is over, oldest first; ``per``: seconds of one. ``rate``,
        ``failed`` (requests with an answer of 400 and above), ``seconds``: of all of them, the last as a list of
        :data:`SHARES`, None where there was no request. ``rows``: of a batch, on average. ``sizes``: batches of 1, of
        2, of up to 4, 8 ... rows.
        """
        clock = self._clock()
        number = int(clock / STRETCH_SECONDS)
        first = number - STRETCHES + 1
        kept = [each for each in self._stretches if each.number >= first]
        requests = {each.number: each.requests for each in kept}
        begin = max(self._began, first * STRETCH_SECONDS)
        begun = max(first, int(self._began / STRETCH_SECONDS))
        batches = [sum(each) for each in zip(*(one.sizes for one in kept), strict=True)]
        return {
            "per": STRETCH_SECONDS,
            "rates": [round(requests.get(at, 0) / STRETCH_SECONDS, 3) for at in range(begun, number)],
            "rate": _digits(sum(requests.values()) / max(clock - begin, 1.0)),
            "requests": sum(requests.values()),
            "failed": sum(each.failed for each in kept),
            "seconds": _percentiles(sum(each) for each in zip(*(one.seconds for one in kept), strict=True)),
            "rows": round(sum(each.rows for each in kept) / sum(batches), 2) if any(batches) else None,
            "sizes": batches[: max(at for at, count in enumerate(batches) if count) + 1] if any(batches) else [],
        }

    def _now(self) -> _Stretch:
        number = int(self._clock() / STRETCH_SECONDS)
        if not self._stretches or self._stretches[-1].number != number:
            self._stretches.append(_Stretch(number))
        return self._stretches[-1]


def _percentiles(counts: Iterable[int]) -> list[float] | None:
    """The middle of the bucket in which each share of the requests is reached."""
    found = list(counts)
    total = sum(found)
    if not total:
        return None
    told, reached, at = [], 0, -1
    for share in SHARES:
        while reached < math.ceil(share * total):
            at += 1
            reached += found[at]
        told.append(_digits(_BOUNDS[min(at, len(_BOUNDS) - 1)] / math.sqrt(_GROWTH)))
    return told


def _digits(number: float) -> float:
    """Three that count."""
    return float(f"{number:.3g}")
