"""Draws a scorer's rows onto the pictures that they are about: boxes with captions, or captions alone."""

from __future__ import annotations

import colorsys
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tally.errors import ItemError, SpecError
from tally.scorers.base import Item, Pictured, Result, Results, Row, Scorer
from tally.scorers.vision.around import Around
from tally.scorers.vision.detection.rows import mask_of
from tally.text import storable

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_DRAWABLE = "Drawn are rows with xmin, ymin, xmax and ymax, and rows with a label."
_LABEL_LIMIT = 100  # characters


class Shown(NamedTuple):
    """One picture ``uint8[h, w, 3]`` beside what the inner scorer made of it.

    picture: a copy, as the inner scorer may change what it is given. scale: pixels of this picture per pixel of the
    original, in x and y.
    """

    key: str
    value: Any
    picture: Array
    scale: tuple[float, float]


class Overlay(Around):
    """Gives the picture ``uint8[h, w, 3]`` with the rows of another scorer drawn onto it, and the rows.

    A row with a box (pixels of the original; what lies outside is cut off, a box that is NaN or inverted is
    left out) becomes a frame with ``label`` and ``score`` on a tag: the quadrangle of its ``corners`` where it has
    them, its ``mask`` tinted, its ``keypoints`` dots, as far as ``keypoint_scores`` say that they are there. Other rows
    with a label are listed at the top left, with ``score`` or ``share``. No rows leave the picture as it is; any other
    row makes the item dead.
    The font is Pillow's, which has no accents (left out) and only Latin letters (others are empty squares).
    Raises SpecError for a scorer whose results cannot be drawn.
    """

    output = "image"

    def __init__(self, scorer: Scorer) -> None:
        name = type(scorer).__name__
        if scorer.output == "image":
            raise SpecError(f"overlay: the results of {name} are pictures themselves", hint=_DRAWABLE)
        if scorer.input not in ("image", "frame"):
            raise SpecError(
                f"overlay: {name} takes {scorer.input!r}, so there is no picture to draw on",
                hint="Use a scorer whose input is 'image' or 'frame'.",
            )
        if scorer.columns is not None and not _drawable(scorer.columns):
            raise SpecError(f"overlay: {name} gives only {', '.join(scorer.columns)}", hint=_DRAWABLE)
        super().__init__(scorer)
        self.columns = scorer.columns

    def prepare(self, item: Item) -> Shown:
        height, width = item.value.shape[:2]
        scale = (width / item.info.get("width", width), height / item.info.get("height", height))
        return Shown(item.key, self.scorer.prepare(item), item.value.copy(), scale)

    def score(self, batch: Sequence[Shown]) -> Results:
        results = self.scorer.score([shown.value for shown in batch])
        if not isinstance(results, (Sequence, np.ndarray)) or len(results) != len(batch):
            return results  # for the caller to refuse
        return [_drawn(shown, result) for shown, result in zip(batch, results, strict=True)]

    def describe(self) -> str:
        return f"{self.scorer.describe()}, drawn onto the picture"


def _drawable(row: Mapping[str, Any]) -> bool:
    return "label" in row or all(corner in row for corner in _CORNERS)


def _drawn(shown: Shown, result: Result) -> Pictured | Exception:
    if isinstance(result, Exception):
        return result
    rows = [result] if isinstance(result, Mapping) else result
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) and _drawable(row) for row in rows):
        return ItemError(f"{shown.key}: overlay: the result has neither boxes nor labels", hint=_DRAWABLE)
    try:
        return Pictured(_draw_onto(shown.picture, rows, shown.scale), rows)
    except (TypeError, ValueError) as error:
        return ItemError(f"{shown.key}: overlay: a row cannot be drawn: {error}")


def draw(picture: Array, rows: Sequence[Row], *, scale: tuple[float, float] = (1.0, 1.0)) -> Array:
    """A copy of the picture ``uint8[h, w, 3]`` with the rows drawn onto it; see :class:`Overlay`.

    scale: of the picture against the original that the boxes are about, in x and y.
    """
    return _draw_onto(picture.copy(), rows, scale)


