"""Decoders of YOLO detectors, from YOLOv5 on: with boxes relative to anchor points, in pixels, or suppressed already,
and with what some give beside boxes: angles, keypoints, masks.

Anchor points are cells: a model has one for each ``stride x stride`` pixels, for each of its strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tally.errors import ItemError
from tally.scorers.vision.detection.base import (
    ANY_CLASSES,
    PADDING,
    Boxes,
    Decoder,
    Given,
    Match,
    Output,
    against_corners,
    against_numbers,
    against_pixels,
    best,
    corners_of,
    outside,
    sigmoid,
)
from tally.scorers.vision.preprocess import Array, Size

_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32), (16, 32))
ULTRALYTICS = {"resize": "letterbox", "anchor": "center", "fill": 114, "channels": "rgb", "scale": 1 / 255}
_MEGVII = {"resize": "letterbox", "anchor": "top-left", "fill": 114, "channels": "bgr"}


def grid(size: Size, strides: Sequence[int]) -> Array:
    """``float32[cells, 3]``: column, row and stride of every cell, level by level."""
    levels = []
    for stride in strides:
        row, column = np.mgrid[: size[1] // stride, : size[0] // stride]
        levels.append(np.stack([column.ravel(), row.ravel(), np.full(row.size, stride)], axis=1))
    return np.concatenate(levels).astype(np.float32)


def _cells(size: Size) -> set[int]:
    """How many cells models have on pictures of this size."""
    return {sum((size[0] // stride) * (size[1] // stride) for stride in strides) for strides in _STRIDES}


def may_be_cells(n: int | None, given: Given, each: int = 1) -> bool:
    """Whether an axis may be that of a model's cells, with so many boxes each."""
    return given.size is not None and (n is None or n in {each * count for count in _cells(given.size)})


def crowded(scores: Array) -> str | None:
    """Says if many of the candidates would be objects: that is no picture's, but another form's column."""
    share = float((scores.max(axis=1) > 0.5).mean())
    return f"{share:.0%} of the candidates would be objects" if len(scores) >= 8 and share > 0.1 else None


# ------------------------------------------------------------------------------------- what is beside boxes


@dataclass(frozen=True, slots=True)
class _Tail:
    """Columns after those of boxes and scores.

    width: how many there are; None where that is not given. more: names and values for :class:`Boxes`.
    against, unlikely: see :class:`Decoder`.
    """

    gives: Literal["detect", "obb", "pose", "segment"]
    width: Callable[[Given, Output | None], int | None]
    more: Callable[[Array, Given], Mapping[str, Array]]
    against: Callable[[Array, Given], str | None]
    unlikely: Callable[[Array], str | None] = lambda _tail: None


def _points(tail: Array, given: Given) -> Mapping[str, Array]:
    assert given.keypoints is not None
    points = tail.reshape(-1, *given.keypoints)
    found = {"keypoints": points[:, :, :2]}
    return found if points.shape[2] == 2 else found | {"keypoint_scores": points[:, :, 2]}


def _against_points(tail: Array, given: Given) -> str | None:
    more = _points(tail, given)
    reach = float(np.abs(more["keypoints"]).max(initial=0))
    if reach > 10 * max(given.tensor):
        return f"keypoints reach {reach:.4g} pixels, in a picture of {given.tensor[0]}x{given.tensor[1]}"
    return outside(more["keypoint_scores"], "scores of keypoints") if "keypoint_scores" in more else None


def _against_angles(tail: Array, given: Given) -> str | None:
    low, high = float(tail.min(initial=0)), float(tail.max(initial=0))
    if low < -np.pi or high > np.pi:
        return f"the last values lie between {low:.4g} and {high:.4g}: no angles"
    return None


def _unlikely_angles(tail: Array) -> str | None:
    """Angles are told by what scores are not: below 0, or above 1."""
    return "the last values lie in 0..1, as scores do" if len(tail) and tail.min() >= 0 and tail.max() <= 1 else None


def _keypoints(tail: _Tail, given: Given) -> tuple[int, int] | None:
    return given.keypoints if tail.gives == "pose" else None


def _points_width(given: Given, _: Output | None) -> int | None:
    return None if given.keypoints is None else given.keypoints[0] * given.keypoints[1]


_TAILS = (
    _Tail("detect", lambda _known, _more: 0, lambda _tail, _known: {}, lambda _tail, _known: None),
    _Tail(
        "obb", lambda _known, _more: 1, lambda tail, _known: {"angle": tail[:, 0]}, _against_angles, _unlikely_angles
    ),
    _Tail("pose", _points_width, _points, _against_points),
    _Tail(
        "segment",
        lambda _known, prototypes: prototypes.dims[1] if prototypes is not None else None,
        lambda tail, _known: {"coefficients": tail},
        lambda _tail, _known: None,
    ),
)


