"""Box decoders and non-maximum suppression: from a detector's raw outputs to rows, in numpy.

Boxes are ``float32[n, 4]``: xmin, ymin, xmax, ymax, in pixels of the tensor that the model was given, until
:meth:`~tally.scorers.vision.preprocess.Prepared.original` moves them to the original picture. A candidate stands for
its best class. All functions are pure and thread-safe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from tally.errors import ItemError
from tally.scorers.base import Row
from tally.scorers.vision.preprocess import Array, Prepared, Size

Shape: TypeAlias = Sequence[int | str | None]
"""Of an output, batch axis included; a name or None where it varies."""


class Boxes(NamedTuple):
    """Candidates: ``float32[n, 4]`` in tensor pixels, ``float32[n]``, and ``int64[n]``."""

    boxes: Array
    scores: Array
    classes: Array


def nms(found: Boxes, iou_threshold: float) -> Boxes:
    """Greedy non-maximum suppression within each class; what is kept comes with falling score."""
    order = np.argsort(-found.scores, kind="stable")
    boxes, classes = found.boxes[order], found.classes[order]
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)
    alive = np.ones(len(order), bool)
    for i in range(len(order)):
        if not alive[i]:
            continue
        later = np.flatnonzero(alive[i + 1 :] & (classes[i + 1 :] == classes[i])) + i + 1
        low = np.maximum(boxes[i, :2], boxes[later, :2])
        high = np.minimum(boxes[i, 2:], boxes[later, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        union = np.maximum(area[i] + area[later] - shared, np.float32(1e-9))
        alive[later[shared > iou_threshold * union]] = False
    kept = order[alive]
    return Boxes(found.boxes[kept], found.scores[kept], found.classes[kept])


def _best(scores: Array, threshold: float) -> tuple[Array, Array, Array]:
    """``[n, classes]`` to the rows whose best class exceeds the threshold: row, score, class."""
    classes = scores.argmax(axis=1)
    values = scores[np.arange(len(scores)), classes]
    rows = np.flatnonzero(values > threshold)
    return rows, values[rows], classes[rows]


def _corners(centre: Array, half: Array) -> Array:
    corners: Array = np.concatenate([centre - half, centre + half], axis=1).astype(np.float32)
    return corners


def _yolox_grid(size: Size, strides: Sequence[int]) -> Array:
    """``float32[anchors, 3]``: column, row and stride of every anchor point, level by level."""
    levels = []
    for stride in strides:
        row, column = np.mgrid[: size[1] // stride, : size[0] // stride]
        levels.append(np.stack([column.ravel(), row.ravel(), np.full(row.size, stride)], axis=1))
    return np.concatenate(levels).astype(np.float32)


_YOLOX_STRIDES = ((8, 16, 32), (8, 16, 32, 64))


def _decode_yolox(outputs: Sequence[Array], size: Size, threshold: float) -> Boxes:
    """``[anchors, 5 + classes]``: x, y relative to the anchor's cell in strides, log of w, h in strides,
    objectness, class scores. As in https://github.com/Megvii-BaseDetection/YOLOX (demo/ONNXRuntime)."""
    raw = outputs[0].astype(np.float32, copy=False)
    grids = [_yolox_grid(size, strides) for strides in _YOLOX_STRIDES]
    grid = next((g for g in grids if len(g) == len(raw)), None)
    if grid is None:
        raise ItemError(f"{len(raw)} anchors in the output do not fit an input of {size[0]}x{size[1]}")
    rows, scores, classes = _best(raw[:, 5:] * raw[:, 4:5], threshold)
    raw, grid = raw[rows], grid[rows]
    centre = (raw[:, :2] + grid[:, :2]) * grid[:, 2:]
    with np.errstate(over="ignore"):
        half = np.exp(raw[:, 2:4]) * grid[:, 2:] / 2
    return Boxes(_corners(centre, half), scores, classes)


