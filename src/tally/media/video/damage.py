"""Which decoded pictures are whole.

A decoder says which pictures it had to guess at, but not which others it made from them. Those are found by the order
of decoding: whatever follows a damaged picture may depend on it, up to an intact keyframe that is shown before it.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from tally.errors import ItemError
from tally.media.video.probe import Key, is_shown

if TYPE_CHECKING:
    from av.packet import Packet
    from av.video.frame import VideoFrame

STRICT = {"h264": "aggressive", "hevc": "explode", "mjpeg": "explode"}
"""Codecs whose decoders see more of the damage with an option (``err_detect``) that no intact stream suffers from. With
``explode``, MPEG-4 decoders refuse intact streams."""

_MOST_AHEAD = 16
"""No codec shows a picture later than this many others that are decoded after it."""
_RECOVERING = frozenset({"h264"})
"""Codecs whose decoder gives nothing until its pictures are whole, wherever it begins."""
_PREDICTED = frozenset({2, 3, 4})
"""Pictures that are made from others (``AVPictureType``: P, B, S)."""


class Judged(NamedTuple):
    """A picture, the position of its packet, and why it is not to be used, if it is not."""

    position: int
    frame: VideoFrame
    error: ItemError | None


class Judge:
    """Tells the pictures that can be trusted. Tell it of all packets from a keyframe on, in the order of decoding.

    damaged: positions of packets that are known to be damaged before they are decoded.
    """

    def __init__(self, codec: str, key: Key, damaged: Collection[int]) -> None:
        self._codec, self._key = codec, key
        self._damaged = sorted(damaged)
        self._recovers = codec in _RECOVERING
        # Intact keyframes. Other decoders make pictures of anything: theirs has to be seen first.
        self._intact = [key.packet] if self._recovers else []
        self._keys: set[int] = set()
        self._due: set[int] = set()
        self._held: deque[tuple[int, VideoFrame]] = deque()
        self._interlaced = self._begun = False

    def given(self, position: int, packet: Packet[Any]) -> None:
        """The packet is about to be decoded."""
        shown = is_shown(self._codec, packet)
        if packet.is_keyframe and shown:
            self._keys.add(position)
        elif packet.is_keyframe:
            insort(self._intact, position)  # nobody will see it
        # Pictures that are shown before the keyframe need others before it: no decoder gives them.
        leads = packet.pts is None or (self._key.pts is not None and packet.pts < self._key.pts)
        if shown and not leads:
            self._due.add(position)

    def failed(self, position: int) -> None:
        """The packet could not be decoded."""
        self._due.discard(position)
        insort(self._damaged, position)

    def shown(self, position: int, frame: VideoFrame) -> Iterator[Judged]:
        """The decoder gave this picture. Yields the pictures that are judged now, in the same order."""
        if self._recovers and not self._begun:
            self._due = {each for each in self._due if each > position}
        self._begun = True
        self._due.discard(position)
        self._interlaced = bool(frame.interlaced_frame)
        if frame.is_corrupt:
            insort(self._damaged, position)
        self._held.append((position, frame))
        while self._held:
            late = [each for each in self._due if each < self._held[0][0]]
            if late and len(self._held) <= _MOST_AHEAD:
                return
            self._lost(late)
            yield self._judged(*self._held.popleft())

    def end(self) -> Iterator[Judged]:
        """The decoder gave all that it had."""
        for position, frame in self._held:
            self._lost([each for each in self._due if each < position])
            yield self._judged(position, frame)
        self._held.clear()

    def _lost(self, positions: Collection[int]) -> None:
        """No picture came of these. In interlaced streams, two packets may hold one picture."""
        self._due.difference_update(positions)
        if not self._interlaced:
            for position in positions:
                insort(self._damaged, position)

    def _judged(self, position: int, frame: VideoFrame) -> Judged:
        at = bisect_right(self._damaged, position)
        if at and self._damaged[at - 1] == position:
            return Judged(position, frame, _damaged())
        if position in self._keys and frame.pict_type not in _PREDICTED:
            insort(self._intact, position)
            return Judged(position, frame, None)
        since = bisect_right(self._intact, position)
        if not since:
            return Judged(position, frame, _unfounded())
        if at and self._damaged[at - 1] >= self._intact[since - 1]:
            return Judged(position, frame, _dependent())
        return Judged(position, frame, None)


def _damaged() -> ItemError:
    return ItemError("it is damaged: parts of it are missing, or the decoder had to guess at them", stage="decode")


def _dependent() -> ItemError:
    return ItemError(
        "it depends on a damaged picture: one was decoded before it, and no intact keyframe lies between",
        stage="decode",
    )


def _unfounded() -> ItemError:
    return ItemError("it depends on pictures that are missing: no keyframe lies before it", stage="decode")
