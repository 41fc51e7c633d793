"""Decoders of models whose outputs are told by their names: frameworks whose exports suppress boxes, and YuNet."""

from __future__ import annotations

import re
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
    against_shares,
    outside,
)
from tally.scorers.vision.detection.yolo import ULTRALYTICS, against_cells, from_cells, grid
from tally.scorers.vision.preprocess import Array


def _by_name(outputs: Sequence[Output], *patterns: str) -> tuple[Output, ...] | None:
    """One output for each pattern, in this order, or None."""
    found = []
    for pattern in patterns:
        fitting = [each for each in outputs if re.fullmatch(pattern, each.name.lower().split("/")[-1])]
        if len(fitting) != 1:
            return None
        found += fitting
    return tuple(found)


def _ranks(outputs: Sequence[Output], *ranks: int) -> bool:
    """Whether outputs have so many axes; what has unknown ones may."""
    return all(not each.dims or len(each.dims) == rank for each, rank in zip(outputs, ranks, strict=True))


def _taken(corners: Array, scores: Array, classes: Array, threshold: float) -> Boxes:
    rows = np.flatnonzero(scores > threshold)
    return Boxes(corners[rows].astype(np.float32), scores[rows].astype(np.float32), classes[rows].astype(np.int64))


# -------------------------------------------------------------------------------------------------- TensorRT


_COUNT = r"num|num_dets?|num_detections|.*num.*dets?.*"


