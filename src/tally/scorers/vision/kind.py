"""What kinds of model share whose models are of pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tally.models.base import Kind
from tally.models.labels import read_labels
from tally.models.reference import ModelRef

_FOUND = ("file", "classes", "batch", "size_order")
"""Options that inspecting the model tells."""

_ONLY_FOR = {
    "top": "classify",
    "softmax": "classify",
    "decoder": "detect",
    "keypoints": "detect",
    "anchors": "detect",
    "iou_threshold": "detect",
    "output": "segment",
}
"""Options that mean something for one task only."""


class VisionKind(Kind):
    """A kind of model of pictures: its packages say how pictures are prepared, and what the outputs are.

    Models of it that take tables have options without ``preprocess``.
    """

    reads_files = False
    comments: ClassVar[Mapping[str, str]] = {
        "task": "classify, detect, restyle, embed, segment or values",
        "labels": "names of the classes, one per line, in the model's order",
        "preprocess": "how a picture becomes the model's input",
        "size": "width, height in pixels",
        "resize": "squash, crop (shorter side, then the centre) or letterbox",
        "channels": "rgb, bgr or gray",
        "scale": "a pixel x in 0..255 becomes (x * scale - mean) / std",
        "mean": "in the model's channel order",
        "top": "how many classes to report",
        "softmax": "auto, always or never",
        "decoder": "how boxes are decoded",
        "outputs": "the model's outputs that hold the result, by name",
        "threshold": "boxes, or classes, that score less are left out",
        "keypoints": "how many points a box has, and how many numbers each",
        "anchors": "widths and heights of anchors, or yolov5, yolov7",
        "iou_threshold": "boxes of one class that overlap more are one",
    }

    def package(self, ref: ModelRef) -> dict[str, Any]:
        if "preprocess" not in ref.options:
            return super().package(ref)
        options = {name: value for name, value in ref.options.items() if name not in _FOUND}
        return {"file": ref.entry, "options": options}

    def starting_options(self, ref: ModelRef) -> dict[str, Any]:
        if "preprocess" not in ref.options:
            return super().starting_options(ref)
        options, task = ref.options, ref.options["task"]
        labels, classes = options.get("labels"), options.get("classes")
        if isinstance(labels, str):
            labels = read_labels(ref.location / ref.artifacts / labels)
        elif labels is None and classes and task in ("classify", "detect", "segment"):
            labels = [f"class {number}" for number in range(classes)]  # placeholders, to be replaced
        without = {*_FOUND, "threads", *(name for name, only in _ONLY_FOR.items() if only != task)}
        return {name: value for name, value in options.items() if name not in without} | {"labels": labels}
