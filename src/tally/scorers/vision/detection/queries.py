"""Decoders of transformers that detect (DETR and what came after it): a fixed number of candidates, of which each is
another object, so that nothing is to be suppressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from tally.scorers.vision.detection.base import (
    ANY_CLASSES,
    PADDING,
    Boxes,
    Decoder,
    Given,
    Match,
    Output,
    against_numbers,
    against_pixels,
    best,
    corners_of,
    outside,
    sigmoid,
)
from tally.scorers.vision.detection.yolo import crowded, may_be_cells, pairs
from tally.scorers.vision.preprocess import Array

_IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def _softmax(logits: Array) -> Array:
    values = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Array = values / values.sum(axis=1, keepdims=True)
    return shares


def _against_centres(centres: Array) -> str | None:
    low, high = float(centres.min()), float(centres.max())
    return None if low >= -0.5 and high <= 1.5 else f"boxes lie between {low:.4g} and {high:.4g}, not in 0..1"


def _decode(boxes: Array, scores: Array, given: Given, threshold: float) -> Boxes:
    """boxes: centre, width and height as shares of the picture's sides."""
    rows, values, classes = best(scores, threshold)
    boxes = boxes[rows].astype(np.float32, copy=False)
    corners = corners_of(boxes[:, :2], boxes[:, 2:] / 2)
    return Boxes(corners * np.array(given.tensor * 2, np.float32), values, classes)


# Two outputs: boxes, and logits of classes.


def _find_logits(nothing: int) -> Callable[[Sequence[Output], Given], Iterator[Match]]:
    def find(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
        for match in pairs([each for each in outputs if len(each.dims) == 3]):
            if match.classes > nothing:
                yield match._replace(classes=match.classes - nothing)

    return find


def _decode_detr(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[queries, 4]`` centre, width and height in 0..1, ``[queries, classes + 1]`` logits with "no object" last.
    As in https://github.com/facebookresearch/detr and in transformers."""
    return _decode(outputs[0], _softmax(outputs[1].astype(np.float32))[:, :-1], given, threshold)


def _against_detr(outputs: Sequence[Array], given: Given) -> str | None:
    return _against_centres(outputs[0]) or _against_logits(outputs[1])


def _unlikely_detr(outputs: Sequence[Array], given: Given) -> str | None:
    none = float((outputs[1].argmax(axis=1) == outputs[1].shape[1] - 1).mean())
    return f"only {none:.0%} of the candidates are no object" if none < 0.5 else None


def _against_logits(logits: Array) -> str | None:
    return None if logits.min() < 0 or logits.max() > 1 else "the scores lie in 0..1: they are no logits"


def _decode_sigmoid(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[queries, 4]`` centre, width and height in 0..1, and ``[queries, classes]`` logits, each class by itself.
    As Deformable DETR, RT-DETR and RF-DETR without their postprocessing."""
    return _decode(outputs[0], sigmoid(outputs[1]), given, threshold)


def _against_sigmoid(outputs: Sequence[Array], given: Given) -> str | None:
    return _against_centres(outputs[0]) or _against_logits(outputs[1])


def _unlikely_sigmoid(outputs: Sequence[Array], given: Given) -> str | None:
    return crowded(sigmoid(outputs[1]))


# One output, boxes and scores beside each other: how Ultralytics exports RT-DETR.


def _find_joined(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    if len(outputs) == 1 and len(outputs[0].dims) == 3 and outputs[0].kind == "float":
        _, queries, width = outputs[0].dims
        if (
            width is not None
            and width > 4
            and (width != 6 or given.classes == 2)
            and queries in (100, 300, 900)
            and not may_be_cells(queries, given)
        ):
            yield Match(tuple(outputs), width - 4)


def _decode_joined(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[queries, 4 + classes]``: centre, width and height in 0..1, scores."""
    return _decode(outputs[0][:, :4], outputs[0][:, 4:].astype(np.float32, copy=False), given, threshold)


def _against_joined(outputs: Sequence[Array], given: Given) -> str | None:
    raw = outputs[0]
    if not raw.any(axis=1).all():
        return "some rows are all 0, as rows of suppressed boxes are"
    return _against_centres(raw[:, :4]) or outside(raw[:, 4:])


def _unlikely_joined(outputs: Sequence[Array], given: Given) -> str | None:
    return crowded(outputs[0][:, 4:])


# Three outputs, by their names: labels, boxes, scores. The size that they are about is an input.


def _find_labelled(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    named = {name: each for each in outputs for name in ("boxes", "scores", "labels") if name in each.name.lower()}
    if len(outputs) == len(named) == 3 and not given.alone:
        boxes, scores, labels = (named[name] for name in ("boxes", "scores", "labels"))
        if [len(each.dims) for each in (boxes, scores, labels)] == [3, 2, 2] and boxes.dims[2] in (4, None):
            yield Match((boxes, scores, labels), ANY_CLASSES)


def _decode_labelled(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[queries, 4]`` corners in pixels, ``[queries]`` scores, ``[queries]`` numbers of classes.
    As in https://github.com/lyuwenyu/RT-DETR, D-FINE and DEIM."""
    corners, scores, labels = outputs
    rows = np.flatnonzero(scores > threshold)
    return Boxes(corners[rows].astype(np.float32), scores[rows].astype(np.float32), labels[rows].astype(np.int64))


def _against_labelled(outputs: Sequence[Array], given: Given) -> str | None:
    corners, scores, labels = outputs
    found = corners[scores > PADDING]
    return against_numbers(labels) or outside(scores) or against_pixels(found, given.tensor)


QUERIES: Mapping[str, Decoder] = {
    "detr": Decoder(
        _find_logits(1), _decode_detr, _against_detr, 0.5, {"resize": "squash", **_IMAGENET},
        words=r"logits|box|dets|labels", suppressed=True, unlikely=_unlikely_detr,
    ),
    "detr-sigmoid": Decoder(
        _find_logits(0), _decode_sigmoid, _against_sigmoid, 0.5, {"resize": "squash", "scale": 1 / 255},
        words=r"logits|box|dets|labels", suppressed=True, unlikely=_unlikely_sigmoid,
    ),
    "detr-joined": Decoder(
        _find_joined, _decode_joined, _against_joined, 0.25, {"resize": "squash", "scale": 1 / 255}, suppressed=True,
        unlikely=_unlikely_joined,
    ),
    "rtdetr": Decoder(
        _find_labelled, _decode_labelled, _against_labelled, 0.5, {"resize": "squash", "scale": 1 / 255},
        named=True, suppressed=True,
    ),
}  # fmt: skip
"""DETR; what gives a score for each class by itself; RT-DETR of Ultralytics, and with its postprocessing."""
