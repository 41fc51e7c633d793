"""The contract of box decoders: from a detector's outputs to boxes on the tensor that the model was given.

Boxes are ``float32[n, 4]``: xmin, ymin, xmax, ymax, in pixels of that tensor, until
:meth:`~tally.scorers.vision.preprocess.Prepared.original` moves them to the original picture. A candidate stands for
its best class. All functions are pure and thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from tally.scorers.vision.preprocess import Array, Size

Dims: TypeAlias = tuple[int | None, ...]
"""A shape, batch axis included; None where it varies. No axes at all where nothing is known of it."""

ANY_CLASSES = -1
"""The shapes do not tell how many classes there are."""


def show(dims: Sequence[int | None]) -> str:
    if not dims:
        return "unknown shape"
    return "[" + ", ".join("any" if n is None else str(n) for n in dims) + "]"


@dataclass(frozen=True, slots=True)
class Output:
    """One output of a model. kind: ``other`` is text. labels: of its scores, where it brings them along."""

    name: str
    dims: Dims
    kind: Literal["float", "integer", "other"] = "float"
    labels: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.name} {show(self.dims)}"


@dataclass(frozen=True, slots=True)
class Given:
    """What is known of a detector beside its values.

    size: of the tensor, in pixels; None where that varies. classes: how many there are, without a background's.
    keypoints: how many points each box has, and how many numbers each point: x, y, and mostly its score.
    anchors: widths and heights in pixels, for each stride from the smallest.
    alone: the model takes one picture, without an axis for several; its outputs are given one of 1.
    """

    size: Size | None
    classes: int | None = None
    keypoints: tuple[int, int] | None = None
    anchors: tuple[tuple[float, ...], ...] | None = None
    alone: bool = False

    @property
    def tensor(self) -> Size:
        """The size, once it is given."""
        assert self.size is not None
        return self.size


class Boxes(NamedTuple):
    """Candidates: ``float32[n, 4]`` in tensor pixels, ``float32[n]``, and ``int64[n]``.

    more: what else belongs to each. ``angle`` ``float32[n]``: the box turned by so many radians around its centre;
    ``keypoints`` ``float32[n, k, 2]`` in tensor pixels, and ``keypoint_scores`` ``float32[n, k]``; ``coefficients``
    ``float32[n, p]`` of the prototypes of its mask. prototypes: ``float32[p, h, w]``, of the whole tensor.
    """

    boxes: Array
    scores: Array
    classes: Array
    more: Mapping[str, Array] = {}
    prototypes: Array | None = None

    def take(self, rows: Array) -> Boxes:
        more = {name: values[rows] for name, values in self.more.items()}
        return Boxes(self.boxes[rows], self.scores[rows], self.classes[rows], more, self.prototypes)


class Match(NamedTuple):
    """Where a decoder may be. outputs: in the order in which it takes them. classes: :data:`ANY_CLASSES`, or how many.
    keypoints: as of :class:`Given`."""

    outputs: tuple[Output, ...]
    classes: int
    keypoints: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Decoder:
    """One form of detectors.

    find: the model's outputs, and what is known → where it may be.
    decode: outputs of one picture, without a batch axis; score threshold → candidates.
    against: the same outputs → what in the values it cannot give, or None.
    unlikely: likewise → what it hardly gives; asked where other forms remain.
    threshold: of scores, where none is said.
    gives: as Ultralytics calls it. words: what the names of outputs usually contain (a regular expression).
    evident: whether these values could have spoken against it; None: any could.
    preprocess: with which its models were trained.
    named: names tell it beyond doubt. first: the number of the first class; before it is the background.
    background: the first column of scores is the background's, which is left out.
    suppressed: the model leaves only one box for each object.
    single: the outputs have no axis for pictures; one is scored at a time.
    any_size: boxes are decoded whatever size the tensor has.
    """

    find: Callable[[Sequence[Output], Given], Iterator[Match]]
    decode: Callable[[Sequence[Array], Given, float], Boxes]
    against: Callable[[Sequence[Array], Given], str | None]
    threshold: float
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    gives: Literal["detect", "obb", "pose", "segment"] = "detect"
    words: str | None = None
    unlikely: Callable[[Sequence[Array], Given], str | None] | None = None
    evident: Callable[[Sequence[Array], Given], bool] | None = None
    named: bool = False
    first: int = 0
    background: bool = False
    suppressed: bool = False
    single: bool = False
    any_size: bool = False


def best(scores: Array, threshold: float) -> tuple[Array, Array, Array]:
    """``[n, classes]`` to the rows whose best class exceeds the threshold: row, score, class."""
    classes = scores.argmax(axis=1)
    values = scores[np.arange(len(scores)), classes]
    rows = np.flatnonzero(values > threshold)
    return rows, values[rows], classes[rows]


def corners_of(centre: Array, half: Array) -> Array:
    corners: Array = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    return corners


def sigmoid(values: Array) -> Array:
    halved: Array = 0.5 * (1 + np.tanh(0.5 * values.astype(np.float32, copy=False)))
    return halved


# What speaks against a form, in the values of one picture. None: nothing does. Bounds are wide: models predict a
# little beyond the picture, and nothing at all on an empty one.

PADDING = 0.01
"""Rows that score less are there to fill the output up."""


def outside(values: Array, what: str = "scores") -> str | None:
    """Says if values are no scores."""
    if not values.size or (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):
        return None
    return f"{what} lie between {values.min():.4g} and {values.max():.4g}, not in 0..1"


def against_corners(corners: Array) -> str | None:
    """Says if boxes end before they begin."""
    if not len(corners):
        return None
    ordered = float((corners[:, 2:4] >= corners[:, :2] - 1e-3).all(axis=1).mean())
    return None if ordered >= 0.99 else f"{1 - ordered:.0%} of the boxes end before they begin"


def against_pixels(corners: Array, size: Size) -> str | None:
    """Says if corners are no pixels of the picture."""
    if not len(corners):
        return None
    low, high = float(corners.min()), float(corners.max())
    if high <= 1.5:
        return "corners lie in 0..1, not in pixels"
    if low < -max(size) or high > 2 * max(size):
        return f"corners lie between {low:.4g} and {high:.4g}, far outside a picture of {size[0]}x{size[1]}"
    return against_corners(corners)


def against_shares(corners: Array) -> str | None:
    """Says if corners are no shares of the picture's sides."""
    if len(corners) and (corners.min() < -2 or corners.max() > 3):
        return f"corners lie between {corners.min():.4g} and {corners.max():.4g}, not in 0..1"
    return against_corners(corners)


def against_numbers(classes: Array) -> str | None:
    """Says if these are no numbers of classes."""
    fits = (classes == np.rint(classes)).all() and classes.min(initial=0) >= -1
    return None if fits else "the classes are no whole numbers"
