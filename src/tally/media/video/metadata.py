"""The metadata of a video: read once before it is decoded, and carried in every chunk as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

from tally.errors import ItemError
from tally.storage import name_from_json, name_to_json

_MAX_PIXELS = 2**27

PICTURES = "pictures"
"""The codec of a video that is kept as numbered pictures; its name is their pattern."""


@dataclass(frozen=True, slots=True)
class Colour:
    """How stored numbers become colours, in FFmpeg's numbering (``AVColorRange``, ``AVColorSpace``,
    ``AVColorPrimaries``, ``AVColorTransferCharacteristic``)."""

    range: int = 0
    matrix: int = 2
    primaries: int = 2
    transfer: int = 2


@dataclass(frozen=True, slots=True)
class Video:
    """One video of a source.

    key: path relative to the source's folder; its frames' keys begin with it.
    root, name: ``open_store(root)`` has it under ``name``. size: in bytes, when it was probed. mark: of its content
        then, if the store keeps one (see :meth:`Store.marked`).
    stream: index of the video stream in the container. codec: FFmpeg's name of its codec.
    time_base: seconds per tick. Times are in ticks from ``start``.
    start: the container's clock at its beginning, 0 except in formats whose clock may start anywhere (MPEG-TS).
    rate: nominal frames per second, of the frames that are scored.
    width, height: of the frames that are scored, in pixels, upright.
    matrix: the display matrix (``AV_PKT_DATA_DISPLAYMATRIX``, nine numbers), empty if there is none.
    aspect: the sample aspect ratio of stored pixels, before the frame is turned upright.
    end: until when the last scored frame is shown, in ticks.
    placed: where the whole picture lies in the scored one, upright: left, top, width and height in pixels, beyond its
        edges where it is cut off; empty where it fills it.
    deinterlaced: whether frames that hold the lines of two moments are scored with those of the first alone.
    joints: where recordings follow one another, each with a clock of its own: the ticks to add to the times of each one
        but the first.
    """

    key: str
    root: str
    name: str
    size: int
    stream: int
    codec: str
    time_base: Fraction
    start: int
    rate: Fraction
    width: int
    height: int
    matrix: tuple[int, ...]
    aspect: Fraction
    colour: Colour
    end: int
    mark: str = ""
    joints: tuple[int, ...] = ()
    placed: tuple[int, ...] = ()
    deinterlaced: bool = False

    @property
    def turns(self) -> int:
        """Quarter turns, counter-clockwise, that turn a stored picture upright; mirroring is not undone."""
        if not self.matrix:
            return 0
        a, b = self.matrix[0], self.matrix[1]
        if abs(a) >= abs(b):
            return 0 if a >= 0 else 2
        return 3 if b > 0 else 1

    def scaled(self, size: tuple[int, int], fit: str = "stretch") -> Video:
        """The same video with frames of another size: (width, height); -1 for one of them keeps their shape.

        fit: ``stretch`` keeps the shape on the screen by that of the pixels; ``contain`` (black bars beside) and
        ``cover`` (the rest is cut off) by where the picture lies, with square pixels.
        Raises ItemError if that is more than 128 million pixels.
        """
        width, height = size
        if width < 0:
            width = _even(Fraction(height * self.width, self.height))
        elif height < 0:
            height = _even(Fraction(width * self.height, self.width))
        if width * height > _MAX_PIXELS:
            raise ItemError(f"its frames would be {width}x{height}, more than 128 million pixels", stage="decode")
        if -1 in size or (width, height) == (self.width, self.height):
            return replace(self, width=width, height=height)
        if fit == "stretch":
            stretch = Fraction(self.width, width) / Fraction(self.height, height)
            aspect = self.aspect / stretch if self.turns % 2 else self.aspect * stretch
            return replace(self, width=width, height=height, aspect=aspect)
        shape = Fraction(self.width, self.height) * (1 / self.aspect if self.turns % 2 else self.aspect)
        narrow = shape < Fraction(width, height)
        if narrow == (fit == "contain"):
            inner = max(1, round(height * shape)), height
        else:
            inner = width, max(1, round(width / shape))
        place = (width - inner[0]) // 2, (height - inner[1]) // 2, *inner
        return replace(self, width=width, height=height, aspect=Fraction(1), placed=place)

    def to_json(self) -> dict[str, Any]:
        """As JSON; :meth:`from_json` is its inverse."""
        colour = self.colour
        return {
            "key": self.key,
            "root": self.root,
            "name": name_to_json(self.name),
            "size": self.size,
            "stream": self.stream,
            "codec": self.codec,
            "time_base": _pair(self.time_base),
            "start": self.start,
            "rate": _pair(self.rate),
            "width": self.width,
            "height": self.height,
            "matrix": list(self.matrix),
            "aspect": _pair(self.aspect),
            "colour": [colour.range, colour.matrix, colour.primaries, colour.transfer],
            "end": self.end,
            "mark": self.mark,
            "joints": list(self.joints),
            "placed": list(self.placed),
            "deinterlaced": self.deinterlaced,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Video:
        """The video that :meth:`to_json` described."""
        return cls(
            **{
                **data,
                "name": name_from_json(data["name"]),
                "mark": data["mark"].strip('"'),  # as earlier versions kept it
                "time_base": Fraction(*data["time_base"]),
                "rate": Fraction(*data["rate"]),
                "matrix": tuple(data["matrix"]),
                "aspect": Fraction(*data["aspect"]),
                "colour": Colour(*data["colour"]),
                "joints": tuple(data.get("joints", ())),
                "placed": tuple(data.get("placed", ())),
            }
        )


def _even(side: Fraction) -> int:
    """The even number that is nearest, for codecs that hold no others."""
    return max(2, 2 * round(side / 2))


def _pair(value: Fraction) -> list[int]:
    return [value.numerator, value.denominator]


def pack(numbers: Sequence[int]) -> list[int | list[int]]:
    """Integers that mostly grow by equal steps, run-length encoded: the first, then steps, or ``[step, times]``."""
    packed: list[int | list[int]] = [numbers[0]] if numbers else []
    step, times = 0, 0
    for before, number in pairwise(numbers):
        if times and number - before == step:
            times += 1
            continue
        if times:
            packed.append([step, times] if times > 1 else step)
        step, times = number - before, 1
    if times:
        packed.append([step, times] if times > 1 else step)
    return packed


def unpack(packed: Sequence[int | list[int]]) -> list[int]:
    """The inverse of :func:`pack`."""
    numbers: list[int] = []
    for each in packed:
        if not numbers:
            assert isinstance(each, int)
            numbers.append(each)
            continue
        step, times = each if isinstance(each, list) else (each, 1)
        for _ in range(times):
            numbers.append(numbers[-1] + step)
    return numbers
