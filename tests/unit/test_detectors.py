"""Every form of detectors, made up here in three sizes and with two layouts of boxes each: the boxes that were put into
it come out, in pixels of the original picture, and the form is recognised without being said."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tally.errors import ModelRefutedError, SpecError
from tally.scorers.base import Item
from tally.scorers.onnx.scorer import OnnxVisionScorer, inspect
from tally.scorers.vision.detection.base import Boxes
from tally.scorers.vision.detection.decoders import DECODERS
from tally.scorers.vision.detection.rows import mask_of, runs
from tally.scorers.vision.detection.suppression import nms

Array = Any
Size = tuple[int, int]
SIZES: tuple[Size, ...] = ((128, 128), (224, 160), (96, 192))
PICTURE = (300, 170)
"""Width and height of the picture that is scored: neither has the proportions of a tensor."""
NAMES = ["cat", "dog", "bird"]


@dataclass(frozen=True)
class Target:
    """A box as shares of the tensor's sides. angle: in radians."""

    box: tuple[float, float, float, float]
    kind: int
    score: float
    angle: float = 0.0

    def corners(self, size: Size) -> Array:
        return np.array(self.box) * (size * 2)

    def centre(self, size: Size) -> Array:
        left, top, right, bottom = self.corners(size)
        return np.array([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top])


LAYOUTS = (
    (Target((0.10, 0.15, 0.40, 0.55), 1, 0.9, 0.4), Target((0.55, 0.30, 0.85, 0.70), 2, 0.8, -0.3)),
    (
        Target((0.35, 0.40, 0.65, 0.70), 0, 0.95, 0.7),
        Target((0.05, 0.05, 0.27, 0.29), 2, 0.85),
        Target((0.70, 0.62, 0.95, 0.93), 0, 0.75, 0.2),
    ),
)


@dataclass(frozen=True)
class Form:
    """What a model gives. outputs: by their names, without a batch axis. more: options that have to be said."""

    outputs: Mapping[str, Array]
    metadata: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    labels: bool = True
    batch: bool = True


Make = Callable[[Any, Size, "np.random.Generator"], Form]
FORMS: dict[str, tuple[str, Make]] = {}
"""The form's name → the decoder that it is recognised as, and what writes it."""


def form(name: str, decoder: str | None = None) -> Callable[[Make], Make]:
    def add(make: Make) -> Make:
        FORMS[name] = (decoder or name, make)
        return make

    return add


# ----------------------------------------------------------------------------------- what forms are made of


def strewn(count: int, size: Size, rng: Any) -> Array:
    """Centres and sides all over the picture."""
    sides = rng.uniform(0.05, 0.4, (2, count)) * min(size)
    return np.stack([rng.uniform(0, size[0], count), rng.uniform(0, size[1], count), *sides], axis=1)


