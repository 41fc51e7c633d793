"""What a run has cost so far: seconds, processor seconds of the process and the children that it waited for, memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping

_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in which the system counts the peak of memory."""


class Meter:
    """Measures from its creation on. before: the cost of earlier starts of the run, which is added."""

    def __init__(self, before: Mapping[str, float] | None = None) -> None:
        self._before = dict(before or {})
        self._begun = time.monotonic()
        self._processor = _processor_seconds()

    def cost(self) -> dict[str, float]:
        """``seconds``, ``processor_seconds``, ``peak_bytes`` of this process or, if it is larger, of one child."""
        peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return {
            "seconds": round(self._before.get("seconds", 0) + time.monotonic() - self._begun, 3),
            "processor_seconds": round(
                self._before.get("processor_seconds", 0) + _processor_seconds() - self._processor, 3
            ),
            "peak_bytes": max(int(self._before.get("peak_bytes", 0)), peak * _UNIT),
        }


def _processor_seconds() -> float:
    """Of this process and its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)
