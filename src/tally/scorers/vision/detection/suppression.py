"""Non-maximum suppression: of boxes that are about one object, the best."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tally.scorers.vision.detection.base import Boxes
from tally.scorers.vision.preprocess import Array


def nms(found: Boxes, iou_threshold: float) -> Boxes:
    """Greedy non-maximum suppression within each class; what is kept comes with falling score."""
    found = found.take(np.argsort(-found.scores, kind="stable"))
    overlap = _turned(found) if "angle" in found.more else _upright(found)
    alive = np.ones(len(found.scores), bool)
    for i in range(len(alive)):
        if not alive[i]:
            continue
        later = np.flatnonzero(alive[i + 1 :] & (found.classes[i + 1 :] == found.classes[i])) + i + 1
        alive[later[overlap(i, later) > iou_threshold]] = False
    return found.take(np.flatnonzero(alive))


def _upright(found: Boxes) -> Callable[[int, Array], Array]:
    """Intersection over union."""
    boxes = found.boxes
    area = np.prod(np.maximum(boxes[:, 2:] - boxes[:, :2], 0), axis=1)

    def overlap(i: int, others: Array) -> Array:
        low = np.maximum(boxes[i, :2], boxes[others, :2])
        high = np.minimum(boxes[i, 2:], boxes[others, 2:])
        shared = np.prod(np.maximum(high - low, 0), axis=1)
        share: Array = shared / np.maximum(area[i] + area[others] - shared, np.float32(1e-9))
        return share

    return overlap


def _turned(found: Boxes) -> Callable[[int, Array], Array]:
    """How alike the normal distributions are that boxes stand for: as Ultralytics suppresses its oriented boxes, after
    https://arxiv.org/abs/2106.06072."""
    boxes = found.boxes.astype(np.float64)
    centre, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    along, across = (sides**2 / 12).T
    cosine, sine = np.cos(found.more["angle"]), np.sin(found.more["angle"])
    xx, yy = along * cosine**2 + across * sine**2, along * sine**2 + across * cosine**2
    xy = (along - across) * cosine * sine
    own = xx * yy - xy**2

    def overlap(i: int, others: Array) -> Array:
        a, b, c = xx[i] + xx[others], yy[i] + yy[others], xy[i] + xy[others]
        x, y = (centre[i] - centre[others]).T
        common = np.maximum(a * b - c**2, 1e-9)
        distance = (a * y**2 + b * x**2) / common / 4 - c * x * y / common / 2
        distance += np.log(common / (4 * np.sqrt(np.maximum(own[i] * own[others], 0)) + 1e-9) + 1e-9) / 2
        alike: Array = 1 - np.sqrt(np.maximum(1 - np.exp(-np.clip(distance, 0, 100)), 0))
        return alike

    return overlap
