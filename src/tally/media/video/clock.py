"""The clock of one stream of a container, which begins anew where recordings follow one another in one file."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from av.packet import Packet

_BACK_SECONDS = 0.1
"""By how much a clock that begins anew is set back at least; less is rounding."""


class Clock:
    """Counts how often a stream's clock is set back. tick: seconds. part: the count so far."""

    def __init__(self, time_base: Fraction) -> None:
        self.tick = float(time_base)
        self.part = 0
        self._last: int | None = None
        self._before: int | None = None

    def is_set_back(self, packet: Packet[Any]) -> bool:
        """Whether it is set back at this packet. Call it once for each, in the order of decoding."""
        if packet.dts is None:
            return False
        back = self._last is not None and (self._last - packet.dts) * self.tick > _BACK_SECONDS
        if back and self._before is not None and packet.dts > self._before:
            back = False  # the time before this one was wrong
        self.part += back
        self._before, self._last = None if back else self._last, packet.dts
        return back
