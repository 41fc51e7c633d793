"""Options of ONNX vision scorers: validated, and completed from what the model file says about itself."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from tally.errors import ModelLoadError, SpecError
from tally.models.labels import read_labels
from tally.scorers.base import Item
from tally.scorers.onnx.session import open_session, signature
from tally.scorers.vision.detection import DECODERS
from tally.scorers.vision.heads import Facts, Fit, Output, Task, show, verdict
from tally.scorers.vision.preprocess import Array, Preprocess, Preprocessor, Size, made_up_pictures

TENSOR_TYPES = {"tensor(uint8)": "uint8", "tensor(float16)": "float16", "tensor(float)": "float32"}
BATCH_SIZES = {"classify": 32, "embed": 32, "values": 32, "detect": 8, "segment": 8, "restyle": 1}
"""For models that take any number of pictures at once; whole pictures out are large, so one at a time."""


def _as_names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _as_labels(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("give the name of a file in the artifacts folder, or a list of names")


class OnnxOptions(BaseModel):
    """Options of an ONNX vision scorer, as written under ``options:`` in ``tally.yaml``.

    file: the model's file name inside the artifacts folder.
    labels: a file there (see :func:`tally.models.labels.read_labels`), or the names themselves.
    top: how many classes to report (classify). softmax: whether scores (of one foreground: the sigmoid's) are still to
        be made probabilities; ``auto`` asks the model once.
    outputs: the model's outputs that are used, by name; found by :func:`inspect` where they are left out.
    output: ``rows`` (pixels of each class) or ``image`` (the label map), for segment.
    threads: of ONNX Runtime, in each worker. batch_size: pictures scored at once.
    classes, batch, assumed: found by :func:`inspect`: the number of classes, the batch size that the model is
        fixed to, and one sentence for each thing that was inferred.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    task: Task | None = None
    labels: Annotated[str | tuple[str, ...] | None, BeforeValidator(_as_labels)] = None
    preprocess: Preprocess = Preprocess()
    top: Annotated[int, Field(ge=1)] = 1
    softmax: Literal["auto", "always", "never"] = "auto"
    decoder: Literal[
        "auto", "yolox", "yolox-decoded", "yolov5", "yolov8", "end-to-end", "yolonas", "fastestdet", "ssd"
    ] = "auto"
    outputs: Annotated[tuple[str, ...] | None, BeforeValidator(_as_names)] = None
    score_threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    iou_threshold: Annotated[float, Field(ge=0, le=1)] = 0.45
    output: Literal["rows", "image"] = "rows"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    batch_size: Annotated[int, Field(ge=1, le=4096)] | None = None
    classes: int | None = None
    batch: int | None = None
    assumed: tuple[str, ...] = ()

    @field_validator("file", "labels")
    @classmethod
    def _inside(cls, value: Any) -> Any:
        if isinstance(value, str) and (not value or Path(value).is_absolute() or ".." in Path(value).parts):
            raise ValueError("must be a file inside the artifacts folder")
        return value

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> OnnxOptions:
        """Validate. Raises SpecError with every problem."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            raise SpecError(_readable(error)) from None


def _readable(error: ValidationError, prefix: str = "") -> list[str]:
    """pydantic's findings as ``preprocess.size: what is wrong, not 'value'``."""
    problems = []
    for found in error.errors(include_url=False):
        names = [*filter(None, [prefix]), *(str(part) for part in found["loc"])]
        where, message = ".".join(names), found["msg"].removeprefix("Value error, ")
        if found["type"] == "extra_forbidden":
            known = list((Preprocess if names[0] == "preprocess" else OnnxOptions).model_fields)
            near = get_close_matches(names[-1], known, n=1)
            problems.append(f"{where}: no such option" + (f"; did you mean {near[0]}?" if near else ""))
        elif found["type"] == "missing":
            problems.append(f"{where}: is required")
        elif isinstance(found["input"], (dict, BaseModel)):  # checks across fields name them themselves
            problems += [f"{where}.{part}" for part in message.split("; ")]
        else:
            problems.append(f"{where}: {message[:1].lower()}{message[1:]}, not {found['input']!r}")
    return problems


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a model file says about itself. Dimensions are numbers, or None where they vary."""

    path: Path
    input: str
    dims: tuple[int | None, ...]
    dtype: str
    outputs: tuple[Output, ...]
    metadata: Mapping[str, str]


_BY_YOURSELF = "A scorer of your own can run it (docs: write-a-scorer)."


def _dims(shape: Sequence[Any] | None) -> tuple[int | None, ...]:
    return tuple(n if isinstance(n, int) and n > 0 else None for n in shape or ())


def _examine(path: Path) -> _Facts:
    """Read the facts. Raises ModelLoadError unless the model takes pictures and gives tensors."""
    found = signature(path)
    inputs, outputs = found.inputs, found.outputs
    if len(inputs) != 1:
        names = ", ".join(i.name for i in inputs) or "none"
        raise ModelLoadError(
            f"{path}: a vision model takes one picture, this one has {len(inputs)} inputs ({names})", hint=_BY_YOURSELF
        )
    picture = inputs[0]
    dims = _dims(picture.shape)
    if len(dims) != 4 or picture.type not in TENSOR_TYPES:
        raise ModelLoadError(
            f"{path}: a vision model takes a picture, a tensor of four axes in uint8, float16 or float; "
            f"this one takes {picture.name}: {picture.type.removeprefix('tensor').strip('()')} {show(dims)}"
        )
    for output in outputs:
        if not output.type.startswith("tensor(") or output.type == "tensor(string)":
            raise ModelLoadError(
                f"{path}: its output {output.name} is {output.type}; only numbers can be used", hint=_BY_YOURSELF
            )
    return _Facts(
        path,
        picture.name,
        dims,
        TENSOR_TYPES[picture.type],
        tuple(Output(o.name, _dims(o.shape), "integer" if "int" in o.type else "float") for o in outputs),
        found.metadata,
    )


def has_background(labels: Sequence[str]) -> bool:
    """Whether the first label is that of the background."""
    return bool(labels) and labels[0].strip("_ ").lower() in ("background", "bg", "none", "n/a", "unlabeled")


def _names_of(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The labels that the file itself holds (``names``: a mapping from number to name, or a list, as Python)."""
    try:
        names = ast.literal_eval(metadata.get("names", ""))
    except (SyntaxError, ValueError):
        return None
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[number] for number in range(len(names))]
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def inspect(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Look at a model and fill in every option that was left out.

    Returns options (JSON-able) for :class:`~tally.scorers.onnx.scorer.OnnxVisionScorer`; ``assumed`` in them has one
    sentence for each thing that was neither said nor found in the file. A labels file is looked for beside
    the model.
    Raises SpecError with every problem, ModelNotFoundError, ModelLoadError.
    """
    declared = OnnxOptions.parse({"file": path.name, **options})
    return _Resolver(declared, _examine(path)).resolve().model_dump(mode="json")


class _Resolver:
    """Works out what was left out of the options. Collects problems and assumptions on the way."""

    def __init__(self, declared: OnnxOptions, facts: _Facts) -> None:
        self.declared, self.facts, self.given = declared, facts, declared.preprocess
        self.problems: list[str] = []
        self.assumed = list(declared.assumed)
        self.labels = self._labels()

    def resolve(self) -> OnnxOptions:
        layout, count = self._layout()
        height, width = self.facts.dims[2:] if layout == "nchw" else self.facts.dims[1:3]
        fit = self._fit(layout, (width, height))
        task, decoder, classes = fit.head.task, fit.head.decoder, fit.classes
        assert task is not None
        size = self._size(task, (width, height))
        score_threshold = self.declared.score_threshold
        if decoder and score_threshold is None:
            score_threshold = DECODERS[decoder].score_threshold
        if self.labels and classes and len(self.labels) != classes:
            background = decoder and DECODERS[decoder].background and has_background(self.labels)
            if not background or len(self.labels) != classes + 1:
                self.problems.append(f"labels: {len(self.labels)} names, but the model has {classes} classes")
        if not self.labels and task in ("classify", "detect", "segment"):
            self._assume("labels were not given: classes are called by their number")
        if classes and task == "classify" and self.declared.top > classes:
            self.problems.append(f"top: {self.declared.top}, but the model has only {classes} classes")
        if task == "segment" and self.declared.output == "image" and (classes or 0) > 256:
            self.problems.append(f"output: a label map holds up to 256 classes, the model has {classes}; use rows")
        preprocess = self._preprocess(task, decoder, layout, count, size)
        if self.problems:
            raise SpecError(self.problems)
        return self.declared.model_copy(
            update={
                "task": task,
                "labels": self.declared.labels or self.labels,
                "outputs": tuple(output.name for output in fit.outputs),
                "decoder": decoder or "auto",
                "score_threshold": score_threshold,
                "preprocess": preprocess,
                "classes": classes,
                "batch": self.facts.dims[0],
                "batch_size": self.declared.batch_size or self.facts.dims[0] or BATCH_SIZES[task],
                "assumed": tuple(self.assumed),
            }
        )

    @property
    def _is_ultralytics(self) -> bool:
        """Its classifiers take pixels in 0..1 as they are, and the whole shorter side."""
        return self.facts.metadata.get("author") == "Ultralytics"

    def _assume(self, sentence: str) -> None:
        if sentence not in self.assumed:
            self.assumed.append(sentence)

    def _labels(self) -> Sequence[str] | None:
        labels = self.declared.labels
        if not isinstance(labels, str):
            return labels or _names_of(self.facts.metadata)
        try:
            return read_labels(self.facts.path.parent / labels)
        except SpecError as error:
            self.problems += error.problems
            return None

    def _layout(self) -> tuple[Literal["nchw", "nhwc"], int]:
        """Layout, and number of channels."""
        dims, layout = self.facts.dims, self.given.layout
        if layout is None:
            layout = "nhwc" if dims[3] in (1, 3) and dims[1] not in (1, 3) else "nchw"
        count = dims[1] if layout == "nchw" else dims[3]
        if count not in (1, 3, None):
            self.problems.append(
                f"preprocess.layout: {show(dims)}, which the model takes, is no picture of 1 or 3 channels in {layout}"
            )
        return layout, count or (1 if self.given.channels == "gray" else 3)

    def _fit(self, layout: str, size: tuple[int | None, int | None]) -> Fit:
        """The head that the outputs are. Raises SpecError where nothing fits, or several heads do."""
        declared, (width, height) = self.declared, size
        side = self.given.size or ((width, height) if width and height else self._trained_size())
        outputs = self.facts.outputs
        if declared.outputs:
            names = [output.name for output in outputs]
            if missing := [name for name in declared.outputs if name not in names]:
                self.problems.append(f"outputs: the model has no output {missing[0]!r}; it has {', '.join(names)}")
                raise SpecError(self.problems)
            outputs = tuple(output for output in outputs if output.name in declared.outputs)
        facts = Facts(
            outputs,
            side,
            channels_last=layout == "nhwc",
            metadata=self.facts.metadata,
            labels=len(self.labels) if self.labels else None,
            background=has_background(self.labels or ()),
            task=declared.task or (None if declared.decoder == "auto" else "detect"),
            decoder=None if declared.decoder == "auto" else declared.decoder,
            logits=declared.softmax == "always",
            independent=declared.softmax == "never",
        )
        try:
            fit, probed = verdict(facts, lambda: self._probe(layout, side))
        except SpecError as error:
            raise SpecError([*self.problems, *error.problems], hint=error.hint) from None
        shown = " and ".join(show(output.dims) for output in fit.outputs)
        if declared.task is None:
            self._assume(f"task was not given: {fit.head.task} fits the output {shown}")
        if fit.head.decoder and declared.decoder == "auto":
            told = "the shape and the values" if probed else "the shape"
            self._assume(f"boxes are decoded as {fit.head.decoder}, recognised by {told} of the outputs")
        if not declared.outputs:
            for output in self.facts.outputs:
                if output not in fit.outputs and output.name not in [each.name for each in fit.outputs]:
                    self._assume(f"the output {output} is not used (--set outputs={output.name} takes it instead)")
        return fit

    def _trained_size(self) -> Size | None:
        """Width and height that the metadata tell (``imgsz``: height, width)."""
        found = re.fullmatch(r"\[(\d+), (\d+)\]", self.facts.metadata.get("imgsz", ""))
        return (int(found[2]), int(found[1])) if found else None

    def _probe(self, layout: str, size: Size | None) -> dict[str, Array] | None:
        """Each output's values for a picture that has a bit of everything, or None if the model does not run on it."""
        dims = self.facts.dims
        batch, count = dims[0] or 1, dims[1] if layout == "nchw" else dims[3]
        dtype: Any = self.facts.dtype
        plain = Preprocess(
            layout="nchw" if layout == "nchw" else "nhwc",
            channels="gray" if count == 1 else "rgb",
            dtype=dtype,
            scale=None if dtype == "uint8" else 1 / 255,
        )
        tensor = Preprocessor(plain)(Item("made up", made_up_pictures(size or (224, 224))[0])).tensor
        names = [output.name for output in self.facts.outputs]
        session = open_session(self.facts.path, ["CPUExecutionProvider"], threads=os.cpu_count() or 1, optimise=False)
        try:
            values = session.run(names, {self.facts.input: np.repeat(tensor[None], batch, axis=0)})
        except Exception:
            return None
        first = [each[:1] if each.ndim and batch > 1 and len(each) == batch else each for each in values]
        return dict(zip(names, first, strict=True))

    def _size(self, task: Task, size: tuple[int | None, int | None]) -> Size | None:
        given, (width, height) = self.given.size, size
        if given:
            for side, fixed in zip(given, size, strict=True):
                if fixed and side != fixed:
                    want = f"{width or 'any'}x{height or 'any'}"
                    self.problems.append(f"preprocess.size: the model takes {want} pixels, not {given[0]}x{given[1]}")
                    break
            return given
        if width and height:
            return (width, height)
        if trained := self._trained_size():
            return trained
        if width or height or task == "detect":
            self.problems.append("preprocess.size: the model takes several sizes; say which, for instance 640x640")
            return None
        return (224, 224) if task in ("classify", "embed", "values") else None

    def _preprocess(self, task: Task, decoder: str | None, layout: str, count: int, size: Size | None) -> Preprocess:
        given = self.given.model_dump(exclude_none=True)
        pixel_format = self.facts.metadata.get("Image.BitmapPixelFormat", "")
        values: dict[str, Any] = {"interpolation": "bilinear", "channels": "rgb", "resize": "squash"}
        values |= self._range(task, layout, gray=count == 1 or self.given.channels == "gray")
        if task in ("classify", "embed", "values") and size and max(size) >= 96:
            # photographs; smaller inputs (CIFAR, MNIST) are thumbnails, filled by their subject
            shorter = max(size) if self._is_ultralytics else round(max(size) * 256 / 224)
            values |= {"resize": "crop", "shorter": shorter}
        elif task == "restyle" and size:
            values |= {"resize": "letterbox", "anchor": "center"}
        elif task == "segment":
            values["interpolation"] = "bicubic"
        if decoder:
            family = dict(DECODERS[decoder].preprocess)
            if self.facts.dtype == "uint8":
                family = {k: v for k, v in family.items() if k not in ("scale", "mean", "std")}
            values |= family
        declared_format = {"Rgb8": "rgb", "Bgr8": "bgr", "Gray8": "gray"}.get(pixel_format)
        if declared_format:
            values["channels"] = declared_format
        if count == 1:
            values["channels"] = "gray"
        self._tell(values, given, colour_known=count == 1 or bool(declared_format), size=size)
        if {"scale", "mean", "std"} & given.keys():
            values = {k: v for k, v in values.items() if k not in ("scale", "mean", "std")}
        values |= given | {"layout": layout, "size": size}
        if given.get("dtype", self.facts.dtype) != self.facts.dtype:
            self.problems.append(f"preprocess.dtype: the model takes {self.facts.dtype}, not {given['dtype']}")
        if (values["channels"] == "gray") != (count == 1):
            self.problems.append(f"preprocess.channels: {values['channels']}, but the model takes {count}")
        if values["resize"] == "crop":
            values.setdefault("shorter", round(max(size) * 256 / 224) if size else None)
            if task in ("restyle", "segment"):
                self.problems.append(f"preprocess.resize: crop would lose the borders in {task}; use letterbox")
        values = {"scale": 1.0} | values | {"dtype": self.facts.dtype}
        try:
            return Preprocess.model_validate(values)
        except ValidationError as error:
            self.problems += _readable(error, "preprocess")
            return self.given

    def _range(self, task: Task, layout: str, *, gray: bool) -> dict[str, Any]:
        """Pixel values that a model of this kind usually takes."""
        zero_to_one, minus_one_to_one = {"scale": 1 / 255}, {"scale": 1 / 127.5, "mean": 1.0}
        nominal = self.facts.metadata.get("Image.NominalPixelRange", "")
        if self.facts.dtype == "uint8" or nominal == "NominalRange_0_255" or task in ("restyle", "detect"):
            return {}
        if nominal in ("Normalized_0_1", "Normalized_1_1"):
            return zero_to_one if nominal == "Normalized_0_1" else minus_one_to_one
        if self._is_ultralytics:
            return zero_to_one
        if layout == "nhwc":
            return minus_one_to_one if task == "segment" else {}
        if gray:
            return zero_to_one
        return zero_to_one | {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

    def _tell(
        self, values: Mapping[str, Any], given: Mapping[str, Any], *, colour_known: bool, size: Size | None
    ) -> None:
        """Say what was assumed about preprocessing, leaving out what was declared or is in the file."""
        parts = []
        if "channels" not in given and not colour_known:
            parts.append(values["channels"].upper())
        range_known = self.facts.dtype == "uint8" or "Image.NominalPixelRange" in self.facts.metadata
        if not {"scale", "mean", "std"} & given.keys() and not range_known:
            parts.append(_range_name(values))
        if "resize" not in given:
            to = f"{size[0]}x{size[1]}" if size else ""
            how = {"squash": "squash to", "letterbox": "letterbox to"}.get(values["resize"])
            if values["resize"] == "crop":
                how = f"shorter side to {given.get('shorter', values['shorter'])}, centre crop"
            parts.append(f"{how} {to}" if size else "the picture's own size")
        if parts:
            self._assume(
                f"preprocessing was not {'fully ' if given else ''}declared: assumed {', '.join(parts)} "
                "(set preprocess.* with --set or in tally.yaml)"
            )


def _range_name(values: Mapping[str, Any]) -> str:
    if isinstance(values.get("mean"), list):
        return "0..1 with ImageNet mean and deviation"
    if values.get("mean"):
        return "-1..1"
    return "0..1" if "scale" in values else "0..255"