def _forms(outputs: Sequence[Output], tail: _Tail) -> Iterator[tuple[tuple[Output, ...], Output | None]]:
    """Outputs that may hold boxes; for masks, with the one that holds the prototypes. What is not taken may be maps of
    features, or the same boxes once more."""
    for output in outputs:
        others = [each for each in outputs if each is not output]
        if output.kind != "float" or len(output.dims) != 3:
            continue
        if tail.gives == "segment":
            for prototypes in others:
                if prototypes.kind == "float" and len(prototypes.dims) == 4 and len(others) == 1:
                    yield (output, prototypes), prototypes
        elif all(len(each.dims) > 3 or each.dims == output.dims for each in others):
            yield (output,), None


# --------------------------------------------------------------------------------------- centres and sides


def _centres(
    first: int, each: int, tail: _Tail, *, lying: bool, unlikely: Callable[[Array, Array], str | None]
) -> dict[str, Any]:
    """What a decoder of ``[cells, first + classes + tail]`` is made of: centre, width and height in pixels, objectness
    where ``first`` is 5, scores. lying: or transposed."""

    def find(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
        for taken, prototypes in _forms(outputs, tail):
            beside = tail.width(given, prototypes)
            axes = taken[0].dims[1:]
            for width, cells in dict.fromkeys((axes, axes[::-1]) if lying else (axes[::-1],)):
                if beside is None or width is None or width <= first + beside:
                    continue
                if may_be_cells(cells, given, each):
                    yield Match(taken, width - first - beside, _keypoints(tail, given))

    def parts(outputs: Sequence[Array], given: Given) -> tuple[Array, Array, Array]:
        raw = outputs[0].astype(np.float32, copy=False)
        beside = outputs[1].shape[0] if tail.gives == "segment" else tail.width(given, None)
        assert beside is not None
        classes = given.classes if given.classes and given.classes > 0 else raw.shape[1] - first - beside
        if lying and raw.shape[0] == first + classes + beside:
            raw = raw.T
        return raw, raw[:, first : first + classes], raw[:, first + classes :]

    def decode(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
        raw, scores, beside = parts(outputs, given)
        rows, values, classes = best(scores * raw[:, 4:5] if first == 5 else scores, threshold)
        raw = raw[rows]
        boxes = corners_of(raw[:, :2], raw[:, 2:4] / 2)
        return Boxes(boxes, values, classes, tail.more(beside[rows], given), outputs[1] if len(outputs) > 1 else None)

    def objects(outputs: Sequence[Array], given: Given) -> str | None:
        raw, scores, beside = parts(outputs, given)
        return (
            _against_centres(raw[:, :2], raw[:, 2:4], given.tensor)
            or outside(raw[:, 4 : first + scores.shape[1]])
            or tail.against(beside, given)
        )

    def hardly(outputs: Sequence[Array], given: Given) -> str | None:
        raw, scores, beside = parts(outputs, given)
        return unlikely(raw, scores) or tail.unlikely(beside)

    return {"find": find, "decode": decode, "against": objects, "unlikely": hardly, "gives": tail.gives}


def _against_centres(centres: Array, sides: Array, size: Size) -> str | None:
    low, high = float(centres.min()), float(centres.max())
    if high < max(size) / 8:
        return f"no centre lies beyond {high:.4g} pixels of a picture of {size[0]}x{size[1]}"
    if low < -max(size) or high > 2 * max(size):
        return f"centres lie between {low:.4g} and {high:.4g}, far outside a picture of {size[0]}x{size[1]}"
    return f"a side is {sides.min():.4g} pixels long" if sides.min() < -1e-2 else None


def _is_sure(raw: Array, _scores: Array) -> str | None:
    sure = bool((np.abs(raw[:, 4] - 1) < 1e-3).all())
    return "objectness is 1 everywhere, as in YOLOv6" if sure else None


def _is_unsure(raw: Array, scores: Array) -> str | None:
    return None if _is_sure(raw, scores) else "objectness is not 1 everywhere"


# --------------------------------------------------------------------------------------------- cells of YOLOX


def _find_yolox(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    for taken, _ in _forms(outputs, _TAILS[0]):
        cells, width = taken[0].dims[1:]
        if width is not None and width > 5 and may_be_cells(cells, given):
            yield Match(taken, width - 5)


def _decode_yolox(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[cells, 5 + classes]``: x, y relative to the cell in strides, log of w, h in strides, objectness, class scores.
    As in https://github.com/Megvii-BaseDetection/YOLOX (demo/ONNXRuntime)."""
    raw, size = outputs[0].astype(np.float32, copy=False), given.tensor
    cells = next((each for strides in _STRIDES if len(each := grid(size, strides)) == len(raw)), None)
    if cells is None:
        raise ItemError(f"{len(raw)} anchors in the output do not fit an input of {size[0]}x{size[1]}")
    rows, scores, classes = best(raw[:, 5:] * raw[:, 4:5], threshold)
    return Boxes(from_cells(raw[rows, :4], cells[rows]), scores, classes)


def from_cells(raw: Array, cells: Array) -> Array:
    """Corners, of x, y relative to the cell in strides, and the logarithms of w, h in strides."""
    centre = (raw[:, :2] + cells[:, :2]) * cells[:, 2:]
    with np.errstate(over="ignore"):
        half = np.exp(raw[:, 2:4]) * cells[:, 2:] / 2
    return corners_of(centre, half)


def against_cells(raw: Array) -> str | None:
    """Says if these are no offsets from cells."""
    if (reach := float(np.abs(raw[:, :2]).max())) > 16:
        return f"centres reach {reach:.4g} cells from their own: they are in pixels, decoded already"
    if (most := float(raw[:, 2:4].max())) > 10:
        return f"the logarithm of a side would be {most:.4g}: sides are in pixels, decoded already"
    return None


def _against_yolox(outputs: Sequence[Array], given: Given) -> str | None:
    return against_cells(outputs[0]) or outside(outputs[0][:, 4:])


# ---------------------------------------------------------------------------- maps, one for each stride


def _maps(outputs: Sequence[Output], given: Given, axes: int) -> tuple[Output, ...]:
    """Outputs ``[batch, ..., rows, columns]`` in the order of their strides; none if they are no such maps."""
    if given.size is None or not 2 <= len(outputs) <= 4:
        return ()
    strides: dict[int, Output] = {}
    for output in outputs:
        place = output.dims[2:4]
        if len(output.dims) != axes or output.kind != "float" or None in place or 0 in place:
            return ()
        high, wide = place
        assert high is not None
        assert wide is not None
        if given.size[0] % wide or given.size[1] % high or given.size[0] // wide != given.size[1] // high:
            return ()
        strides[given.size[0] // wide] = output
    fits = len(strides) == len(outputs) and set(strides) <= {4, 8, 16, 32, 64}
    return tuple(strides[stride] for stride in sorted(strides)) if fits else ()


_BINS = 16
"""Of the distribution that a side's distance from the cell is told as."""


def _find_distances(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    maps = _maps(outputs, given, 4)
    widths = {output.dims[1] for output in maps}
    if len(widths) == 1 and (width := widths.pop()) is not None and width > 4 * _BINS:
        yield Match(maps, width - 4 * _BINS)


def _decode_distances(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """For each stride ``[64 + classes, rows, columns]``: for each side of the box the logits of 16 distances from the
    middle of the cell, in strides, and logits of classes. As YOLOv8 and later before their last layers."""
    size = given.tensor
    raw = np.concatenate([each.reshape(len(each), -1).T for each in outputs]).astype(np.float32, copy=False)
    cells = grid(size, [size[0] // each.shape[2] for each in outputs])
    rows, scores, classes = best(sigmoid(raw[:, 4 * _BINS :]), threshold)
    bins = raw[rows, : 4 * _BINS].reshape(-1, 4, _BINS)
    bins = np.exp(bins - bins.max(axis=2, keepdims=True))
    distances = (bins / bins.sum(axis=2, keepdims=True)) @ np.arange(_BINS, dtype=np.float32)
    middle, stride = cells[rows, :2] + 0.5, cells[rows, 2:]
    corners = np.concatenate([middle - distances[:, :2], middle + distances[:, 2:]], axis=1) * stride
    return Boxes(corners.astype(np.float32), scores, classes)


def _against_distances(outputs: Sequence[Array], given: Given) -> str | None:
    return None  # any numbers are logits


def _find_anchored(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    maps = _maps(outputs, given, 5)
    widths = {output.dims[4] for output in maps}
    if len(widths) == 1 and (width := widths.pop()) is not None and width > 5:
        yield Match(maps, width - 5)


ANCHORS: Mapping[str, tuple[tuple[float, ...], ...]] = {
    "yolov5": ((10, 13, 16, 30, 33, 23), (30, 61, 62, 45, 59, 119), (116, 90, 156, 198, 373, 326)),
    "yolov7": ((12, 16, 19, 36, 40, 28), (36, 75, 76, 55, 72, 146), (142, 110, 192, 243, 459, 401)),
}
"""Of the models trained on COCO, at 640 pixels."""


def _decode_anchored(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """For each stride ``[anchors, rows, columns, 5 + classes]``: logits of x, y, w, h, objectness and classes. Sides
    are in proportion to anchors, which the file does not tell. As YOLOv5 and YOLOv7 before their last layers."""
    assert given.anchors is not None
    found = []
    for raw, anchors in zip(outputs, given.anchors, strict=True):
        count, high, wide, _ = raw.shape
        stride = given.tensor[0] // wide
        values = sigmoid(raw)
        row, column = np.mgrid[:high, :wide]
        cells = np.stack([column, row], axis=2)[None]
        sides = np.array(anchors, np.float32).reshape(count, 1, 1, 2)
        values[..., :2] = (values[..., :2] * 2 - 0.5 + cells) * stride
        values[..., 2:4] = (values[..., 2:4] * 2) ** 2 * sides
        found.append(values.reshape(-1, values.shape[3]))
    rows = np.concatenate(found)
    taken, scores, classes = best(rows[:, 5:] * rows[:, 4:5], threshold)
    return Boxes(corners_of(rows[taken, :2], rows[taken, 2:4] / 2), scores, classes)


def _against_anchored(outputs: Sequence[Array], given: Given) -> str | None:
    low = min(float(each[..., 4:].min()) for each in outputs)
    return None if low < 0 else "no score is below 0: these are no logits"


# ------------------------------------------------------------------------------------- suppressed already


def _rows_of(tail: _Tail) -> dict[str, Any]:
    """``find``, ``decode`` and ``against`` of ``[boxes, 6 + tail]``: corners in pixels (with an angle: centre and
    sides), score, class. As in YOLOv10, and in YOLO exports with built-in suppression."""

    def find(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
        for taken, prototypes in _forms(outputs, tail):
            beside = tail.width(given, prototypes)
            candidates = taken[0].dims[1]
            cells = beside and any(may_be_cells(candidates, given, each) for each in (1, 3))
            if beside is not None and taken[0].dims[2] == 6 + beside and (candidates is None or not cells):
                yield Match(taken, ANY_CLASSES, _keypoints(tail, given))

    def corners(raw: Array) -> Array:
        return corners_of(raw[:, :2], raw[:, 2:4] / 2) if tail.gives == "obb" else raw[:, :4]

    def decode(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
        raw = outputs[0].astype(np.float32, copy=False)
        raw = raw[raw[:, 4] > threshold]
        more = tail.more(raw[:, 6:], given)
        prototypes = outputs[1] if len(outputs) > 1 else None
        return Boxes(corners(raw), raw[:, 4], raw[:, 5].astype(np.int64), more, prototypes)

    def against(outputs: Sequence[Array], given: Given) -> str | None:
        raw = outputs[0]
        found = raw[raw[:, 4] > PADDING]
        if (wrong := against_numbers(raw[:, 5])) is not None:
            return wrong
        if len(found) and (wrong := against_pixels(corners(found), given.tensor)) is not None:
            return wrong
        return outside(raw[:, 4]) or (tail.against(found[:, 6:], given) if len(found) else None)

    return {"find": find, "decode": decode, "against": against, "gives": tail.gives}


_BEYOND = 0.1
"""So far beyond the picture, as a share of its side, no box reaches."""


def _evident_rows(outputs: Sequence[Array], given: Given) -> bool:
    """Whether these can be nothing but corners: as centre and sides, and as corner and sides, they would reach out of
    the picture."""
    found = outputs[0][outputs[0][:, 4] > PADDING]
    first, second = found[:, :2] / np.array(given.tensor), found[:, 2:4] / np.array(given.tensor)
    centres = (first - second / 2 < -_BEYOND) | (first + second / 2 > 1 + _BEYOND)
    return bool(centres.any() and (first + second > 1 + _BEYOND).any())


def _find_sevens(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    if len(outputs) == 1 and len(outputs[0].dims) == 2 and outputs[0].dims[1] == 7 and outputs[0].kind == "float":
        yield Match(tuple(outputs), ANY_CLASSES)


def _decode_sevens(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[boxes, 7]``: number of the picture, corners in pixels, class, score; suppressed already.
    As in https://github.com/WongKinYiu/yolov7 (export with ``--end2end``)."""
    raw = outputs[0].astype(np.float32, copy=False).reshape(-1, 7)
    raw = raw[(raw[:, 6] > threshold) & (raw[:, 0] == 0)]
    return Boxes(raw[:, 1:5], raw[:, 6], raw[:, 5].astype(np.int64))


def _against_sevens(outputs: Sequence[Array], given: Given) -> str | None:
    raw = outputs[0].reshape(-1, 7)
    if (raw[:, 0] != np.rint(raw[:, 0])).any() or raw[:, 0].min(initial=0) < 0:
        return "the first column is no number of a picture"
    return against_numbers(raw[:, 5]) or outside(raw[:, 6]) or against_pixels(raw[:, 1:5], given.tensor)


# --------------------------------------------------------------------------------------------------- YOLO-NAS


def _find_yolonas(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    for match in pairs(outputs):
        if match.classes > 0 and may_be_cells(match.outputs[0].dims[1], given):
            yield match


def pairs(outputs: Sequence[Output]) -> Iterator[Match]:
    """``[candidates, 4]`` and ``[candidates, columns]``, in this order; where both have four, by their names."""
    if len(outputs) != 2 or any(len(each.dims) != 3 or each.kind != "float" for each in outputs):
        return
    first, second = outputs
    if first.dims[1] != second.dims[1]:
        return
    if second.dims[2] == 4 and (first.dims[2] != 4 or "box" in second.name.lower()):
        first, second = second, first
    if first.dims[2] == 4 and second.dims[2] is not None:
        yield Match((first, second), second.dims[2])


def _decode_yolonas(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[cells, 4]`` corners in pixels, and ``[cells, classes]`` scores, without a background class.
    As in https://github.com/Deci-AI/super-gradients (YOLO-NAS, PP-YOLOE)."""
    corners, scores = (each.astype(np.float32, copy=False) for each in outputs)
    rows, values, classes = best(scores, threshold)
    return Boxes(corners[rows], values, classes)


def sums_to_one(scores: Array) -> bool:
    return scores.shape[1] > 1 and bool((np.abs(scores.sum(axis=1) - 1) < 0.02).mean() >= 0.99)


def _against_yolonas(outputs: Sequence[Array], given: Given) -> str | None:
    corners, scores = outputs
    if (reach := float(corners.max())) < max(given.tensor) / 8:
        return f"corners reach {reach:.4g}: they are not in pixels"
    if sums_to_one(scores):
        return "the scores of each box add up to 1: one class is the background"
    return outside(scores) or against_corners(corners)


def _with_tails(name: str, of: Callable[[_Tail], dict[str, Any]], tails: Sequence[str], **settings: Any) -> Any:
    return {
        name if tail.gives == "detect" else f"{name}-{tail.gives}": Decoder(
            **of(tail), threshold=0.25, preprocess=ULTRALYTICS, **settings
        )
        for tail in _TAILS
        if tail.gives in tails
    }


YOLO: Mapping[str, Decoder] = {
    "yolox": Decoder(_find_yolox, _decode_yolox, _against_yolox, 0.3, _MEGVII),
    "yolox-decoded": Decoder(
        **_centres(5, 1, _TAILS[0], lying=False, unlikely=_is_sure), threshold=0.3, preprocess=_MEGVII
    ),
    "yolov6": Decoder(
        **_centres(5, 1, _TAILS[0], lying=False, unlikely=_is_unsure), threshold=0.25, preprocess=ULTRALYTICS
    ),
    **_with_tails(
        "yolov5",
        lambda tail: _centres(5, 3, tail, lying=False, unlikely=lambda _raw, _scores: None),
        ("detect", "pose", "segment"),
    ),
    **_with_tails(
        "yolov8",
        lambda tail: _centres(4, 1, tail, lying=True, unlikely=lambda _raw, scores: crowded(scores)),
        ("detect", "obb", "pose", "segment"),
    ),
    **_with_tails("end-to-end", _rows_of, ("detect", "obb", "pose", "segment"), suppressed=True, evident=_evident_rows),
    "yolov5-raw": Decoder(_find_anchored, _decode_anchored, _against_anchored, 0.25, ULTRALYTICS),
    "yolov8-raw": Decoder(_find_distances, _decode_distances, _against_distances, 0.25, ULTRALYTICS),
    "yolov7-end-to-end": Decoder(
        _find_sevens, _decode_sevens, _against_sevens, 0.25, ULTRALYTICS, suppressed=True, single=True
    ),
    "yolonas": Decoder(_find_yolonas, _decode_yolonas, _against_yolonas, 0.3, ULTRALYTICS),
}
"""YOLOv5, v7: ``yolov5``; v6: ``yolov6``; v8, v9, v11, v12: ``yolov8``; v10, v26, or built-in suppression:
``end-to-end``."""
