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


def _yolox_classes(shapes: Sequence[Shape], size: Size) -> int | None:
    if len(shapes) != 1 or len(shapes[0]) != 3:
        return None
    _, anchors, width = shapes[0]
    fits = isinstance(anchors, str | None) or any(
        anchors == sum((size[0] // s) * (size[1] // s) for s in strides) for strides in _YOLOX_STRIDES
    )
    return width - 5 if fits and isinstance(width, int) and width > 5 else None


def _fastestdet_classes(shapes: Sequence[Shape], size: Size) -> int | None:
    if len(shapes) != 1 or len(shapes[0]) != 4:
        return None
    _, width, rows, columns = shapes[0]
    fits = all(isinstance(n, str | None) or n == side // 16 for n, side in ((columns, size[0]), (rows, size[1])))
    return width - 5 if fits and isinstance(width, int) and width > 5 else None


def _ssd_classes(shapes: Sequence[Shape], _size: Size) -> int | None:
    if len(shapes) != 2 or any(len(shape) != 3 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        return None
    widths = [shape[2] for shape in shapes]
    if 4 not in widths:
        return None
    other = widths[0] if widths[1] == 4 else widths[1]
    return other - 1 if isinstance(other, int) and other > 1 else None


@dataclass(frozen=True, slots=True)
class Decoder:
    """One family of detectors.

    decode: outputs of one picture, tensor size, score threshold → candidates.
    classes: output shapes, batch axis included, and tensor size → number of classes (without background), or
        None if these are not the outputs of this family.
    """

    decode: Callable[[Sequence[Array], Size, float], Boxes]
    classes: Callable[[Sequence[Shape], Size], int | None]
    score_threshold: float
    preprocess: Mapping[str, Any] = field(default_factory=dict)


DECODERS: Mapping[str, Decoder] = {
    "yolox": Decoder(
        _decode_yolox,
        _yolox_classes,
        0.3,
        {"resize": "letterbox", "anchor": "top-left", "fill": 114, "channels": "bgr"},
    ),
    "fastestdet": Decoder(
        _decode_fastestdet,
        _fastestdet_classes,
        0.5,
        {"resize": "squash", "channels": "bgr", "scale": 1 / 255},
    ),
    "ssd": Decoder(
        _decode_ssd,
        _ssd_classes,
        0.7,
        {"resize": "squash", "interpolation": "bicubic", "channels": "rgb", "mean": 127, "std": 128},
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
    found = nms(DECODERS[decoder].decode(outputs, size, score_threshold), iou_threshold)
    boxes = prepared.original(found.boxes)
    if not np.isfinite(boxes).all():
        raise ItemError(f"{prepared.key}: the model gave a box that is not finite")
    return [
        {"xmin": b[0], "ymin": b[1], "xmax": b[2], "ymax": b[3], "label": name(int(c)), "score": float(s)}
        for b, s, c in zip(boxes.tolist(), found.scores, found.classes, strict=True)
    ]