def _decode_fastestdet(outputs: Sequence[Array], size: Size, threshold: float) -> Boxes:
    """``[5 + classes, rows, columns]``: objectness, x and y offset of the centre (tanh, in cells), w and h
    (sigmoid, of the whole), class scores; score = objectness^0.6 * class^0.4.
    As in https://github.com/dog-qiuqiu/FastestDet."""
    raw = outputs[0].astype(np.float32, copy=False)
    cells = np.array([raw.shape[2], raw.shape[1]], np.float32)
    flat = raw.reshape(raw.shape[0], -1).T
    score = np.maximum(flat[:, :1], 0) ** 0.6 * np.maximum(flat[:, 5:], 0) ** 0.4
    rows, scores, classes = _best(score, threshold)
    flat = flat[rows]
    cell = np.stack([rows % raw.shape[2], rows // raw.shape[2]], axis=1)
    centre = (cell + np.tanh(flat[:, 1:3])) / cells * np.array(size, np.float32)
    half = 0.5 * (1 + np.tanh(flat[:, 3:5] / 2)) / 2 * np.array(size, np.float32)
    return Boxes(_corners(centre, half), scores, classes)


def _decode_ssd(outputs: Sequence[Array], size: Size, threshold: float) -> Boxes:
    """``[priors, 1 + classes]`` probabilities, background first, and ``[priors, 4]`` corners in 0..1.
    As in https://github.com/Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB."""
    first, second = (o.astype(np.float32, copy=False) for o in outputs[:2])
    scores, corners = (first, second) if second.shape[-1] == 4 else (second, first)
    rows, values, classes = _best(scores[:, 1:], threshold)
    return Boxes(corners[rows] * np.array(size * 2, np.float32), values, classes)


def _decode_centres(raw: Array, first: int, threshold: float) -> Boxes:
    """``[anchors, first + classes]``: centre, width and height in pixels, objectness where ``first`` is 5, scores."""
    scores = raw[:, first:] * raw[:, 4:5] if first == 5 else raw[:, first:]
    rows, values, classes = _best(scores, threshold)
    return Boxes(_corners(raw[rows, :2], raw[rows, 2:4] / 2), values, classes)


def _decode_yolov5(outputs: Sequence[Array], size: Size, threshold: float) -> Boxes:
    """``[anchors, 5 + classes]``: centre, width and height in pixels, objectness, class scores. As in
    https://github.com/ultralytics/yolov5, and in YOLOX exported with its boxes decoded."""
    return _decode_centres(outputs[0].astype(np.float32, copy=False), 5, threshold)


def _decode_yolov8(outputs: Sequence[Array], size: Size, threshold: float) -> Boxes:
    """``[4 + classes, anchors]``, or transposed: centre, width and height in pixels, class scores. As in
    https://github.com/ultralytics/ultralytics (YOLOv8 and later, without built-in suppression)."""
    return _decode_centres(_anchors_first(outputs[0], size).astype(np.float32, copy=False), 4, threshold)


def _decode_end_to_end(outputs: Sequence[Array], size: Size, threshold: float) -> Boxes:
    """``[boxes, 6]``: corners in pixels, score, class; suppressed already. As in YOLOv10, and in YOLO exports with
    built-in suppression (https://github.com/ultralytics/ultralytics)."""
    raw = outputs[0].astype(np.float32, copy=False)
    raw = raw[raw[:, 4] > threshold]
    return Boxes(raw[:, :4], raw[:, 4], raw[:, 5].astype(np.int64))


def _decode_yolonas(outputs: Sequence[Array], size: Size, threshold: float) -> Boxes:
    """``[anchors, 4]`` corners in pixels, and ``[anchors, classes]`` scores, without a background class.
    As in https://github.com/Deci-AI/super-gradients (YOLO-NAS, PP-YOLOE)."""
    corners, scores = _corners_and_scores(outputs)
    rows, values, classes = _best(scores, threshold)
    return Boxes(corners[rows], values, classes)


def _corners_and_scores(outputs: Sequence[Array]) -> tuple[Array, Array]:
    first, second = (o.astype(np.float32, copy=False) for o in outputs[:2])
    return (first, second) if first.shape[-1] == 4 else (second, first)


def _anchor_counts(size: Size) -> set[int]:
    """How many anchor points models have on pictures of this size, one for each cell."""
    return {sum((size[0] // s) * (size[1] // s) for s in strides) for strides in _YOLOX_STRIDES}


def _anchors_first(raw: Array, size: Size) -> Array:
    counts = _anchor_counts(size)
    lying = raw.shape[1] in counts and raw.shape[0] not in counts
    return raw.T if lying or (raw.shape[0] not in counts and raw.shape[1] > raw.shape[0]) else raw


def _may_be(n: int | str | None, counts: set[int]) -> bool:
    return n in counts if isinstance(n, int) else True


def _yolov5_classes(shapes: Sequence[Shape], size: Size) -> int | None:
    if len(shapes) != 1 or len(shapes[0]) != 3:
        return None
    _, anchors, width = shapes[0]
    fits = _may_be(anchors, {3 * count for count in _anchor_counts(size)})
    return width - 5 if fits and isinstance(width, int) and width > 5 else None


def _yolov8_classes(shapes: Sequence[Shape], size: Size) -> int | None:
    if len(shapes) != 1 or len(shapes[0]) != 3:
        return None
    counts = _anchor_counts(size)
    for width, anchors in (shapes[0][1:], shapes[0][:0:-1]):
        if isinstance(width, int) and width > 4 and _may_be(anchors, counts):
            return width - 4
    return None


def _end_to_end_classes(shapes: Sequence[Shape], _size: Size) -> int | None:
    """Any number of classes: -1."""
    fits = len(shapes) == 1 and len(shapes[0]) == 3 and shapes[0][2] == 6
    return ANY_CLASSES if fits else None


def _yolonas_classes(shapes: Sequence[Shape], size: Size) -> int | None:
    width = _beside_corners(shapes)
    fits = width is not None and width > 0 and _may_be(shapes[0][1], _anchor_counts(size))
    return width if fits else None


def _beside_corners(shapes: Sequence[Shape]) -> int | None:
    """Columns of scores beside ``[anchors, 4]`` corners; None if these are not such outputs."""
    if len(shapes) != 2 or any(len(shape) != 3 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        return None
    widths = [shape[2] for shape in shapes]
    if 4 not in widths:
        return None
    other = widths[0] if widths[1] == 4 else widths[1]
    return other if isinstance(other, int) else None


def _yolox_classes(shapes: Sequence[Shape], size: Size) -> int | None:
    if len(shapes) != 1 or len(shapes[0]) != 3:
        return None
    _, anchors, width = shapes[0]
    fits = _may_be(anchors, _anchor_counts(size))
    return width - 5 if fits and isinstance(width, int) and width > 5 else None


def _fastestdet_classes(shapes: Sequence[Shape], size: Size) -> int | None:
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return None
    _, width, rows, columns = shapes[0]
    fits = all(isinstance(n, str | None) or n == side // 16 for n, side in ((columns, size[0]), (rows, size[1])))
    return width - 5 if fits and isinstance(width, int) and width > 5 else None


def _ssd_classes(shapes: Sequence[Shape], _size: Size) -> int | None:
    width = _beside_corners(shapes)
    return width - 1 if width is not None and width > 1 else None


# What speaks against a family, in the values of one picture. None: nothing does. Bounds are wide: models predict a
# little beyond the picture, and nothing at all on an empty one.


def outside(values: Array, what: str = "scores") -> str | None:
    """Says if values are no scores."""
    if not values.size or (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):
        return None
    return f"{what} lie between {values.min():.4g} and {values.max():.4g}, not in 0..1"


def _against_yolox(outputs: Sequence[Array], size: Size) -> str | None:
    raw = outputs[0]
    if (reach := float(np.abs(raw[:, :2]).max())) > 16:
        return f"centres reach {reach:.4g} cells from their own: they are in pixels, decoded already"
    if (most := float(raw[:, 2:4].max())) > 10:
        return f"the logarithm of a side would be {most:.4g}: sides are in pixels, decoded already"
    return outside(raw[:, 4:])


def _against_pixels(centres: Array, sides: Array, size: Size) -> str | None:
    low, high = float(centres.min()), float(centres.max())
    if high < max(size) / 8:
        return f"no centre lies beyond {high:.4g} pixels of a picture of {size[0]}x{size[1]}"
    if low < -max(size) or high > 2 * max(size):
        return f"centres lie between {low:.4g} and {high:.4g}, far outside a picture of {size[0]}x{size[1]}"
    return f"a side is {sides.min():.4g} pixels long" if sides.min() < -1e-2 else None


def _against_yolov5(outputs: Sequence[Array], size: Size) -> str | None:
    raw = outputs[0]
    return _against_pixels(raw[:, :2], raw[:, 2:4], size) or outside(raw[:, 4:])


def _against_yolov8(outputs: Sequence[Array], size: Size) -> str | None:
    raw = _anchors_first(outputs[0], size)
    return _against_pixels(raw[:, :2], raw[:, 2:4], size) or outside(raw[:, 4:])


def against_oriented(output: Array, size: Size) -> str | None:
    """Says if these are no oriented boxes: those of ``yolov8``, with an angle in the place of the last score. Angles
    are told by what scores are not: below 0, above 1, or far from 0 where there is nothing."""
    raw = _anchors_first(output, size)
    if (wrong := _against_pixels(raw[:, :2], raw[:, 2:4], size) or outside(raw[:, 4:-1])) is not None:
        return wrong
    low, high = float(raw[:, -1].min()), float(raw[:, -1].max())
    if low < -np.pi or high > np.pi:
        return f"the last values lie between {low:.4g} and {high:.4g}: no angles"
    if low >= 0 and float(np.median(raw[:, -1])) < 0.05:
        return "the last values are mostly about 0, as scores are"
    return None


def _against_end_to_end(outputs: Sequence[Array], size: Size) -> str | None:
    raw = outputs[0]
    found = raw[raw[:, 4] > _PADDING]
    classes = raw[:, 5]
    if (classes != np.rint(classes)).any() or classes.min(initial=0) < -1:
        return "the last column holds no numbers of classes"
    if not len(found):
        return outside(raw[:, 4])
    low, high = float(found[:, :4].min()), float(found[:, :4].max())
    if high <= 1.5:
        return "corners lie in 0..1, not in pixels"
    if low < -max(size) or high > 2 * max(size):
        return f"corners lie between {low:.4g} and {high:.4g}, far outside a picture of {size[0]}x{size[1]}"
    return outside(raw[:, 4]) or _against_corners(found)


def _evident_end_to_end(outputs: Sequence[Array], size: Size) -> bool:
    """Whether these can be nothing but corners: as centre and sides, and as corner and sides, they would reach out of
    the picture."""
    found = outputs[0][outputs[0][:, 4] > _PADDING]
    first, second = found[:, :2] / np.array(size), found[:, 2:4] / np.array(size)
    centres = (first - second / 2 < -_BEYOND) | (first + second / 2 > 1 + _BEYOND)
    return bool(centres.any() and (first + second > 1 + _BEYOND).any())


_PADDING = 0.01
"""Rows that score less are there to fill the output up."""
_BEYOND = 0.1
"""So far beyond the picture, as a share of its side, no box reaches."""


def _against_corners(corners: Array) -> str | None:
    if not len(corners):
        return None
    ordered = float((corners[:, 2:4] >= corners[:, :2] - 1e-3).all(axis=1).mean())
    return None if ordered >= 0.99 else f"{1 - ordered:.0%} of the boxes end before they begin"


def _sums_to_one(scores: Array) -> bool:
    return scores.shape[1] > 1 and bool((np.abs(scores.sum(axis=1) - 1) < 0.02).mean() >= 0.99)


def _against_yolonas(outputs: Sequence[Array], size: Size) -> str | None:
    corners, scores = _corners_and_scores(outputs)
    if (reach := float(corners.max())) < max(size) / 8:
        return f"corners reach {reach:.4g}: they are not in pixels"
    if _sums_to_one(scores):
        return "the scores of each box add up to 1: one class is the background"
    return outside(scores) or _against_corners(corners)


def _against_ssd(outputs: Sequence[Array], size: Size) -> str | None:
    corners, scores = _corners_and_scores(outputs)
    if corners.min() < -2 or corners.max() > 3:
        return f"corners lie between {corners.min():.4g} and {corners.max():.4g}, not in 0..1"
    if (wrong := outside(scores)) is not None:
        return wrong
    if not _sums_to_one(scores):
        return "the scores of a box do not add up to 1: no class is the background"
    return _against_corners(corners)


def _against_fastestdet(outputs: Sequence[Array], size: Size) -> str | None:
    raw = outputs[0]
    return outside(raw[:1], "objectness") or outside(raw[5:])


@dataclass(frozen=True, slots=True)
class Decoder:
    """One family of detectors.

    decode: outputs of one picture, tensor size, score threshold → candidates.
    classes: output shapes, batch axis included, and tensor size → number of classes (without background), or
        :data:`ANY_CLASSES`, or None if these are not the outputs of this family.
    against: outputs of one picture, tensor size → what in the values speaks against this family, or None.
    evident: the same → whether these values could have spoken against it; None: any could.
    preprocess: with which the family was trained.
    outputs: how many there are. words: what their names usually contain (a regular expression).
    background: whether the first column of scores is the background's, which has no label.
    suppressed: whether the model leaves only one box for each object.
    """

    decode: Callable[[Sequence[Array], Size, float], Boxes]
    classes: Callable[[Sequence[Shape], Size], int | None]
    against: Callable[[Sequence[Array], Size], str | None]
    score_threshold: float
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    outputs: int = 1
    words: str | None = None
    background: bool = False
    suppressed: bool = False
    evident: Callable[[Sequence[Array], Size], bool] | None = None


ANY_CLASSES = -1
"""The shapes do not tell how many classes there are."""

_ULTRALYTICS = {"resize": "letterbox", "anchor": "center", "fill": 114, "channels": "rgb", "scale": 1 / 255}

DECODERS: Mapping[str, Decoder] = {
    "yolox": Decoder(
        _decode_yolox,
        _yolox_classes,
        _against_yolox,
        0.3,
        {"resize": "letterbox", "anchor": "top-left", "fill": 114, "channels": "bgr"},
    ),
    "yolox-decoded": Decoder(
        _decode_yolov5,
        _yolox_classes,
        _against_yolov5,
        0.3,
        {"resize": "letterbox", "anchor": "top-left", "fill": 114, "channels": "bgr"},
    ),
    "yolov5": Decoder(_decode_yolov5, _yolov5_classes, _against_yolov5, 0.25, _ULTRALYTICS),
    "yolov8": Decoder(_decode_yolov8, _yolov8_classes, _against_yolov8, 0.25, _ULTRALYTICS),
    "end-to-end": Decoder(
        _decode_end_to_end,
        _end_to_end_classes,
        _against_end_to_end,
        0.25,
        _ULTRALYTICS,
        suppressed=True,
        evident=_evident_end_to_end,
    ),
    "yolonas": Decoder(
        _decode_yolonas,
        _yolonas_classes,
        _against_yolonas,
        0.3,
        _ULTRALYTICS,
        outputs=2,
    ),
    "fastestdet": Decoder(
        _decode_fastestdet,
        _fastestdet_classes,
        _against_fastestdet,
        0.5,
        {"resize": "squash", "channels": "bgr", "scale": 1 / 255},
    ),
    "ssd": Decoder(
        _decode_ssd,
        _ssd_classes,
        _against_ssd,
        0.7,
        {"resize": "squash", "interpolation": "bicubic", "channels": "rgb", "mean": 127, "std": 128},
        outputs=2,
        background=True,
    ),
}
"""The box decoders, with the preprocessing that their families were trained with."""


def detect_rows(
    outputs: Sequence[Array],
    prepared: Prepared,
    name: Callable[[int], str],
    *,
    decoder: str,
    size: Size,
    score_threshold: float,
    iou_threshold: float,
) -> list[Row]:
    """``xmin, ymin, xmax, ymax`` in pixels of the original, ``label``, ``score``: one row for each box."""
    family = DECODERS[decoder]
    found = nms(family.decode(outputs, size, score_threshold), 1.0 if family.suppressed else iou_threshold)
    boxes = prepared.original(found.boxes)
    if not np.isfinite(boxes).all():
        raise ItemError(f"{prepared.key}: the model gave a box that is not finite")
    return [
        {"xmin": b[0], "ymin": b[1], "xmax": b[2], "ymax": b[3], "label": name(int(c)), "score": float(s)}
        for b, s, c in zip(boxes.tolist(), found.scores, found.classes, strict=True)
    ]
