"""Scores pictures with vision models, whatever framework runs them.

A framework's own scorer opens the model; all that is done before and after it is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from tally.errors import ItemError, ModelRefutedError, SpecError, error_line
from tally.models.labels import read_labels
from tally.scorers.base import Item, Result, Row, Scorer
from tally.scorers.runtime import Runtime
from tally.scorers.vision.detection.base import Given, outside
from tally.scorers.vision.detection.decoders import DECODERS
from tally.scorers.vision.detection.rows import columns, detect_rows
from tally.scorers.vision.heads import Facts, Task, evident, fit_of, objection
from tally.scorers.vision.options import VisionOptions, has_background
from tally.scorers.vision.outputs import (
    classify_rows,
    label_map,
    probabilities,
    restore_image,
    restore_map,
    segment_rows,
)
from tally.scorers.vision.overlay import colour_of, draw
from tally.scorers.vision.preprocess import MADE_UP_SIZE, Array, Prepared, Preprocessor, Size, made_up_pictures

CHECKED = 64
"""Pictures of which each worker checks whether their values bear out what the model was taken for. Those whose values
leave it open do not count."""

_SAY_OTHERWISE = {
    "detect": "Say with --set decoder=... how its boxes are decoded, or --task values for the numbers as they are.",
    "segment": "Say --task values for a map of something else; for logits of a foreground --set softmax=always, for "
    "independent scores of classes --set softmax=never.",
    "restyle": "Say with --set preprocess.scale=1/255 (mean, std) what values its pictures have, or --task segment.",
    "classify": "Say with --task what the model does: embed, say.",
}


class VisionScorer(Scorer):
    """Scores pictures; options as :func:`tally.scorers.vision.options.complete` returns them.

    A framework subclasses it with ``options_type`` and :meth:`open`.

    classify: ``label, index, score``, and ``rank`` when ``top`` is not 1. embed: ``embedding``. values: ``value``, or
    ``values`` and their ``shape`` where there are several for a picture.
    detect: ``xmin, ymin, xmax, ymax, label, score``, in pixels of the original, not clipped to it, and what some models
    give beside it: see :func:`tally.scorers.vision.detection.rows.detect_rows`.
    segment: ``label, index, pixels, share``, or with ``output: image`` the label map ``uint8[h, w]``,
    with ``colours`` a picture of it with the names of its classes.
    restyle: ``uint8[h, w, 3]``. Pictures have the original's size. NaN or infinity makes the item dead.

    The values of the first pictures have to bear out what the model was taken for: where they do not, :meth:`score`
    raises ModelRefutedError before it returns a result.
    """

    options_type: ClassVar[type[VisionOptions]] = VisionOptions

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = self.options_type.parse(options)
        task, preprocess = self.options.task, self.options.preprocess
        if task is None or self.options.batch_size is None or preprocess.dtype is None:
            raise SpecError(
                "the options are not complete", hint="Pass them through inspect() of the framework's module."
            )
        self.task: Task = task
        self.batch_size = self.options.batch_size
        self.preprocessor = Preprocessor(preprocess)
        self.size = preprocess.size
        if preprocess.resize == "crop" and self.size:
            self.size = (self.preprocessor.shorter, self.preprocessor.shorter)
        self.output = "rows"
        if task == "restyle" or (task == "segment" and self.options.output != "rows"):
            self.output = "image"
        self.columns = None if self.output == "image" else _columns(self.options)
        self.assumed = ()
        self._softmax = self.options.softmax == "always"
        self._taken_as_they_are = False
        self._unchecked = CHECKED
        self._compared = task == "detect"  # of rows in the order of their scores, two may change places
        self._facts = Facts(
            outputs=(),
            size=None,
            channels_last=preprocess.layout == "nhwc",
            task=task,
            logits=self._softmax,
            independent=self.options.softmax == "never",
            keypoints=self.options.keypoints,
            anchors=self.options.anchors,
        )
        self._fit = fit_of(task, self.options.decoder, self._facts, self.options.classes)

    def open(self, path: Path, device: str) -> Runtime:
        """Open the model on a device, as :meth:`Scorer.load` is given it. Raises ModelLoadError."""
        raise NotImplementedError(f"{type(self).__name__} must define open(path, device)")

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model on the device. Raises ModelLoadError."""
        self._runtime = self.open(artifacts / self.options.file, device)
        [self._input] = self._runtime.inputs
        decoder = DECODERS.get(self.options.decoder)
        self._outputs = list(self.options.outputs or self._runtime.outputs[:1])
        self._single = decoder is not None and decoder.single
        labels = self.options.labels
        self._names = read_labels(artifacts / labels) if isinstance(labels, str) else list(labels or ())
        if decoder and decoder.background and len(self._names) == (self.options.classes or 0) + 1:
            del self._names[0]
        if decoder and decoder.first and self._names and not has_background(self._names):
            self._names.insert(0, "background")
        if self.task == "classify" and self.options.classes is not None:
            self.classes = [self._name(index) for index in range(max(self.options.classes, 2))]
        if self.task == "classify" and self.options.softmax == "auto":
            self._settle_softmax()
            self._taken_as_they_are = not self._softmax

    def _settle_softmax(self) -> None:
        """Find out whether scores are probabilities already: once, and in each worker on the same made-up pictures."""
        summed = True
        for picture in made_up_pictures(self.options.preprocess.size or MADE_UP_SIZE):
            try:
                scores = self._run([self.prepare(Item("made up", picture)).tensor])[0][0]
            except Exception:
                return  # the first picture shows what is wrong with it
            if scores.dtype.kind != "f" or not np.isfinite(scores).all():
                return
            if outside(scores) is not None:
                self._softmax = True
                what = "the sigmoid function" if scores.size == 1 else "softmax"
                said = f"{what} is applied: scores are not in 0..1 (--set softmax=never keeps them as they are)"
                self.assumed = (said,)
                return
            summed = scores.size == 1 or abs(float(scores.sum()) - 1) < 0.01
            if summed and scores.size > 1:
                return
        if not summed:
            said = "softmax is not applied: scores lie in 0..1 and do not add up to 1 (--set softmax=always applies it)"
            self.assumed = (said,)

    def prepare(self, item: Item) -> Prepared:
        """Resize and normalise one picture."""
        return self.preprocessor(item)

    def score(self, batch: Sequence[Prepared]) -> Sequence[Result]:
        """Run the model on pictures of equal size together, and turn its outputs into results."""
        results: dict[int, Result] = {}
        for indices in self._groups(batch):
            group = [batch[i] for i in indices]
            results.update(zip(indices, self._score(group), strict=True))
        return [results[i] for i in range(len(batch))]

    def _groups(self, batch: Sequence[Prepared]) -> Iterator[list[int]]:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, prepared in enumerate(batch):
            by_shape.setdefault(prepared.tensor.shape, []).append(i)
        for indices in by_shape.values():
            step = self._at_once(batch[indices[0]])
            for start in range(0, len(indices), step):
                yield indices[start : start + step]

    def _at_once(self, prepared: Prepared) -> int:
        """How many pictures like this one the model is given at once."""
        if self._single:
            return 1
        if self.options.batch:
            return self.options.batch
        if self._runtime.pixels is None:
            return self.batch_size
        width, height = self._size_of(prepared)
        return min(self.batch_size, max(1, self._runtime.pixels // (width * height)))

    def _score(self, group: Sequence[Prepared]) -> list[Result]:
        try:
            outputs = self._run([prepared.tensor for prepared in group])
        except Exception as error:
            if len(group) > 1:
                return [self._score([prepared])[0] for prepared in group]
            reason = error.message if isinstance(error, ItemError) else error_line(error)
            return [ItemError(f"{group[0].key}: the model failed: {reason}")]
        if len(group) > 1 and not self._compared:
            self._compare(group[0], outputs)
        if self._unchecked or not self._as_decided(outputs[0]):
            for i, prepared in enumerate(group):
                self._check(prepared, [output[i : i + 1] for output in outputs])
        return [self._finish(p, [output[i] for output in outputs]) for i, p in enumerate(group)]

    def _compare(self, prepared: Prepared, outputs: Sequence[Array]) -> None:
        """Raises ModelRefutedError if a picture's values depend on those beside it: no two runs would agree. Quantising
        while running moves them a little."""
        self._compared = True
        for name, alone, together in zip(self._outputs, self._run([prepared.tensor]), outputs, strict=True):
            if alone.dtype.kind != "f" or alone.shape[1:] != together.shape[1:]:
                continue
            moved = float(np.abs(alone[0] - together[0]).max(initial=0))
            if moved > 0.1 * float(np.abs(together).max(initial=0)) + 1e-3:
                raise ModelRefutedError(
                    f"{self.options.file} gives other values of {name} for {prepared.key} alone than beside other "
                    f"pictures (they differ by {moved:.4g})",
                    hint="Export it for inference (model.eval()): its normalisation looks at the whole batch. "
                    "--batch-size 1 scores each picture by itself.",
                )

    def _as_decided(self, scores: Array) -> bool:
        """Whether a batch's scores are probabilities, where those of made-up pictures were."""
        if not self._taken_as_they_are or scores.dtype.kind != "f":
            return True
        return bool(scores.min() >= -1e-3 and scores.max() <= 1 + 1e-3)  # False where one is NaN

    def _check(self, prepared: Prepared, values: Sequence[Array]) -> None:
        """Raises ModelRefutedError if the values do not bear out what the model was taken for."""
        if any(each.dtype.kind == "f" and not np.isfinite(each).all() for each in values):
            return  # that picture's own fault
        if not self._as_decided(values[0]):
            wrong = outside(values[0])
            hint = "Say --set softmax=always if softmax is still to be applied, or never to keep them as they are."
        elif self._unchecked:
            size = self._size_of(prepared)
            if self.task == "restyle":
                wrong = self._against_picture(prepared, values[0][0])
                self._unchecked -= 1
            else:
                facts = replace(self._facts, size=size)
                wrong = objection(self._fit, values, facts)
                self._unchecked -= evident(self._fit, values, facts)
            hint = _SAY_OTHERWISE.get(self.task, "Say with --task what the model does.")
        else:
            return
        if wrong is not None:
            what = f"{self.options.decoder} boxes" if self.task == "detect" else self.task
            outputs = " and ".join(f"{n} {list(v.shape)}" for n, v in zip(self._outputs, values, strict=True))
            raise ModelRefutedError(
                f"{self.options.file} was taken for {what}, and its values for {prepared.key} do not bear that out: "
                f"{wrong} (looked at {outputs})",
                hint=hint,
            )

    def _against_picture(self, prepared: Prepared, values: Array) -> str | None:
        """Whether a restyled picture would come out all of one colour, though the original is not."""
        contrasts = [int(np.ptp(self.preprocessor.pixels(each))) for each in (prepared.tensor, values)]
        if contrasts[0] < 64 or contrasts[1] > 8:
            return None
        return f"values between {values.min():.4g} and {values.max():.4g} make a picture of one colour"

    def _run(self, tensors: list[Array]) -> list[Array]:
        count = len(tensors)
        if self.options.batch:
            tensors = tensors + tensors[-1:] * (self.options.batch - count)
        stacked = tensors[0][None] if len(tensors) == 1 else np.stack(tensors)
        outputs: list[Array] = self._runtime.run(self._outputs, {self._input: stacked})
        if self._single:
            return [output[None] for output in outputs]
        for output in outputs:
            if output.ndim == 0 or len(output) != len(tensors):
                raise ItemError(f"an output of shape {list(output.shape)} for {len(tensors)} pictures")
        return outputs

    def _size_of(self, prepared: Prepared) -> Size:
        """Width and height of the tensor."""
        shape = prepared.tensor.shape
        return (shape[2], shape[1]) if self.preprocessor.nchw else (shape[1], shape[0])

    def _finish(self, prepared: Prepared, outputs: list[Array]) -> Result:
        """One picture's outputs to its result; an error is the item's alone."""
        if any(o.dtype.kind == "f" and not np.isfinite(o).all() for o in outputs):
            return ItemError(f"{prepared.key}: the model's output holds NaN or infinity")
        try:
            return self._postprocess(prepared, outputs)
        except ItemError as error:
            return error
        except ModelRefutedError:
            raise
        except Exception as error:
            return ItemError(f"{prepared.key}: the model's output cannot be used: {error}")

    def _postprocess(self, prepared: Prepared, outputs: list[Array]) -> Result:
        options, first, size = self.options, outputs[0], self._size_of(prepared)
        if self.all_classes and self.classes is not None:
            return {"scores": probabilities(first, softmax=self._softmax).tolist()}
        if self.task == "classify":
            return classify_rows(first, self._name, top=options.top, softmax=self._softmax, threshold=options.threshold)
        if self.task == "values":
            found = first.reshape(-1).astype(np.float32).tolist()
            return {"value": found[0]} if options.classes == 1 else {"values": found, "shape": list(first.shape)}
        if self.task == "embed":
            return {"embedding": first.reshape(-1).astype(np.float32).tolist()}
        if self.task == "detect":
            return detect_rows(
                outputs,
                prepared,
                self._name,
                decoder=DECODERS[options.decoder],
                given=Given(size, options.classes, options.keypoints, options.anchors),
                threshold=options.threshold or 0.0,
                iou_threshold=options.iou_threshold,
            )
        if self.task == "restyle":
            return restore_image(self.preprocessor.pixels(first), prepared, size)
        last = not self.preprocessor.nchw
        classes = label_map(first, size[::-1], channels_last=last, logits=self._softmax)
        if options.output == "image":
            return restore_map(classes, prepared, size).astype(np.uint8)
        rows = segment_rows(classes, prepared, size, self._name)
        return rows if options.output == "rows" else self._coloured(restore_map(classes, prepared, size), rows)

    def _coloured(self, classes: Array, rows: Sequence[Row]) -> Array:
        """A label map in colours, with a legend at the top left. The background is black."""
        palette = np.zeros((int(classes.max(initial=0)) + 1, 3), np.uint8)
        shown = [row for row in rows if row["index"] or not has_background(self._names)]
        for row in shown:
            palette[row["index"]] = colour_of(row["label"])
        return draw(palette[classes], sorted(shown, key=lambda row: -row["share"]))

    def _name(self, index: int) -> str:
        if self._names and not 0 <= index < len(self._names):
            raise ModelRefutedError(
                f"{self.options.file} gives a class {index}, and there are {len(self._names)} labels",
                hint="Give the labels that the model was trained with, in its order.",
            )
        return self._names[index] if self._names else str(index)

    def describe(self) -> str:
        options = self.options
        task = f"detect ({options.decoder})" if self.task == "detect" else self.task
        size = options.preprocess.size
        shown = f"{size[0]}x{size[1]}" if size else "any size"
        return f"{options.file} on {self._runtime.where}, {task}, {shown}, batch {self.batch_size}"

    def close(self) -> None:
        self.__dict__.pop("_runtime", None)


def _columns(options: VisionOptions) -> dict[str, str]:
    if options.task == "values":
        return {"value": "float32"} if options.classes == 1 else {"values": "list<float32>", "shape": "list<int64>"}
    if options.task == "embed":
        return {"embedding": "list<float32>"}
    if options.task == "detect":
        return columns(DECODERS[options.decoder], Given(None, options.classes, options.keypoints))
    if options.task == "segment":
        return {"label": "string", "index": "int64", "pixels": "int64", "share": "float32"}
    rank = {"rank": "int64"} if options.top != 1 else {}
    return {"label": "string", "index": "int64", "score": "float32", **rank}