def _draw_onto(canvas: Array, rows: Sequence[Row], scale: tuple[float, float]) -> Array:
    height, width = canvas.shape[:2]
    side = min(height, width)
    line, font_size = max(1, round(side / 280)), max(10, round(side / 42))
    tags: list[tuple[int, int, Array]] = []
    listed = 0  # pixels taken by the captions at the top left
    for row in rows:
        label = row.get("label")
        label = "" if label is None else " ".join(storable(str(label)).split())[:_LABEL_LIMIT]
        tag = _tag(label, row.get("score", row.get("share")), font_size)
        if not all(corner in row for corner in _CORNERS):
            tags.append((0, listed, tag))
            listed += len(tag)
            continue
        box = np.array([row[corner] for corner in _CORNERS], np.float64) * (scale * 2)
        low, high = box[:2], box[2:]
        if not ((low <= high) & (low < (width, height)) & (high > 0)).all():  # NaN, inverted, or all of it outside
            continue
        left, top = np.clip(np.rint(low), 0, (width - 1, height - 1)).astype(int).tolist()
        right, bottom = np.clip(np.rint(high), (left + 1, top + 1), (width, height)).astype(int).tolist()
        if row.get("mask"):
            _tint(canvas, mask_of(row["mask"], round(width / scale[0]), round(height / scale[1])), colour_of(label))
        if row.get("corners") or row.get("keypoints"):
            _draw_points(canvas, row, colour_of(label), line, scale)
        inside = canvas[top:bottom, left:right]
        for edge in () if row.get("corners") else (inside[:line], inside[-line:], inside[:, :line], inside[:, -line:]):
            edge[...] = colour_of(label)
        above = top - len(tag) if top >= len(tag) else top  # inside where there is no room above
        tags.append((max(0, min(left, width - tag.shape[1])), max(0, min(above, height - len(tag))), tag))
    for left, top, tag in reversed(tags):  # over all boxes, and the first row's over the others
        place = canvas[top : top + len(tag), left : left + tag.shape[1]]
        place[...] = tag[: place.shape[0], : place.shape[1]]
    return canvas


def _tint(canvas: Array, mask: Any, colour: tuple[int, int, int]) -> None:
    """Colours a picture where a mask of any size is set."""
    height, width = canvas.shape[:2]
    rows = (np.arange(height) * mask.shape[0] // height)[:, None]
    here = mask[rows, np.arange(width) * mask.shape[1] // width]
    canvas[here] = canvas[here] // 2 + np.array(colour, np.uint8) // 2


_FAINT = 0.5
"""Keypoints that score less are not drawn: they are hidden, or not there."""


def _draw_points(canvas: Array, row: Row, colour: tuple[int, int, int], line: int, scale: tuple[float, float]) -> None:
    """A row's quadrangle and keypoints."""
    image = Image.fromarray(canvas)
    pen = ImageDraw.Draw(image)
    if row.get("corners"):
        corners = np.reshape(row["corners"], (4, 2)) * scale
        pen.polygon([(float(x), float(y)) for x, y in corners], outline=colour, width=line)
    points = np.reshape(row.get("keypoints") or (), (-1, 2)) * scale
    for (x, y), score in zip(points, row.get("keypoint_scores") or [1.0] * len(points), strict=True):
        if score >= _FAINT:
            pen.circle((float(x), float(y)), 2 * line, fill=colour, outline=(255, 255, 255))
    canvas[...] = np.asarray(image)


@lru_cache(maxsize=1024)
def colour_of(label: str) -> tuple[int, int, int]:
    """The label's red, green, blue (0 to 255), the same in every process: one of 18 hues in three shades."""
    bits = zlib.crc32(label.encode())
    saturation, value = ((0.95, 1.0), (0.6, 1.0), (0.95, 0.7))[bits // 18 % 3]
    red, green, blue = colorsys.hsv_to_rgb(bits % 18 / 18, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _tag(label: str, score: Any, font_size: int) -> Array:
    """``label 0.87`` in black or white on the label's colour, ``uint8[h, w, 3]``; no pixels if there is neither."""
    texts = [label] if label else []
    if isinstance(score, Real):
        texts.append(f"{score:.2f}")
    # Drawing text is slow. Scores change with every frame, yet there are but a hundred of them.
    masks = [_mask(text, font_size) for text in texts]
    return _ramp(label)[np.hstack(masks)] if masks else np.empty((0, 0, 3), np.uint8)


@lru_cache(maxsize=512)
def _mask(text: str, font_size: int) -> Array:
    """How much of each pixel the text covers, 0 to 255, ``uint8[h, w]``, with a margin at the left and right."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    font = ImageFont.load_default(size=font_size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    margin = font_size // 5
    ascent, descent = font.getmetrics()
    image = Image.new("L", (round(font.getlength(text)) + 2 * margin, ascent + descent))
    ImageDraw.Draw(image).text((margin, ascent), text, fill=255, font=font, anchor="ls")
    return np.asarray(image)


@lru_cache(maxsize=1024)
def _ramp(label: str) -> Array:
    """``uint8[256, 3]``: from the label's colour to that of the text on it."""
    colour = colour_of(label)
    luminance = np.dot(colour, (0.299, 0.587, 0.114))
    return np.linspace(colour, (0,) * 3 if luminance > 128 else (255,) * 3, 256).round().astype(np.uint8)