def _find_counted(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    found = _by_name(outputs, _COUNT, r".*boxes", r".*scores", r".*(classes|labels)")
    if found is not None and len(outputs) == 4 and _ranks(found[1:], 3, 2, 2) and found[3].kind == "integer":
        yield Match(found, ANY_CLASSES)


def _decode_counted(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """How many there are, ``[boxes, 4]`` corners in pixels, ``[boxes]`` scores and numbers of classes; what follows
    those is not used. As TensorRT's EfficientNMS, and the YOLO exports that have it."""
    count = int(outputs[0].reshape(-1)[0])
    corners, scores, classes = (each[:count] for each in outputs[1:])
    return _taken(corners, scores, classes, threshold)


def _against_counted(outputs: Sequence[Array], given: Given) -> str | None:
    count = int(outputs[0].reshape(-1)[0])
    if not 0 <= count <= len(outputs[1]):
        return f"there would be {count} boxes of {len(outputs[1])}"
    corners, scores, classes = (each[:count] for each in outputs[1:])
    return against_numbers(classes) or outside(scores) or against_pixels(corners, given.tensor)


# ----------------------------------------------------------------------------------- TensorFlow's detection API


def _find_tensorflow(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    found = _by_name(outputs, r"detection_boxes.*", r"detection_scores.*", r"detection_classes.*")
    counted = _by_name(outputs, r"num_detections.*")
    if found is not None and counted and _ranks(found, 3, 2, 2) and found[2].kind == "float":
        yield Match((*found, *counted), ANY_CLASSES)


def _decode_tensorflow(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[boxes, 4]``: top, left, bottom, right in 0..1; scores; numbers of classes, from 1 on; how many there are.
    As in https://github.com/tensorflow/models (research/object_detection)."""
    corners, scores, classes, count = (each.astype(np.float32, copy=False) for each in outputs)
    number = int(count.reshape(-1)[0])
    corners = corners[:number, [1, 0, 3, 2]] * np.array(given.tensor * 2, np.float32)
    return _taken(corners, scores[:number], classes[:number], threshold)


def _against_tensorflow(outputs: Sequence[Array], given: Given) -> str | None:
    corners, scores, classes, count = outputs
    number = int(count.reshape(-1)[0])
    if not 0 <= number <= len(corners):
        return f"there would be {number} boxes of {len(corners)}"
    return against_numbers(classes) or outside(scores) or against_shares(corners[:number])


# ------------------------------------------------------------------------------------------------ torchvision


def _find_torchvision(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    """By kinds and axes: exports name them by numbers, too. Those of a model without an axis for pictures have one
    of 1 in front."""
    kinds = {(each.kind, len(each.dims) - (given.alone)): each for each in outputs}
    boxes, scores, labels = kinds.get(("float", 2)), kinds.get(("float", 1)), kinds.get(("integer", 1))
    if boxes is not None and scores is not None and labels is not None and boxes.dims[-1] == 4:
        yield Match((boxes, scores, labels), ANY_CLASSES)


def _decode_torchvision(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[boxes, 4]`` corners in pixels, ``[boxes]`` scores, ``[boxes]`` numbers of classes, from 1 on.
    As in https://github.com/pytorch/vision (Faster R-CNN, RetinaNet, SSD, FCOS)."""
    corners, scores, labels = outputs
    return _taken(corners.reshape(-1, 4), scores.reshape(-1), labels.reshape(-1), threshold)


def _against_torchvision(outputs: Sequence[Array], given: Given) -> str | None:
    corners, scores, labels = outputs[0].reshape(-1, 4), outputs[1].reshape(-1), outputs[2].reshape(-1)
    if len(labels) and labels.min() < 1:
        return "there is a class 0, which is the background"
    return outside(scores) or against_pixels(corners[scores > PADDING], given.tensor)


# ------------------------------------------------------------------------------------------------ MMDetection


def _find_mmdetection(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    found = _by_name(outputs, r"dets|boxes|bboxes", r"labels")
    if found is not None and _ranks(found, 3, 2) and found[0].dims[2:] == (5,):
        yield Match(found, ANY_CLASSES)


def _decode_mmdetection(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[boxes, 5]``: corners in pixels, score; ``[boxes]`` numbers of classes.
    As https://github.com/open-mmlab/mmdeploy exports it."""
    dets, labels = outputs
    return _taken(dets[:, :4], dets[:, 4], labels, threshold)


def _against_mmdetection(outputs: Sequence[Array], given: Given) -> str | None:
    dets, labels = outputs
    found = dets[dets[:, 4] > PADDING]
    return against_numbers(labels) or outside(dets[:, 4]) or against_pixels(found, given.tensor)


# ---------------------------------------------------------------------------------------------- Custom Vision


def _find_customvision(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
    found = _by_name(outputs, r"detected_boxes", r"detected_scores", r"detected_classes")
    if found is not None:
        yield Match(found, ANY_CLASSES)


def _decode_customvision(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """``[boxes, 4]`` corners in 0..1, ``[boxes]`` scores, ``[boxes]`` numbers of classes.
    As Azure Custom Vision exports its compact detectors."""
    corners, scores, classes = outputs[0].reshape(-1, 4), outputs[1].reshape(-1), outputs[2].reshape(-1)
    return _taken(corners * np.array(given.tensor * 2, np.float32), scores, classes, threshold)


def _against_customvision(outputs: Sequence[Array], given: Given) -> str | None:
    return against_numbers(outputs[2]) or outside(outputs[1]) or against_shares(outputs[0].reshape(-1, 4))


# ------------------------------------------------------------------------------------------------------ YuNet


_YUNET_TAKES = {"resize": "letterbox", "anchor": "top-left", "fill": 0, "channels": "bgr"}
_YUNET = re.compile(r"(cls|obj|bbox|kps)_(\d+)")


def _yunet(outputs: Sequence[Output]) -> dict[tuple[str, int], Output]:
    found = {}
    for output in outputs:
        if (told := _YUNET.fullmatch(output.name)) is not None:
            found[told[1], int(told[2])] = output
    return found


def _find_yunet(*parts: str) -> Callable[[Sequence[Output], Given], Iterator[Match]]:
    """With these parts, for each of its strides, and mostly with objectness."""

    def find(outputs: Sequence[Output], given: Given) -> Iterator[Match]:
        found = _yunet(outputs)
        strides = sorted({stride for _, stride in found})
        wanted = [part for part in (*parts, "obj") if part != "obj" or any(name == "obj" for name, _ in found)]
        if {*found} == {(part, stride) for part in wanted for stride in strides} and len(outputs) == len(found) > 0:
            taken = tuple(found[part, stride] for part in wanted for stride in strides)
            points = found["kps", strides[0]].dims[-1] if "kps" in parts else None
            classes = found["cls", strides[0]].dims[-1]
            yield Match(taken, classes or 1, (points // 2, 2) if points else None)

    return find


def _decode_yunet(outputs: Sequence[Array], given: Given, threshold: float) -> Boxes:
    """For each stride ``[cells, classes]`` scores, ``[cells, 4]`` x, y relative to the cell and log of w, h, all in
    strides, and mostly ``[cells, 1]`` objectness and ``[cells, 10]`` points of a face.
    As in https://github.com/ShiqiYu/libfacedetection.train and OpenCV's FaceDetectorYN."""
    joined, cells = _joined(outputs, given)
    scores = joined["cls"].clip(0, 1)
    if "obj" in joined:
        scores = np.sqrt(scores * joined["obj"].clip(0, 1))
    classes = scores.argmax(axis=1)
    scores = scores.max(axis=1)
    rows = np.flatnonzero(scores > threshold)
    more = {}
    if "kps" in joined:
        points = joined["kps"][rows].reshape(len(rows), -1, 2)
        more = {"keypoints": (points + cells[rows, None, :2]) * cells[rows, None, 2:]}
    return Boxes(from_cells(joined["bbox"][rows], cells[rows]), scores[rows], classes[rows], more)


def _joined(outputs: Sequence[Array], given: Given) -> tuple[dict[str, Array], Array]:
    """The outputs' parts, all strides together, and the cells. Parts are told by their widths and their order."""
    counts = [len(each) for each in outputs]
    levels = next(n for n in range(1, len(counts) + 1) if counts[:n] * (len(counts) // n) == counts)
    parts = [
        np.concatenate(outputs[at : at + levels]).astype(np.float32, copy=False)
        for at in range(0, len(outputs), levels)
    ]
    names = ["cls", "bbox", *("obj" if part.shape[1] == 1 else "kps" for part in parts[2:])]
    area = given.tensor[0] * given.tensor[1]
    cells = grid(given.tensor, [round((area / count) ** 0.5) for count in counts[:levels]])
    return dict(zip(names, parts, strict=True)), cells


def _against_yunet(outputs: Sequence[Array], given: Given) -> str | None:
    joined, cells = _joined(outputs, given)
    if len(cells) != len(joined["bbox"]):
        return f"{len(joined['bbox'])} cells for a picture of {given.tensor[0]}x{given.tensor[1]}"
    return outside(joined["cls"]) or against_cells(joined["bbox"])


NAMED: Mapping[str, Decoder] = {
    "efficientnms": Decoder(
        _find_counted, _decode_counted, _against_counted, 0.25, ULTRALYTICS, named=True, suppressed=True
    ),
    "tensorflow": Decoder(
        _find_tensorflow, _decode_tensorflow, _against_tensorflow, 0.5, {"resize": "squash", "channels": "rgb"},
        named=True, suppressed=True, first=1, any_size=True,
    ),
    "torchvision": Decoder(
        _find_torchvision, _decode_torchvision, _against_torchvision, 0.5,
        {"resize": "squash", "channels": "rgb", "scale": 1 / 255},
        named=True, suppressed=True, first=1, single=True, any_size=True,
    ),
    "mmdetection": Decoder(
        _find_mmdetection, _decode_mmdetection, _against_mmdetection, 0.3,
        {"resize": "letterbox", "anchor": "top-left", "fill": 0, "channels": "rgb",
         "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]},
        named=True, suppressed=True,
    ),
    "customvision": Decoder(
        _find_customvision, _decode_customvision, _against_customvision, 0.5, {"resize": "squash", "channels": "bgr"},
        named=True, suppressed=True, single=True, any_size=True,
    ),
    "yunet": Decoder(
        _find_yunet("cls", "bbox", "kps"), _decode_yunet, _against_yunet, 0.6, _YUNET_TAKES, "pose", named=True
    ),
    "yunet-boxes": Decoder(
        _find_yunet("cls", "bbox"), _decode_yunet, _against_yunet, 0.6, _YUNET_TAKES, named=True
    ),
}  # fmt: skip
"""By the framework that wrote them."""
