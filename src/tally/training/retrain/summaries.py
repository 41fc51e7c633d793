"""A retraining for TensorBoard, under the tags of TensorFlow's ``retrain.py``, and the pictures of its test.

Event files lie in the folders ``train``, ``validation`` and ``test`` of the run's own folder of summaries.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tally.errors import ItemError
from tally.media.images import decode
from tally.text import storable
from tally.training.retrain.dataset import Dataset
from tally.training.retrain.examples import Indices
from tally.training.retrain.head import Batch, Evaluation, Head, Tested
from tally.training.runs.events import EventWriter, Node, histogram
from tally.training.runs.store import LONGEST_METRIC
from tally.training.style.synthetic_images import Pixels

SECONDS = 1.0
"""Evaluations of so long are handed over to the files together: their threads would wake for each."""
HISTOGRAMS = 20
"""Summaries of weights and activations in one run, at most; scalars are written at each evaluation."""
MISCLASSIFIED = 50
"""The most test pictures that are shown."""
_SIDE = 320
"""Pixels of such a picture's longer side."""
_OPS = "final_training_ops"
_ROOM = 40
"""Classes up to which a confusion matrix has room for numbers."""


class Summaries:
    """Writes the event files of one run into ``folder``. Raises RunError where TensorBoard is not installed.

    steps: of the training. tensor: the name of the model's output.
    """

    def __init__(self, folder: Path, steps: int, tensor: str = "final_result") -> None:
        self._folder, self._steps, self._tensor = folder, steps, tensor
        self._writers: dict[str, EventWriter] = {}
        self._next = 0.0
        self._waiting: list[tuple[str, dict[str, Any]]] = []
        self._written = time.monotonic()

    def writer(self, part: str) -> EventWriter:
        if part not in self._writers:
            self._writers[part] = EventWriter(self._folder / part)
        return self._writers[part]

    def graph(self, head: Head) -> None:
        """What is trained, as TensorBoard draws it."""
        features, classes = head.weights.shape
        nodes = [
            Node("input/BottleneckInputPlaceholder", "Placeholder", (), (None, features)),
            Node("input/GroundTruthInput", "Placeholder", (), (None,)),
            Node(f"{_OPS}/weights/final_weights", "VariableV2", (), (features, classes)),
            Node(f"{_OPS}/biases/final_biases", "VariableV2", (), (classes,)),
            Node(
                f"{_OPS}/Wx_plus_b/MatMul",
                "MatMul",
                ("input/BottleneckInputPlaceholder", f"{_OPS}/weights/final_weights"),
                (None, classes),
            ),
            Node(
                f"{_OPS}/Wx_plus_b/add",
                "Add",
                (f"{_OPS}/Wx_plus_b/MatMul", f"{_OPS}/biases/final_biases"),
                (None, classes),
            ),
            Node(self._tensor, "Softmax", (f"{_OPS}/Wx_plus_b/add",), (None, classes)),
            Node("cross_entropy/Mean", "Mean", (f"{_OPS}/Wx_plus_b/add", "input/GroundTruthInput"), ()),
            Node("train/GradientDescent", "GradientDescent", ("cross_entropy/Mean",)),
            Node("accuracy/Mean", "Mean", (self._tensor, "input/GroundTruthInput"), ()),
        ]
        self.writer("train").graph(nodes)

    def evaluation(self, found: Evaluation) -> None:
        weights: tuple[dict[str, float], dict[str, Any]] | None = None
        if found.step >= self._next or found.step == self._steps - 1:
            self._next = found.step + self._steps / HISTOGRAMS
            weights = _of_weights(found.head)
        for part, batch in (("train", found.train), ("validation", found.validation)):
            if batch is not None:
                self._batch(part, found.step, batch, weights)
        if time.monotonic() - self._written >= SECONDS:
            self._hand_over()

    def test(self, step: int, tested: Tested, images: Mapping[str, Pixels]) -> None:
        writer = self.writer("test")
        batch = tested.batch
        writer.add(step, scalars={"accuracy_1": batch.accuracy, "cross_entropy_1": batch.cross_entropy}, images=images)

    def _batch(
        self, part: str, step: int, batch: Batch, weights: tuple[dict[str, float], dict[str, Any]] | None
    ) -> None:
        scalars = {"accuracy_1": batch.accuracy, "cross_entropy_1": batch.cross_entropy}
        histograms: dict[str, Any] = {}
        if weights is not None:
            scalars |= weights[0]
            histograms |= weights[1]
            histograms[f"{_OPS}/Wx_plus_b/pre_activations"] = batch.logits
            histograms["activations"] = batch.probabilities
        event = {"step": step, "scalars": scalars, "histograms": histograms, "at": time.time()}
        self._waiting.append((part, event))

    def _hand_over(self) -> None:
        self._written = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for part, event in waiting:
            self.writer(part).add(**event)

    def flush(self) -> None:
        """Bring all that was given to the disk."""
        self._hand_over()
        for each in self._writers.values():
            each.flush()

    def close(self) -> None:
        self._hand_over()
        for each in self._writers.values():
            each.close()


