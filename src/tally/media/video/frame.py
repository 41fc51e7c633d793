"""The metadata of one frame of a video."""

from __future__ import annotations

from typing import Any

from tally.media.video.metadata import Video


class FrameInfo(dict[str, Any]):
    """The columns of a frame, ``video``, ``frame`` and ``time``, and what joining frames to a video needs as well.

    This is what a source of frames puts into ``Batch.info``, and what a sink that writes videos needs there.

    source: its video. number: the frame's, from 0. tick: when it is shown, in ``source.time_base``.
    step: how many frames later the next scored one is: 1 unless frames are skipped on purpose.
    """

    __slots__ = ("source", "step", "tick")

    def __init__(self, source: Video, number: int, tick: int, step: int = 1) -> None:
        super().__init__(video=source.key, frame=number, time=float(tick * source.time_base))
        self.source, self.tick, self.step = source, tick, step

    @property
    def number(self) -> int:
        """The frame's number, from 0."""
        return int(self["frame"])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source, self.number, self.tick, self.step)
