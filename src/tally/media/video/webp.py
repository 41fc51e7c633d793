"""Animated WebP, which FFmpeg does not read: its frames as the container lists them, decoded by Pillow.

https://developers.google.com/speed/webp/docs/riff_container
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from io import BytesIO
from typing import Any, NamedTuple

from tally.errors import ItemError
from tally.media.video.promise import Reader

CODEC = "webp"
"""The codec of such a video. That of a still one is the same, and has one frame."""
_FAILURES = (OSError, ValueError, EOFError, SyntaxError, MemoryError)
_HEADER = 8
_TICK = Fraction(1, 1000)
_SHORTEST = 11
_USUAL = 100
"""Milliseconds: a frame of less than the one is shown for the other, as browsers do."""


class Animation(NamedTuple):
    """What the container says. ticks: when each frame begins, in milliseconds; end: when the last one ends.

    cut: why it ends too early; None if it does not. stop: where the last whole chunk ends.
    """

    width: int
    height: int
    ticks: list[int]
    end: int
    cut: str | None
    stop: int

    @property
    def time_base(self) -> Fraction:
        """Seconds per tick."""
        return _TICK


def animation(read: Reader, size: int) -> Animation | None:
    """The frames of an animated WebP; None if it is another file, or a still picture."""
    head = read(0, 30)
    if head[:4] != b"RIFF" or head[8:16] != b"WEBPVP8X" or len(head) < 30 or not head[20] & 2:
        return None
    promised = int.from_bytes(head[4:8], "little") + _HEADER
    at = 12
    ticks, now = [], 0
    while at + _HEADER <= min(size, promised):
        chunk = read(at, _HEADER + 16)
        length = int.from_bytes(chunk[4:8], "little")
        if at + _HEADER + length > size:
            break
        if chunk[:4] == b"ANMF":
            ticks.append(now)
            duration = int.from_bytes(chunk[_HEADER + 12 : _HEADER + 15], "little")
            now += duration if duration >= _SHORTEST else _USUAL
        at += _HEADER + length + length % 2
    cut = f"its header says that it has {promised:,} bytes, and it has {size:,}: it is cut off"
    width, height = (1 + int.from_bytes(head[start : start + 3], "little") for start in (24, 27))
    return Animation(width, height, ticks, now, cut if size < promised else None, min(at, size))


def is_transparent(data: bytes) -> bool:
    """Whether a part of the first frame is transparent."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(BytesIO(_mended(data)), formats=["WEBP"]) as image:
            return bool((np.asarray(image.convert("RGBA"))[:, :, 3] < 255).any())
    except _FAILURES:  # decoding it will say so
        return False


def pictures(data: bytes, last: int) -> Iterator[Any]:
    """The frames up to the number ``last``, each ``uint8[height, width, 3]`` RGB, or the ItemError of one that cannot
    be decoded: then it is the last one."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(BytesIO(_mended(data)), formats=["WEBP"]) as image:
            for number in range(last + 1):
                image.seek(number)
                image.load()
                yield np.array(image.convert("RGB"))
    except _FAILURES as error:
        yield ItemError(f"it cannot be decoded: {error}", stage="decode")


def _mended(data: bytes) -> bytes:
    """The whole frames of a file that is cut off, as a file: the decoder takes no other."""
    found = animation(lambda start, length: data[start : start + length], len(data))
    if found is None or found.cut is None:
        return data
    return data[:4] + (found.stop - _HEADER).to_bytes(4, "little") + data[8 : found.stop]
