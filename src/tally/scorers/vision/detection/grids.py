"""Decoders of small detectors with priors or one grid: SSD, RFB, FastestDet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tally.scorers.vision.detection.base import (
    Boxes,
    Decoder,
    Given,
    Match,
    Output,
    against_shares,
    best,
    corners_of,
    outside,
)
from tally.scorers.vision.detection.yolo import pairs, sums_to_one
from tally.scorers.vision.preprocess import Array


def _find_ssd(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    for match in pairs(outputs):
        if match.classes > 1:
            yield match._replace(classes=match.classes - 1)


def _decode_ssd(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[priors, 4]`` corners in 0..1, and ``[priors, 1 + classes]`` probabilities, background first.
    As in https://github.com/Linzaer/Ultra-Light-Fast-Generic-Face-Detector-1MB."""
    corners, scores = (each.astype(np.float32, copy=False) for each in outputs)
    rows, values, classes = best(scores[:, 1:], threshold)
    return Boxes(corners[rows] * np.array(given.tensor * 2, np.float32), values, classes)


def _against_ssd(outputs: Sequence[Array], given: Given) -> str | None:
    corners, scores = outputs
    if (wrong := outside(scores)) is not None:
        return wrong
    if not sums_to_one(scores):
        return "the scores of a box do not add up to 1: no class is the background"
    return against_shares(corners)


def _find_fastestdet(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    if len(outputs) != 1 or len(outputs[0].dims) != 4 or outputs[0].kind != "float" or given.size is None:
        return
    _, width, rows, columns = outputs[0].dims
    fits = columns in (None, given.size[0] // 16) and rows in (None, given.size[1] // 16)
    if fits and width is not None and width > 5:
        yield Match(tuple(outputs), width - 5)


def _decode_fastestdet(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[5 + classes, rows, columns]``: objectness, x and y offset of the centre (tanh, in cells), w and h
    (sigmoid, of the whole), class scores; score = objectness^0.6 * class^0.4.
    As in https://github.com/dog-qiuqiu/FastestDet."""
    raw = outputs[0].astype(np.float32, copy=False)
    size, cells = np.array(given.tensor, np.float32), np.array([raw.shape[2], raw.shape[1]], np.float32)
    flat = raw.reshape(raw.shape[0], -1).T
    score = np.maximum(flat[:, :1], 0) ** 0.6 * np.maximum(flat[:, 5:], 0) ** 0.4
    rows, scores, classes = best(score, threshold)
    flat = flat[rows]
    cell = np.stack([rows % raw.shape[2], rows // raw.shape[2]], axis=1)
    centre = (cell + np.tanh(flat[:, 1:3])) / cells * size
    half = 0.5 * (1 + np.tanh(flat[:, 3:5] / 2)) / 2 * size
    return Boxes(corners_of(centre, half), scores, classes)


def _against_fastestdet(outputs: Sequence[Array], given: Given) -> str | None:
    return outside(outputs[0][:1], "objectness") or outside(outputs[0][5:])


GRIDS: Mapping[str, Decoder] = {
    "fastestdet": Decoder(
        _find_fastestdet, _decode_fastestdet, _against_fastestdet, 0.5,
        {"resize": "squash", "channels": "bgr", "scale": 1 / 255},
    ),
    "ssd": Decoder(
        _find_ssd, _decode_ssd, _against_ssd, 0.7,
        {"resize": "squash", "interpolation": "bicubic", "channels": "rgb", "mean": 127, "std": 128},
        background=True,
    ),
}  # fmt: skip
