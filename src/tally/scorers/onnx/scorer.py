"""Scores pictures with ONNX vision models.

:func:`inspect` looks at a model once, when a job is described, and fills in every option that was left out.
:class:`OnnxVisionScorer` takes those options to the workers and scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tally.errors import ItemError, ModelLoadError, ModelRefutedError, SpecError
from tally.models.base import Kind
from tally.models.labels import read_labels
from tally.models.reference import ModelRef
from tally.scorers.base import Item, Result, Scorer
from tally.scorers.onnx.options import OnnxOptions, inspect
from tally.scorers.onnx.session import choose_providers, external_names, open_session, plain_reason
from tally.scorers.vision.detection import DECODERS, detect_rows, outside
from tally.scorers.vision.heads import Facts, Task, evident, fit_of, objection
from tally.scorers.vision.outputs import (
    classify_rows,
    label_map,
    probabilities,
    restore_image,
    restore_map,
    segment_rows,
)
from tally.scorers.vision.preprocess import Array, Prepared, Preprocessor, made_up_pictures

__all__ = ["OnnxOptions", "OnnxVisionScorer", "inspect"]

_SHORT_NAMES = {
    "CPUExecutionProvider": "CPU",
    "CUDAExecutionProvider": "CUDA",
    "TensorrtExecutionProvider": "TensorRT",
}


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


class OnnxKind(Kind):
    """ONNX models of pictures."""

    reads_files = False
    comments = {  # noqa: RUF012
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
        "score_threshold": "boxes below it are left out",
        "iou_threshold": "boxes of one class that overlap more are one",
    }

    def recognises(self, path: Path) -> bool:
        from tally.scorers.tabular.onnx import takes_table

        return not takes_table(path)

    def companions(self, path: Path) -> list[str]:
        return external_names(path)

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        return inspect(path, options)

    def create(self, ref: ModelRef) -> Scorer:
        return OnnxVisionScorer(ref.options)

    def package(self, ref: ModelRef) -> dict[str, Any]:
        options = {name: value for name, value in ref.options.items() if name not in _FOUND}
        return {"file": ref.entry, "options": options}

    def starting_options(self, ref: ModelRef) -> dict[str, Any]:
        options, task = ref.options, ref.options["task"]
        labels, classes = options.get("labels"), options.get("classes")
        if isinstance(labels, str):
            labels = read_labels(ref.location / ref.artifacts / labels)
        elif labels is None and classes and task in ("classify", "detect", "segment"):
            labels = [f"class {number}" for number in range(classes)]  # placeholders, to be replaced
        without = {*_FOUND, "threads", *(name for name, only in _ONLY_FOR.items() if only != task)}
        return {name: value for name, value in options.items() if name not in without} | {"labels": labels}


_FOUND = ("file", "classes", "batch")
"""Options that inspecting the model tells."""

_ONLY_FOR = {
    "top": "classify",
    "softmax": "classify",
    "decoder": "detect",
    "score_threshold": "detect",
    "iou_threshold": "detect",
    "output": "segment",
}
"""Options that mean something for one task only."""


class OnnxVisionScorer(Scorer):
    """Scores pictures with an ONNX model; options as :func:`inspect` returns them.

    classify: ``label, index, score``, and ``rank`` when ``top`` > 1. embed: ``embedding``. values: ``value``, or
    ``values`` where there are several for a picture.
    detect: ``xmin, ymin, xmax, ymax, label, score``, in pixels of the original, not clipped to it.
    segment: ``label, index, pixels, share``, or with ``output: image`` the label map ``uint8[h, w]``.
    restyle: ``uint8[h, w, 3]``. Pictures have the original's size. NaN or infinity makes the item dead.

    The values of the first pictures have to bear out what the model was taken for: where they do not, :meth:`score`
    raises ModelRefutedError before it returns a result.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = OnnxOptions.parse(options)
        task, preprocess = self.options.task, self.options.preprocess
        if task is None or self.options.batch_size is None or preprocess.dtype is None:
            raise SpecError("the options are not complete", hint="Pass them through tally.scorers.onnx.scorer.inspect.")
        self.task: Task = task
        self.batch_size = self.options.batch_size
        self.preprocessor = Preprocessor(preprocess)
        self.size = preprocess.size
        if preprocess.resize == "crop" and self.size:
            self.size = (self.preprocessor.shorter, self.preprocessor.shorter)
        self.output = "rows"
        if task == "restyle" or (task == "segment" and self.options.output == "image"):
            self.output = "image"
        self.columns = None if self.output == "image" else _columns(self.options)
        self.assumed = ()
        self._softmax = self.options.softmax == "always"
        self._taken_as_they_are = False
        self._unchecked = CHECKED
        self._facts = Facts(
            outputs=(),
            size=None,
            channels_last=preprocess.layout == "nhwc",
            task=task,
            logits=self._softmax,
            independent=self.options.softmax == "never",
        )
        self._fit = fit_of(task, self.options.decoder, self._facts, self.options.classes)

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model on the device. Raises ModelLoadError."""
        import onnxruntime

        providers = choose_providers(device, onnxruntime.get_available_providers())
        wants_gpu = len(providers) > 1
        if wants_gpu and hasattr(onnxruntime, "preload_dlls"):
            onnxruntime.preload_dlls()
        path = artifacts / self.options.file
        arena = self.options.preprocess.size is not None
        try:
            self._session = open_session(path, providers, threads=self.options.threads, arena=arena)
        except ModelLoadError:
            if not wants_gpu or device != "auto":
                raise
            self._session = open_session(path, providers[-1:], threads=self.options.threads, arena=arena)
        self._provider = self._session.get_providers()[0]
        if wants_gpu and self._provider == "CPUExecutionProvider" and device != "auto":
            raise ModelLoadError(
                f"device {device} was asked for, but ONNX Runtime could not start it",
                hint="Check the driver with nvidia-smi and that the CUDA and cuDNN libraries are installed.",
            )
        self._input = self._session.get_inputs()[0].name
        decoder = DECODERS.get(self.options.decoder)
        first = [output.name for output in self._session.get_outputs()]
        # jobs of before outputs were named took the first ones
        self._outputs = list(self.options.outputs or first[: decoder.outputs if decoder else 1])
        labels = self.options.labels
        self._names = read_labels(artifacts / labels) if isinstance(labels, str) else list(labels or ())
        if decoder and decoder.background and len(self._names) == (self.options.classes or 0) + 1:
            del self._names[0]
        if self.task == "classify" and self.options.classes is not None:
            self.classes = [self._name(index) for index in range(max(self.options.classes, 2))]
        if self.task == "classify" and self.options.softmax == "auto":
            self._settle_softmax()
            self._taken_as_they_are = not self._softmax

    def _settle_softmax(self) -> None:
        """Find out whether scores are probabilities already: once, and in each worker on the same made-up pictures."""
        summed = True
        for picture in made_up_pictures(self.options.preprocess.size or (224, 224)):
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
        step = self.options.batch or self.batch_size
        for indices in by_shape.values():
            for start in range(0, len(indices), step):
                yield indices[start : start + step]

    def _score(self, group: Sequence[Prepared]) -> list[Result]:
        try:
            outputs = self._run([prepared.tensor for prepared in group])
        except Exception as error:
            if len(group) > 1:
                return [self._score([prepared])[0] for prepared in group]
            reason = plain_reason(str(error)) if str(error) else type(error).__name__
            return [ItemError(f"{group[0].key}: the model failed: {reason}")]
        if self._unchecked or not self._as_decided(outputs[0]):
            for i, prepared in enumerate(group):
                self._check(prepared, [output[i : i + 1] for output in outputs])
        return [self._finish(p, [output[i] for output in outputs]) for i, p in enumerate(group)]

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
            shape = prepared.tensor.shape
            size = (shape[2], shape[1]) if self.preprocessor.nchw else (shape[1], shape[0])
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
        outputs: list[Array] = self._session.run(self._outputs, {self._input: stacked})
        for output in outputs:
            if output.ndim == 0 or len(output) != len(tensors):
                raise ItemError(f"an output of shape {list(output.shape)} for {len(tensors)} pictures")
        return outputs

    def _finish(self, prepared: Prepared, outputs: list[Array]) -> Result:
        """One picture's outputs to its result; an error is the item's alone."""
        if any(o.dtype.kind == "f" and not np.isfinite(o).all() for o in outputs):
            return ItemError(f"{prepared.key}: the model's output holds NaN or infinity")
        try:
            return self._postprocess(prepared, outputs)
        except ItemError as error:
            return error
        except Exception as error:
            return ItemError(f"{prepared.key}: the model's output cannot be used: {error}")

    def _postprocess(self, prepared: Prepared, outputs: list[Array]) -> Result:
        options, first, shape = self.options, outputs[0], prepared.tensor.shape
        height, width = shape[1:] if self.preprocessor.nchw else shape[:2]
        size = (width, height)
        if self.all_classes and self.classes is not None:
            return {"scores": probabilities(first, softmax=self._softmax).tolist()}
        if self.task == "classify":
            return classify_rows(first, self._name, top=options.top, softmax=self._softmax)
        if self.task == "values":
            found = first.reshape(-1).astype(np.float32).tolist()
            return {"value": found[0]} if options.classes == 1 else {"values": found}
        if self.task == "embed":
            return {"embedding": first.reshape(-1).astype(np.float32).tolist()}
        if self.task == "detect":
            return detect_rows(
                outputs,
                prepared,
                self._name,
                decoder=options.decoder,
                size=size,
                score_threshold=options.score_threshold or 0.0,
                iou_threshold=options.iou_threshold,
            )
        if self.task == "restyle":
            return restore_image(self.preprocessor.pixels(first), prepared, size)
        last = not self.preprocessor.nchw
        classes = label_map(first, (height, width), channels_last=last, logits=self._softmax)
        if self.output == "image":
            return restore_map(classes, prepared, size).astype(np.uint8)
        return segment_rows(classes, prepared, size, self._name)

    def _name(self, index: int) -> str:
        return self._names[index] if index < len(self._names) else str(index)

    def describe(self) -> str:
        options = self.options
        where = _SHORT_NAMES.get(self._provider, self._provider)
        if where == "CPU":
            where += f" ({options.threads} thread{'s' if options.threads > 1 else ''})"
        task = f"detect ({options.decoder})" if self.task == "detect" else self.task
        size = options.preprocess.size
        shown = f"{size[0]}x{size[1]}" if size else "any size"
        return f"{options.file} on {where}, {task}, {shown}, batch {self.batch_size}"

    def close(self) -> None:
        self.__dict__.pop("_session", None)


def _columns(options: OnnxOptions) -> dict[str, str]:
    if options.task == "values":
        return {"value": "float32"} if options.classes == 1 else {"values": "list<float32>"}
    if options.task == "embed":
        return {"embedding": "list<float32>"}
    if options.task == "detect":
        return {
            **dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), "float32"),
            "label": "string",
            "score": "float32",
        }
    if options.task == "segment":
        return {"label": "string", "index": "int64", "pixels": "int64", "share": "float32"}
    rank = {"rank": "int64"} if options.top > 1 else {}
    return {"label": "string", "index": "int64", "score": "float32", **rank}