def cells(size: Size, strides: tuple[int, ...] = (8, 16, 32)) -> int:
    return sum((size[0] // stride) * (size[1] // stride) for stride in strides)


def cell_of(target: Target, size: Size, stride: int) -> tuple[int, int]:
    x, y, _, _ = target.centre(size)
    return int(x // stride), int(y // stride)


def index_of(target: Target, size: Size, stride: int = 8) -> int:
    column, row = cell_of(target, size, stride)
    return row * (size[0] // stride) + column


def low(rng: Any, *shape: int) -> Array:
    return rng.uniform(0, 0.04, shape)


def logit(share: Any) -> Any:
    return np.log(share) - np.log1p(-np.asarray(share))


def centred(targets: Any, size: Size, rng: Any, *, count: int, objectness: float | None, beside: int = 0) -> Array:
    """``[count, 4 (+ 1) + classes + beside]``: centre, width and height in pixels."""
    rows = strewn(count, size, rng)
    scores = low(rng, count, 3) if objectness is None else rng.uniform(0, 0.3, (count, 3))
    sure = np.full((count, 1), 1.0) if objectness == 1 else low(rng, count, 1)
    scores = low(rng, count, 3) if objectness == 1 else scores
    for target in targets:
        at = index_of(target, size)
        rows[at] = target.centre(size)
        scores[at] = 0.01
        scores[at, target.kind] = target.score / (objectness or 1)
        sure[at] = objectness or 1
    parts = [rows, scores] if objectness is None else [rows, sure, scores]
    return np.concatenate([*parts, np.zeros((count, beside))], axis=1)


ULTRALYTICS = {"author": "Ultralytics", "stride": "32", "names": str(dict(enumerate(NAMES)))}


@form("yolox")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = np.concatenate([rng.normal(0, 0.5, (cells(size), 4)), low(rng, cells(size), 1),
                          rng.uniform(0, 0.5, (cells(size), 3))], axis=1)  # fmt: skip
    for target in targets:
        (column, row), (x, y, w, h) = cell_of(target, size, 8), target.centre(size)
        raw[index_of(target, size)] = [x / 8 - column, y / 8 - row, np.log(w / 8), np.log(h / 8), 0.96, 0, 0, 0]
        raw[index_of(target, size), 5 + target.kind] = target.score / 0.96
    return Form({"output": raw})


@form("yolox-decoded")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output": centred(targets, size, rng, count=cells(size), objectness=0.97)})


@form("yolov6")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"outputs": centred(targets, size, rng, count=cells(size), objectness=1.0)})


@form("yolov5")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": centred(targets, size, rng, count=3 * cells(size), objectness=0.97)}, {"names": str(NAMES)},
                labels=False)  # fmt: skip


@form("yolov5 with its maps", "yolov5")
def _(targets: Any, size: Size, rng: Any) -> Form:
    """How YOLOv5 was exported for years: the maps before the last layers are outputs, too."""
    maps = {f"map{stride}": rng.normal(0, 1, (3, size[1] // stride, size[0] // stride, 8)) for stride in (8, 16, 32)}
    return Form({"output": centred(targets, size, rng, count=3 * cells(size), objectness=0.97), **maps})


@form("yolov8")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": centred(targets, size, rng, count=cells(size), objectness=None).T},
                {**ULTRALYTICS, "task": "detect"}, labels=False)  # fmt: skip


@form("yolov8 without metadata", "yolov8")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": centred(targets, size, rng, count=cells(size), objectness=None).T})


@form("yolov8 transposed", "yolov8")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": centred(targets, size, rng, count=cells(size), objectness=None)})


@form("yolov8 with four strides", "yolov8")
def _(targets: Any, size: Size, rng: Any) -> Form:
    count = cells(size, (4, 8, 16, 32))
    return Form({"output0": centred(targets, size, rng, count=count, objectness=None).T})


@form("yolov8-obb")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": turned(targets, size, rng).T}, {**ULTRALYTICS, "task": "obb"}, labels=False)


@form("yolov8-obb without metadata", "yolov8-obb")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": turned(targets, size, rng).T})


def turned(targets: Any, size: Size, rng: Any) -> Array:
    raw = centred(targets, size, rng, count=cells(size), objectness=None, beside=1)
    raw[:, -1] = rng.uniform(-0.7, 2.3, len(raw))
    for target in targets:
        raw[index_of(target, size), -1] = target.angle
    return raw


def points(target: Target, size: Size, numbers: int) -> Array:
    """Two keypoints: a third and two thirds of the way from the top left corner to the bottom right one."""
    left, top, right, bottom = target.corners(size)
    found = [[left + (right - left) * at, top + (bottom - top) * at, 0.9 - at] for at in (1 / 3, 2 / 3)]
    return np.array(found)[:, :numbers].ravel()


@form("yolov8-pose")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = centred(targets, size, rng, count=cells(size), objectness=None, beside=6)
    for target in targets:
        raw[index_of(target, size), 7:] = points(target, size, 3)
    return Form({"output0": raw.T}, {**ULTRALYTICS, "task": "pose", "kpt_shape": "[2, 3]"}, labels=False)


@form("yolov8-pose without scores", "yolov8-pose")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = centred(targets, size, rng, count=cells(size), objectness=None, beside=4)
    for target in targets:
        raw[index_of(target, size), 7:] = points(target, size, 2)
    return Form({"output0": raw.T}, {**ULTRALYTICS, "task": "pose", "kpt_shape": "[2, 2]"}, labels=False)


@form("yolov5-pose")
def _(targets: Any, size: Size, rng: Any) -> Form:
    """As YOLOv7's pose models."""
    raw = centred(targets, size, rng, count=3 * cells(size), objectness=0.97, beside=6)
    for target in targets:
        raw[index_of(target, size), 8:] = points(target, size, 3)
    return Form({"output": raw}, more={"keypoints": [2, 3]})


PROTOTYPES = 8


def prototypes(size: Size) -> Array:
    """The first is the picture's left half, the second its upper half; the others are nothing."""
    found = np.zeros((PROTOTYPES, size[1] // 4, size[0] // 4))
    found[0], found[1] = -5, -5
    found[0, :, : size[0] // 8] = 5
    found[1, : size[1] // 8] = 5
    return found


def masked(targets: Any, size: Size, raw: Array, at: Callable[[int, Target], int]) -> Array:
    for number, target in enumerate(targets):
        raw[at(number, target), -PROTOTYPES:] = np.eye(PROTOTYPES)[number % 2]
    return raw


@form("yolov8-segment")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = centred(targets, size, rng, count=cells(size), objectness=None, beside=PROTOTYPES)
    raw = masked(targets, size, raw, lambda _, target: index_of(target, size))
    return Form({"output0": raw.T, "output1": prototypes(size)}, {**ULTRALYTICS, "task": "segment"}, labels=False)


@form("yolov5-segment")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = centred(targets, size, rng, count=3 * cells(size), objectness=0.97, beside=PROTOTYPES)
    raw = masked(targets, size, raw, lambda _, target: index_of(target, size))
    return Form({"output0": raw, "output1": prototypes(size)})


def suppressed(targets: Any, size: Size, *, rows: int = 300, beside: int = 0, centres: bool = False) -> Array:
    raw = np.zeros((rows, 6 + beside))
    for at, target in enumerate(targets):
        raw[at, :6] = [*(target.centre(size) if centres else target.corners(size)), target.score, target.kind]
    return raw


@form("end-to-end")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": suppressed(targets, size)}, {**ULTRALYTICS, "task": "detect"}, labels=False)


@form("end-to-end without metadata", "end-to-end")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"output0": suppressed(targets, size, rows=100)})


@form("end-to-end-obb")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = suppressed(targets, size, beside=1, centres=True)
    raw[: len(targets), 6] = [target.angle for target in targets]
    return Form({"output0": raw}, {**ULTRALYTICS, "task": "obb"}, labels=False)


@form("end-to-end-pose")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = suppressed(targets, size, beside=6)
    raw[: len(targets), 6:] = [points(target, size, 3) for target in targets]
    return Form({"output0": raw}, {**ULTRALYTICS, "task": "pose", "kpt_shape": "(2, 3)"}, labels=False)


@form("end-to-end-segment")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = masked(targets, size, suppressed(targets, size, beside=PROTOTYPES), lambda number, _: number)
    return Form({"output0": raw, "output1": prototypes(size)}, {**ULTRALYTICS, "task": "segment"}, labels=False)


@form("yolov8-raw")
def _(targets: Any, size: Size, rng: Any) -> Form:
    maps = {}
    for stride in (8, 16, 32):
        raw = rng.normal(0, 1, (67, size[1] // stride, size[0] // stride))
        raw[64:] = -5
        for target in targets if stride == 16 else ():
            (column, row), (left, top, right, bottom) = cell_of(target, size, 16), target.corners(size)
            x, y = column + 0.5, row + 0.5
            sides = np.array([x - left / 16, y - top / 16, right / 16 - x, bottom / 16 - y])
            bins = np.full((4, 16), -30.0)
            for bin_, side in zip(bins, sides, strict=True):
                bin_[int(side)], bin_[int(side) + 1] = np.log(1 - side % 1 + 1e-9), np.log(side % 1 + 1e-9)
            raw[:64, row, column] = bins.ravel()
            raw[64 + target.kind, row, column] = logit(target.score)
        maps[f"map{stride}"] = raw
    return Form(maps)


ANCHORS = {8: (20, 30, 32, 48, 60, 40), 16: (40, 60, 64, 96, 120, 80), 32: (99, 99, 120, 120, 200, 200)}


@form("yolov5-raw")
def _(targets: Any, size: Size, rng: Any) -> Form:
    maps = {}
    for stride, anchors in ANCHORS.items():
        raw = rng.normal(0, 1, (3, size[1] // stride, size[0] // stride, 8))
        raw[..., 4] = -6
        for target in targets if stride == 8 else ():
            (column, row), (x, y, w, h) = cell_of(target, size, 8), target.centre(size)
            cell = raw[1, row, column]
            cell[:2] = logit([(x / 8 - column + 0.5) / 2, (y / 8 - row + 0.5) / 2])
            cell[2:4] = logit([np.sqrt(w / anchors[2]) / 2, np.sqrt(h / anchors[3]) / 2])
            cell[4], cell[5:] = logit(0.97), -6
            cell[5 + target.kind] = logit(target.score / 0.97)
        maps[f"map{stride}"] = raw
    return Form(maps, more={"anchors": [*ANCHORS.values()]})


@form("yolov7-end-to-end")
def _(targets: Any, size: Size, rng: Any) -> Form:
    rows = [[0, *target.corners(size), target.kind, target.score] for target in targets]
    return Form({"output": np.array(rows)}, batch=False)


@form("yolonas")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = centred(targets, size, rng, count=cells(size), objectness=None)
    corners = np.concatenate([raw[:, :2] - raw[:, 2:4] / 2, raw[:, :2] + raw[:, 2:4] / 2], axis=1)
    return Form({"scores": raw[:, 4:], "boxes": corners})


def queries(targets: Any, size: Size, rng: Any, count: int, logits: Array) -> tuple[Array, Array]:
    boxes = strewn(count, (1, 1), rng)
    for at, target in enumerate(targets):
        boxes[at] = target.centre((1, 1))
        logits[at] = -6
        logits[at, target.kind] = logit(target.score)
    return boxes, logits


@form("detr")
def _(targets: Any, size: Size, rng: Any) -> Form:
    boxes, logits = queries(targets, size, rng, 100, rng.normal(0, 1, (100, 4)))
    logits[len(targets) :, 3] = 9
    for at, target in enumerate(targets):
        logits[at] = [np.log((1 - target.score) / 3)] * 4
        logits[at, target.kind] = np.log(target.score)
    return Form({"logits": logits, "pred_boxes": boxes})


@form("detr-sigmoid")
def _(targets: Any, size: Size, rng: Any) -> Form:
    """As RF-DETR calls its outputs."""
    boxes, logits = queries(targets, size, rng, 300, rng.normal(-6, 0.5, (300, 3)))
    return Form({"dets": boxes, "labels": logits})


@form("detr-joined")
def _(targets: Any, size: Size, rng: Any) -> Form:
    boxes, logits = queries(targets, size, rng, 300, rng.normal(-6, 0.5, (300, 3)))
    return Form({"output0": np.concatenate([boxes, 1 / (1 + np.exp(-logits))], axis=1)})


@form("rtdetr")
def _(targets: Any, size: Size, rng: Any) -> Form:
    count = 30
    boxes, scores, labels = np.sort(rng.uniform(0, 1, (count, 4))), low(rng, count), rng.integers(0, 3, count)
    for at, target in enumerate(targets):
        boxes[at], scores[at], labels[at] = target.box, target.score, target.kind
    return Form({"labels": labels, "boxes": boxes, "scores": scores})


@form("fastestdet")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = rng.normal(0, 1, (8, size[1] // 16, size[0] // 16))
    raw[0], raw[5:] = 0.01, 0.3
    for target in targets:
        (column, row), (x, y, w, h) = cell_of(target, size, 16), target.centre(size)
        raw[:, row, column] = [target.score, np.arctanh(x / 16 - column), np.arctanh(y / 16 - row),
                               logit(w / size[0]), logit(h / size[1]), 0, 0, 0]  # fmt: skip
        raw[5 + target.kind, row, column] = target.score
    return Form({"758": raw})


@form("ssd")
def _(targets: Any, size: Size, rng: Any) -> Form:
    count = 500
    centres = strewn(count, (1, 1), rng)
    corners = np.concatenate([centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], axis=1)
    scores = np.tile([0.97, 0.01, 0.01, 0.01], (count, 1))
    for at, target in enumerate(targets):
        corners[at], scores[at] = target.box, (1 - target.score) / 3
        scores[at, 1 + target.kind] = target.score
    return Form({"scores": scores, "boxes": corners})


@form("efficientnms")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = suppressed(targets, size, rows=100)
    raw[len(targets) :] = 7  # what nobody cleared
    return Form({"num_dets": np.array([len(targets)], np.int32), "det_boxes": raw[:, :4], "det_scores": raw[:, 4],
                 "det_classes": raw[:, 5].astype(np.int32)})  # fmt: skip


@form("tensorflow")
def _(targets: Any, size: Size, rng: Any) -> Form:
    boxes, scores, classes = np.zeros((100, 4)), np.zeros(100), np.ones(100)
    for at, target in enumerate(targets):
        left, top, right, bottom = target.box
        boxes[at], scores[at], classes[at] = (top, left, bottom, right), target.score, target.kind + 1
    return Form({"detection_boxes": boxes, "detection_classes": classes, "detection_scores": scores,
                 "num_detections": np.array(100.0), "raw_detection_scores": rng.uniform(0, 1, (50, 3))})  # fmt: skip


@form("torchvision")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"2770": np.array([target.corners(size) for target in targets]),
                 "2771": np.array([target.kind + 1 for target in targets]),
                 "2772": np.array([target.score for target in targets])}, batch=False)  # fmt: skip


@form("mmdetection")
def _(targets: Any, size: Size, rng: Any) -> Form:
    raw = suppressed(targets, size, rows=100)
    return Form({"dets": raw[:, :5], "labels": raw[:, 5].astype(np.int64)})


@form("customvision")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form({"detected_boxes": np.array([target.box for target in targets]),
                 "detected_classes": np.array([target.kind for target in targets]),
                 "detected_scores": np.array([target.score for target in targets])}, batch=False)  # fmt: skip


def yunet(targets: Any, size: Size, rng: Any) -> dict[str, Array]:
    found = {}
    for stride in (8, 16, 32):
        count = cells(size, (stride,))
        parts = {"cls": low(rng, count, 3), "obj": low(rng, count, 1), "bbox": rng.normal(0, 1, (count, 4)),
                 "kps": rng.normal(0, 1, (count, 4))}  # fmt: skip
        for target in targets if stride == 16 else ():
            (column, row), (x, y, w, h) = cell_of(target, size, 16), target.centre(size)
            at = index_of(target, size, 16)
            parts["cls"][at], parts["obj"][at] = 0, target.score
            parts["cls"][at, target.kind] = target.score
            parts["bbox"][at] = [x / 16 - column, y / 16 - row, np.log(w / 16), np.log(h / 16)]
            parts["kps"][at] = points(target, size, 2) / 16 - [column, row, column, row]
        found |= {f"{part}_{stride}": values for part, values in parts.items()}
    return found


@form("yunet")
def _(targets: Any, size: Size, rng: Any) -> Form:
    return Form(yunet(targets, size, rng))


@form("yunet-boxes")
def _(targets: Any, size: Size, rng: Any) -> Form:
    found = yunet(targets, size, rng)
    return Form({name: values for name, values in found.items() if not name.startswith("kps")})


# ----------------------------------------------------------------------------------------- models of them


def write(path: Path, made: Form, size: Size, *, dims: Any = None, order: str = "wh") -> None:
    """A model that finds the same in each picture. RT-DETR's follows the size that it is told."""
    dims = dims or [1, 3, size[1], size[0]]
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "0"], ["nil"]),
    ]
    inputs, weights = [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims)], [weight("0", np.float32(0))]
    if "labels" in made.outputs and "boxes" in made.outputs:
        inputs.append(helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, [None, 2]))
        weights.append(weight("order", np.array([0, 1, 0, 1] if order == "wh" else [1, 0, 1, 0])))
        nodes += [
            helper.make_node("Cast", ["orig_target_sizes"], ["told"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["told", "order"], ["sides"], axis=1),
        ]
    outputs = []
    for name, values in made.outputs.items():
        value = values[None] if made.batch and values.ndim + made.batch > 0 and len(dims) == 4 else values
        value = value.astype(np.float32) if value.dtype.kind == "f" else value
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        weights.append(weight(f"{name}_", value))
        nodes += [helper.make_node("Cast", ["nil"], [f"{name}_nil"], to=kind),
                  helper.make_node("Add", [f"{name}_", f"{name}_nil"], [f"{name}_is"])]  # fmt: skip
        last = ["Mul", [f"{name}_is", "sides"]] if len(inputs) > 1 and name == "boxes" else ["Identity", [f"{name}_is"]]
        nodes.append(helper.make_node(*last, [name]))
        outputs.append(helper.make_tensor_value_info(name, kind, value.shape))
    graph = helper.make_graph(nodes, "graph", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, dict(made.metadata))
    path.write_bytes(model.SerializeToString())


def weight(name: str, values: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values), name)


def rows_of(path: Path, **options: Any) -> tuple[OnnxVisionScorer, list[dict[str, Any]]]:
    scorer = OnnxVisionScorer(inspect(path, options))
    scorer.load(path.parent, "cpu")
    item = Item(
        "a.png", np.full((PICTURE[1], PICTURE[0], 3), 90, np.uint8), {"width": PICTURE[0], "height": PICTURE[1]}
    )
    [rows] = scorer.score([scorer.prepare(item)])
    if isinstance(rows, Exception):
        raise rows
    for row in rows:
        assert list(row) == list(scorer.columns or {})
    return scorer, rows


def back(where: Array, size: Size, preprocess: Mapping[str, Any]) -> Array:
    """Points of the tensor on the original picture, worked out anew."""
    if preprocess["resize"] == "squash":
        return where / size * PICTURE
    factor = min(size[0] / PICTURE[0], size[1] / PICTURE[1])
    border = [side - int(own * factor) for side, own in zip(size, PICTURE, strict=True)]
    shift = np.array([each // 2 for each in border]) if preprocess["anchor"] == "center" else np.zeros(2)
    return (where - shift) / factor


def corners_of(target: Target, size: Size) -> Array:
    x, y, w, h = target.centre(size)
    turn = np.array([[np.cos(target.angle), -np.sin(target.angle)], [np.sin(target.angle), np.cos(target.angle)]])
    return np.array([[x, y]]) + np.array([[-w, -h], [w, -h], [w, h], [-w, h]]) / 2 @ turn.T


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_what_was_put_in_comes_out(name: str, size: Size, tmp_path: Path) -> None:
    decoder, make = FORMS[name]
    for number, targets in enumerate(LAYOUTS):
        made = make(targets, size, np.random.default_rng(number))
        path = tmp_path / f"{number}.onnx"
        write(path, made, size)
        scorer, rows = rows_of(path, **({"labels": NAMES} if made.labels else {}), **made.more, iou_threshold=0.9)
        assert scorer.options.decoder == decoder
        gives, preprocess = DECODERS[decoder].gives, scorer.options.preprocess.model_dump()
        assert [row["label"] for row in rows] == [NAMES[target.kind] for target in targets]
        for row, target in zip(rows, targets, strict=True):
            assert row["score"] == pytest.approx(target.score, abs=0.01)
            if gives == "obb":
                corners = back(corners_of(target, size), size, preprocess)
                np.testing.assert_allclose(np.reshape(row["corners"], (4, 2)), corners, atol=1)
            else:
                corners = back(target.corners(size).reshape(2, 2), size, preprocess)
            around = [*corners.min(axis=0), *corners.max(axis=0)]
            np.testing.assert_allclose([row[side] for side in ("xmin", "ymin", "xmax", "ymax")], around, atol=1)
            if gives == "pose":
                where = back(points(target, size, 2).reshape(2, 2), size, preprocess)
                np.testing.assert_allclose(np.reshape(row["keypoints"], (2, 2)), where, atol=1)
                assert row.get("keypoint_scores", [0.567, 0.233]) == pytest.approx([0.567, 0.233], abs=0.01)
            if gives == "segment":
                check_mask(row, targets.index(target), size, preprocess)


def test_what_is_assumed_is_said_with_all_its_numbers(tmp_path: Path) -> None:
    size = SIZES[0]
    write(tmp_path / "m.onnx", FORMS["mmdetection"][1](LAYOUTS[0], size, np.random.default_rng(0)), size)
    scorer, _ = rows_of(tmp_path / "m.onnx", labels=NAMES)
    said = " ".join(scorer.options.assumed)
    assert "RGB, 0..255 less 123.675, 116.28, 103.53, divided by 58.395, 57.12, 57.375, letterbox" in said


def check_mask(row: Mapping[str, Any], number: int, size: Size, preprocess: Mapping[str, Any]) -> None:
    """The half of the picture that the mask stands for, inside the box."""
    mask = mask_of(row["mask"], *PICTURE)
    assert mask.sum() == row["pixels"]
    middle = back(np.array(size) / 2, size, preprocess)[number % 2]
    y, x = np.mgrid[: PICTURE[1], : PICTURE[0]] + 0.5
    inside = (x > row["xmin"]) & (x < row["xmax"]) & (y > row["ymin"]) & (y < row["ymax"])
    edge = np.abs((x if number % 2 == 0 else y) - middle) < 8  # a mask is a quarter of the tensor, and smoothed
    assert (mask == inside & ((x if number % 2 == 0 else y) < middle))[~edge].mean() > 0.99
    assert not mask[~inside].any() or mask[~inside].mean() < 0.01


def test_every_decoder_is_tried() -> None:
    assert {decoder for decoder, _ in FORMS.values()} == set(DECODERS)


# ---------------------------------------------------------------------------------------- what is told by more


@pytest.mark.parametrize("order", ["wh", "hw"])
def test_the_second_input_is_told_the_size_in_its_order(order: str, tmp_path: Path) -> None:
    size = (96, 192)
    write(tmp_path / "m.onnx", FORMS["rtdetr"][1](LAYOUTS[0], size, np.random.default_rng(0)), size, order=order)
    scorer, rows = rows_of(tmp_path / "m.onnx")
    assert scorer.options.size_order == ("width, height" if order == "wh" else "height, width")
    assert rows[0]["xmin"] == pytest.approx(0.1 * PICTURE[0], abs=1)
    assert rows[0]["ymax"] == pytest.approx(0.55 * PICTURE[1], abs=1)


def test_a_model_of_three_axes(tmp_path: Path) -> None:
    size = (128, 96)
    made = FORMS["torchvision"][1](LAYOUTS[0], size, np.random.default_rng(0))
    write(tmp_path / "m.onnx", made, size, dims=[3, size[1], size[0]])
    scorer, rows = rows_of(tmp_path / "m.onnx", labels=["background", *NAMES])
    assert (scorer.options.decoder, scorer.batch_size) == ("torchvision", 1)
    assert [row["label"] for row in rows] == ["dog", "bird"]


def test_labels_that_are_too_few_end_the_job(tmp_path: Path) -> None:
    size = SIZES[0]
    write(
        tmp_path / "m.onnx", FORMS["end-to-end without metadata"][1](LAYOUTS[0], size, np.random.default_rng(0)), size
    )
    with pytest.raises(ModelRefutedError, match="gives a class 2, and there are 2 labels"):
        rows_of(tmp_path / "m.onnx", labels=["cat", "dog"])


def test_anchors_are_asked_for(tmp_path: Path) -> None:
    size = SIZES[0]
    write(tmp_path / "m.onnx", FORMS["yolov5-raw"][1](LAYOUTS[0], size, np.random.default_rng(0)), size)
    with pytest.raises(SpecError, match=r"anchors: the model takes 3 lists of 6 numbers.*yolov5, yolov7"):
        rows_of(tmp_path / "m.onnx")
    assert rows_of(tmp_path / "m.onnx", anchors="yolov7")[0].options.anchors is not None


@pytest.mark.parametrize(
    "metadata",
    [
        {"names": "['cat', 'dog', 'bird']"},
        {"names": '{"0": "cat", "2": "bird", "1": "dog"}'},
        {"class_names": "cat,dog,bird"},
        {"classes": "cat\ndog\nbird\n"},
        {"id2label": '{"0": "cat", "1": "dog", "2": "bird"}'},
    ],
)
def test_names_from_the_metadata_of_exporters(metadata: dict[str, str], tmp_path: Path) -> None:
    size = SIZES[0]
    made = FORMS["end-to-end without metadata"][1](LAYOUTS[0], size, np.random.default_rng(0))
    write(tmp_path / "m.onnx", Form(made.outputs, metadata), size)
    assert [row["label"] for row in rows_of(tmp_path / "m.onnx")[1]] == ["dog", "bird"]


@pytest.mark.parametrize("metadata", [{"imgsz": "[96, 192]"}, {"image_size": "(96, 192)"}, {"input_size": "[96,192]"}])
def test_the_size_from_the_metadata(metadata: dict[str, str], tmp_path: Path) -> None:
    size = (192, 96)
    made = FORMS["yolov8"][1](LAYOUTS[0], size, np.random.default_rng(0))
    write(tmp_path / "m.onnx", Form(made.outputs, {**made.metadata, **metadata}), size, dims=["n", 3, "h", "w"])
    scorer, rows = rows_of(tmp_path / "m.onnx")
    assert (scorer.size, len(rows)) == (size, 2)
    with pytest.raises(SpecError, match="200x96 is no multiple of the model's stride of 32 pixels"):
        inspect(tmp_path / "m.onnx", {"preprocess": {"size": "200x96"}})


def test_boxes_that_metadata_say_to_be_more_are_not_taken_for_boxes(tmp_path: Path) -> None:
    size = SIZES[0]
    made = FORMS["yolov8-pose"][1](LAYOUTS[0], size, np.random.default_rng(0))
    write(tmp_path / "m.onnx", Form(made.outputs, {**ULTRALYTICS, "task": "pose"}), size)
    with pytest.raises(SpecError, match="nothing that Tally knows fits"):
        inspect(tmp_path / "m.onnx", {})
    assert inspect(tmp_path / "m.onnx", {"keypoints": [2, 3]})["decoder"] == "yolov8-pose"


# ------------------------------------------------------------------------------------------------ the parts


def test_oriented_boxes_suppress_each_other_by_how_they_lie() -> None:
    box = [10, 45, 90, 55]
    found = Boxes(np.array([box] * 3, np.float32), np.array([0.9, 0.8, 0.7], np.float32), np.zeros(3, np.int64),
                  {"angle": np.array([0.0, np.pi / 2, 0.02], np.float32)})  # fmt: skip
    assert nms(found, 0.45).scores.tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize("inside", [np.eye(3, dtype=bool), np.ones((4, 2), bool), np.zeros((2, 2), bool)])
@pytest.mark.parametrize("place", [(0, 0), (2, 1), (4, 3)])
def test_runs_of_masks(inside: Array, place: tuple[int, int]) -> None:
    whole = np.zeros((7, 7), bool)
    high, wide = min(inside.shape[0], 7 - place[1]), min(inside.shape[1], 7 - place[0])
    whole[place[1] : place[1] + high, place[0] : place[0] + wide] = inside[:high, :wide]
    lengths = runs(inside[:high, :wide], *place, 7, 7)
    np.testing.assert_array_equal(mask_of(lengths, 7, 7), whole)
    assert lengths == runs(whole, 0, 0, 7, 7)
    with pytest.raises(ValueError, match="a mask of 50 pixels"):
        mask_of([50], 7, 7)