def _of_weights(head: Head) -> tuple[dict[str, float], dict[str, Any]]:
    """Figures and histograms of weights and biases by their tags."""
    scalars: dict[str, float] = {}
    histograms: dict[str, Any] = {}
    for name, values in (("weights", head.weights), ("biases", head.biases)):
        place = f"{_OPS}/{name}/summaries"
        scalars |= {
            f"{place}/mean": float(values.mean()),
            f"{place}/stddev_1": float(values.std()),
            f"{place}/max": float(values.max()),
            f"{place}/min": float(values.min()),
        }
        histograms[f"{place}/histogram"] = histogram(values)
    return scalars, histograms


def test_pictures(dataset: Dataset, tested: Tested, labels: Indices) -> dict[str, Pixels]:
    """Name to picture: the confusion matrix, and the test pictures that were taken for another class, with what they
    were taken for, the surest mistakes first. labels: of all examples, ``int64[n]``."""
    found = {"confusion_matrix": confusion_matrix(tested.confusion, dataset.labels)}
    chosen = tested.batch.logits.argmax(axis=1)
    wrong = tested.wrong(labels)
    sureness = tested.batch.probabilities[wrong, chosen[wrong]]
    for at in wrong[np.argsort(-sureness, kind="stable")][:MISCLASSIFIED].tolist():
        picture = dataset.pictures[int(tested.rows[at])]
        share = float(tested.batch.probabilities[at, chosen[at]])
        caption = f"{dataset.labels[picture.label]}, taken for {dataset.labels[int(chosen[at])]} ({share:.0%})"
        try:
            pixels, _ = decode(picture.path.read_bytes(), (_SIDE, _SIDE))
        except (OSError, ItemError):  # it was there when its bottleneck was computed; the number says what it was
            continue
        name = f"misclassified/{storable(picture.key)}"
        if len(name) > LONGEST_METRIC:
            half = LONGEST_METRIC // 2 - 1
            name = f"{name[:half]}…{name[-half:]}"
        found[name] = captioned(pixels, caption)
    return found


def captioned(pixels: Pixels, caption: str) -> Pixels:
    """A picture ``uint8[h, w, 3]``, made smaller, above a line of text."""
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    font = ImageFont.load_default(size=14)
    box = font.getbbox(caption)
    width, line = max(image.width, int(box[2]) + 12), 24
    canvas = Image.new("RGB", (width, image.height + line), "white")
    canvas.paste(image, ((width - image.width) // 2, 0))
    ImageDraw.Draw(canvas).text((6, image.height + 3), caption, fill="black", font=font)
    return np.asarray(canvas)


def confusion_matrix(counts: Indices, labels: Sequence[str]) -> Pixels:
    """Counts ``int64[classes, classes]`` by label (rows) and by the class that was predicted (columns), as a picture.

    Cells are as dark as the share of their row. With many classes there is room for colours alone.
    """
    number = len(labels)
    font = ImageFont.load_default(size=14)
    roomy = number <= _ROOM
    shown = [label if len(label) <= 24 else f"{label[:23]}…" for label in labels] if roomy else []
    longest = max((int(font.getbbox(each)[2]) for each in shown), default=0)
    cell = max(4, min(56, 1200 // number)) if not roomy else 56
    margin = longest + 40 if roomy else 40
    title = "rows: labels, columns: predictions"
    width = max(margin + number * cell, 8 + int(font.getbbox(title)[2])) + 12
    canvas = Image.new("RGB", (width, margin + number * cell + 12), "white")
    draw = ImageDraw.Draw(canvas)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for row in range(number):
        for column in range(number):
            share = float(shares[row, column])
            left, top = margin + column * cell, margin + row * cell
            # From white to a dark blue.
            colour = tuple(round(255 + share * (dark - 255)) for dark in (8, 48, 107))
            draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=colour, outline="#dddddd")
            if roomy:
                ink = "white" if share > 0.5 else "black"
                draw.text((left + cell / 2, top + cell / 2), str(counts[row, column]), ink, font, anchor="mm")
    for at, name in enumerate(shown):
        middle = margin + at * cell + cell / 2
        draw.text((margin - 8, middle), name, "black", font, anchor="rm")
        upright = Image.new("RGB", (longest + 8, 20), "white")
        ImageDraw.Draw(upright).text((4, 10), name, "black", font, anchor="lm")
        turned = upright.rotate(90, expand=True)
        canvas.paste(turned, (int(middle) - 10, margin - 4 - turned.height))
    draw.text((8, 8), title, "#555555", font)
    return np.asarray(canvas)
