"""Pictures of eight drawn shapes. Each depends on the seed, its shape and its number alone, so that a larger collection
begins with the smaller one."""

from __future__ import annotations

import csv
import io
import math
import random
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]


def _around(corners: int, radii: tuple[float, ...] = (1.0,)) -> list[Point]:
    """Corners at equal angles around the origin, their distances repeating ``radii``."""
    return [
        (radii[i % len(radii)] * math.sin(angle), -radii[i % len(radii)] * math.cos(angle))
        for i, angle in enumerate(2 * math.pi * i / corners for i in range(corners))
    ]


_CROSS: list[Point] = [
    (-0.3, -1), (0.3, -1), (0.3, -0.3), (1, -0.3), (1, 0.3), (0.3, 0.3),
    (0.3, 1), (-0.3, 1), (-0.3, 0.3), (-1, 0.3), (-1, -0.3), (-0.3, -0.3),
]  # fmt: skip
_ARROW: list[Point] = [
    (0, -1), (0.75, -0.1), (0.27, -0.1), (0.27, 1), (-0.27, 1), (-0.27, -0.1), (-0.75, -0.1),
]  # fmt: skip

# Outer outline, then holes; upright and within the unit circle, or nearly.
SHAPES: dict[str, list[list[Point]]] = {
    "arrow": [_ARROW],
    "circle": [_around(72)],
    "cross": [_CROSS],
    "hexagon": [_around(6)],
    "ring": [_around(72), _around(72, (0.55,))],
    "square": [_around(4)],
    "star": [_around(10, (1.0, 0.42))],
    "triangle": [_around(3)],
}

_SUPERSAMPLING = 3  # ImageDraw has no antialiasing
_LUMA = (0.299, 0.587, 0.114)
_LEAST_CONTRAST = 60  # of 255, between the shape's luma and each of the background's
_ORIENTATION_TAG = 0x0112

# What a camera held that way would have stored: undone by the orientation of the EXIF header.
_STORED_AS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def _luma(colour: Colour) -> float:
    return sum(weight * channel for weight, channel in zip(_LUMA, colour, strict=True))


def _colour(rng: random.Random) -> Colour:
    return (rng.randrange(256), rng.randrange(256), rng.randrange(256))


def _colours(rng: random.Random) -> tuple[Colour, Colour, Colour]:
    """Two colours for the background, and one for the shape that can be told from both."""
    while True:
        first, second, shape = _colour(rng), _colour(rng), _colour(rng)
        if min(abs(_luma(shape) - _luma(first)), abs(_luma(shape) - _luma(second))) >= _LEAST_CONTRAST:
            return first, second, shape


def _noise(rng: random.Random, size: tuple[int, int], grain: int) -> Image.Image:
    """Random greys ``L`` in blots of about ``grain`` pixels."""
    width, height = max(2, size[0] // grain), max(2, size[1] // grain)
    return Image.frombytes("L", (width, height), rng.randbytes(width * height)).resize(size)


def _background(rng: random.Random, size: tuple[int, int], first: Colour, second: Colour) -> Image.Image:
    """A flat, graded, blotted or lined field between two colours."""
    flat = Image.new("RGB", size, first)
    kind = rng.choice(("flat", "gradient", "blots", "lines"))
    if kind == "gradient":
        ramp = Image.linear_gradient("L").rotate(rng.uniform(0, 360), Image.Resampling.BILINEAR, expand=True)
        edge = ramp.width // 4  # rotating leaves black corners
        ramp = ramp.crop((edge, edge, ramp.width - edge, ramp.height - edge))
        return Image.composite(Image.new("RGB", size, second), flat, ramp.resize(size))
    if kind == "blots":
        return Image.composite(Image.new("RGB", size, second), flat, _noise(rng, size, rng.randint(4, 40)))
    if kind == "lines":
        draw = ImageDraw.Draw(flat)
        for _ in range(rng.randint(3, 12)):
            ends = [(rng.uniform(0, size[0]), rng.uniform(0, size[1])) for _ in range(2)]
            draw.line(ends, fill=second, width=max(1, round(min(size) * rng.uniform(0.004, 0.02))))
    return flat


def _mask(rng: random.Random, shape: str, size: tuple[int, int]) -> Image.Image:
    """Where the shape is, ``L``: of random size, turned, a little slanted, wholly inside the picture."""
    radius = min(size) * rng.uniform(0.2, 0.42)
    angle, slant, stretch = rng.uniform(0, 2 * math.pi), rng.uniform(-0.1, 0.1), rng.uniform(0.92, 1.08)
    reach = radius * 1.05 * max(stretch, 1 / stretch) * (1 + abs(slant))
    centre = [rng.uniform(min(reach, s / 2), max(s - reach, s / 2)) for s in size]
    cos, sin = radius * math.cos(angle), radius * math.sin(angle)

    def place(point: Point) -> Point:
        x, y = (point[0] + slant * point[1]) * stretch, point[1] / stretch
        return (
            (centre[0] + cos * x - sin * y) * _SUPERSAMPLING,
            (centre[1] + sin * x + cos * y) * _SUPERSAMPLING,
        )

    mask = Image.new("L", (size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for outline, fill in zip(SHAPES[shape], (255, 0), strict=False):
        draw.polygon([place(point) for point in outline], fill=fill)
    return mask.reduce(_SUPERSAMPLING)


def draw_picture(shape: str, number: int, seed: int) -> bytes:
    """One picture of a shape as a JPEG file's content, 96 to 640 pixels wide when upright.

    One in six carries an EXIF orientation other than 1.
    """
    rng = random.Random(f"{seed}/{shape}/{number}")  # noqa: S311
    width = rng.randint(96, 640)
    size = (width, round(width * rng.uniform(0.75, 1.33)))
    first, second, colour = _colours(rng)
    picture = _background(rng, size, first, second)
    picture.paste(colour, mask=_mask(rng, shape, size))
    if rng.random() < 0.5:
        grey = Image.merge("RGB", [_noise(rng, size, rng.randint(1, 3))] * 3)
        picture = Image.blend(picture, grey, rng.uniform(0.02, 0.15))
    exif = Image.Exif()
    if rng.random() < 1 / 6:
        orientation = rng.choice(sorted(_STORED_AS))
        picture = picture.transpose(_STORED_AS[orientation])
        exif[_ORIENTATION_TAG] = orientation
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=rng.randint(60, 95), exif=exif)
    return content.getvalue()


def pictures(count: int) -> Iterator[tuple[str, int]]:
    """Shape and number of each picture of a collection, the shapes in turn, numbers from 1."""
    names = sorted(SHAPES)
    for i in range(count):
        yield names[i % len(names)], i // len(names) + 1


def draw(out: Path, count: int, seed: int, labels: Path | None = None) -> None:
    """Write ``out/<shape>-0001.jpg`` and so on, the shapes in turn; labels: a CSV file for ``key,label``."""
    out.mkdir(parents=True, exist_ok=True)
    truth = []
    for shape, number in pictures(count):
        name = f"{shape}-{number:04d}.jpg"
        (out / name).write_bytes(draw_picture(shape, number, seed))
        truth.append((name, shape))
    if labels:
        labels.parent.mkdir(parents=True, exist_ok=True)
        with labels.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([("key", "label"), *truth])
