"""From boxes on the tensor to rows about the original picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tally.errors import ItemError
from tally.scorers.base import Row
from tally.scorers.vision.detection.base import Boxes, Decoder, Given
from tally.scorers.vision.detection.suppression import nms
from tally.scorers.vision.preprocess import Array, Prepared

_MORE: Mapping[str, Mapping[str, str]] = {
    "detect": {},
    "obb": {"corners": "list<float32>"},
    "pose": {"keypoints": "list<float32>", "keypoint_scores": "list<float32>"},
    "segment": {"pixels": "int64", "mask": "list<int64>"},
}


def columns(decoder: Decoder, given: Given) -> dict[str, str]:
    """Names and Arrow types of the columns of :func:`detect_rows`."""
    more = dict(_MORE[decoder.gives])
    if decoder.gives == "pose" and given.keypoints is not None and given.keypoints[1] < 3:
        del more["keypoint_scores"]
    boxes = dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), "float32")
    return {**boxes, "label": "string", "score": "float32", **more}


def detect_rows(
    outputs: Sequence[Array],
    prepared: Prepared,
    name: Callable[[int], str],
    *,
    decoder: Decoder,
    given: Given,
    threshold: float,
    iou_threshold: float,
) -> list[Row]:
    """One row for each box: ``xmin, ymin, xmax, ymax`` in pixels of the original, ``label``, ``score``, and what else
    belongs to it.

    corners: x and y of the four corners of an oriented box; the others are those of the upright box around it.
    keypoints: x and y of each, and their scores where the model gives them. mask: lengths of runs, column by column,
    beginning outside the object (COCO's uncompressed RLE), with the pixels inside.
    """
    found = decoder.decode(outputs, given, threshold)
    found = nms(found, 1.0 if decoder.suppressed else iou_threshold)
    boxes = prepared.original(found.boxes)
    more: dict[str, Sequence[Any]] = {}
    if "angle" in found.more:
        corners = prepared.points(_turned(found))
        boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
        more["corners"] = corners.reshape(-1, 8).tolist()
    if decoder.gives == "pose" and "keypoints" in found.more:
        more["keypoints"] = prepared.points(found.more["keypoints"]).reshape(len(boxes), -1).tolist()
        if "keypoint_scores" in found.more:
            more["keypoint_scores"] = found.more["keypoint_scores"].tolist()
    if not np.isfinite(boxes).all():
        raise ItemError(f"{prepared.key}: the model gave a box that is not finite")
    if found.prototypes is not None:
        masks = _masks(found, boxes, prepared, given)
        more |= {"pixels": [sum(lengths[1::2]) for lengths in masks], "mask": masks}
    rows: list[Row] = [
        {"xmin": b[0], "ymin": b[1], "xmax": b[2], "ymax": b[3], "label": name(int(c)), "score": float(s)}
        for b, s, c in zip(boxes.tolist(), found.scores, found.classes, strict=True)
    ]
    return [{**row, **{key: values[at] for key, values in more.items()}} for at, row in enumerate(rows)]


def _turned(found: Boxes) -> Array:
    """``float32[n, 4, 2]``: corners, each box turned around its centre."""
    centre, half = (found.boxes[:, :2] + found.boxes[:, 2:]) / 2, (found.boxes[:, 2:] - found.boxes[:, :2]) / 2
    cosine, sine = np.cos(found.more["angle"])[:, None], np.sin(found.more["angle"])[:, None]
    along = np.concatenate([cosine, sine], axis=1) * half[:, :1]
    across = np.concatenate([-sine, cosine], axis=1) * half[:, 1:]
    corners: Array = np.stack(
        [centre - along - across, centre + along - across, centre + along + across, centre - along + across], axis=1
    )
    return corners


def _masks(found: Boxes, boxes: Array, prepared: Prepared, given: Given) -> list[list[int]]:
    """For each box the runs of its mask, as large as the original: what the coefficients make of the prototypes, inside
    the box."""
    prototypes = np.asarray(found.prototypes, np.float32)
    count, high, wide = prototypes.shape
    logits = (found.more["coefficients"] @ prototypes.reshape(count, -1)).reshape(-1, high, wide)
    size = np.array([prepared.width, prepared.height])
    scale = np.array(prepared.scale) * (wide, high) / given.tensor  # cells of the prototypes per pixel of the original
    offset = np.array(prepared.offset) * (wide, high) / given.tensor
    masks = []
    for box, values in zip(boxes, logits, strict=True):
        low, top = np.clip(np.rint(box[:2]), 0, size).astype(int), np.clip(np.rint(box[2:]), 0, size).astype(int)
        inside = np.zeros((0, 0), bool)
        if (top > low).all():
            part = np.clip(np.concatenate([low * scale + offset, top * scale + offset]), 0, (wide, high) * 2)
            sides = (int(top[0] - low[0]), int(top[1] - low[1]))
            image = Image.fromarray(values).resize(sides, Image.Resampling.BILINEAR, box=tuple(part.tolist()))
            inside = np.asarray(image) > 0
        masks.append(runs(inside, int(low[0]), int(low[1]), prepared.width, prepared.height))
    return masks


def runs(inside: Array, left: int, top: int, width: int, height: int) -> list[int]:
    """Lengths of runs of a mask of ``width x height`` pixels, column by column, the first one outside. ``inside``
    is the part at ``left, top``; there is nothing elsewhere."""
    column, row = np.nonzero(inside.T)
    at = (left + column) * height + top + row
    breaks = np.flatnonzero(np.diff(at) > 1)
    starts, ends = (
        at[np.concatenate([[0], breaks + 1])] if len(at) else at,
        at[np.append(breaks, -1)] + 1 if len(at) else at,
    )
    edges = np.stack([starts, ends], axis=1).ravel()
    lengths: list[int] = np.diff(np.concatenate([[0], edges, [width * height]])).tolist()
    return lengths[:-1] if len(lengths) > 1 and lengths[-1] == 0 else lengths


def mask_of(lengths: Sequence[int], width: int, height: int) -> Array:
    """The mask ``bool[height, width]`` of which :func:`runs` gave the lengths. Raises ValueError if they do not fit."""
    values = np.zeros(len(lengths), bool)
    values[1::2] = True
    flat = np.repeat(values, lengths)
    if len(flat) > width * height:
        raise ValueError(f"a mask of {len(flat):,} pixels for a picture of {width}x{height}")
    mask: Array = np.pad(flat, (0, width * height - len(flat))).reshape(width, height).T
    return mask
