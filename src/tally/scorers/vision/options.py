"""Options of vision scorers: validated, and completed from what the model says about itself."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeAlias, TypeVar

import numpy as np
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from tally.errors import SpecError
from tally.models.labels import read_labels
from tally.scorers.base import Item
from tally.scorers.vision.detection.base import Dims, Output, show
from tally.scorers.vision.detection.decoders import DECODERS
from tally.scorers.vision.detection.yolo import ANCHORS
from tally.scorers.vision.heads import Facts, Fit, Task, verdict
from tally.scorers.vision.preprocess import MADE_UP_SIZE, Array, Preprocess, Preprocessor, Size, made_up_pictures
from tally.text import did_you_mean, finding

IMAGENET = {"scale": 1 / 255, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
MINUS_ONE_TO_ONE = {"scale": 1 / 127.5, "mean": 1.0}
ZERO_TO_ONE = {"scale": 1 / 255}
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


def _as_anchors(value: Any) -> Any:
    return ANCHORS.get(value, value) if isinstance(value, str) else value


class VisionOptions(BaseModel):
    """Options of a vision scorer, as written under ``options:`` in ``tally.yaml``.

    file: the model's file name inside the artifacts folder.
    labels: a file there (see :func:`tally.models.labels.read_labels`), or the names themselves.
    top: how many classes to report (classify); with a threshold all that score more, otherwise one.
    softmax: whether scores (of one foreground: the sigmoid's) are still to be made probabilities; ``auto`` asks the
        model once.
    threshold: scores that count are above it. Of one score for two classes, it divides them.
    keypoints, anchors: see :class:`~tally.scorers.vision.detection.base.Given`; anchors also by the name of the family
        that was trained on COCO.
    outputs: the model's outputs that are used, by name; found by :func:`complete` where they are left out.
    output: ``rows`` (pixels of each class), ``image`` (the label map) or ``colours`` (that to look at), for segment.
    threads: of the framework, in each worker. batch_size: pictures scored at once.
    classes, batch, assumed: found by :func:`complete`: the number of classes, the batch size that the model is
        fixed to, and one sentence for each thing that was inferred.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    task: Task | None = None
    labels: Annotated[str | tuple[str, ...] | None, BeforeValidator(_as_labels)] = None
    preprocess: Preprocess = Preprocess()
    top: Annotated[int, Field(ge=1)] | None = None
    softmax: Literal["auto", "always", "never"] = "auto"
    decoder: str = "auto"
    outputs: Annotated[tuple[str, ...] | None, BeforeValidator(_as_names)] = None
    threshold: Annotated[
        float | None, Field(ge=0, le=1, validation_alias=AliasChoices("threshold", "score_threshold"))
    ] = None  # its name was another before it told tags apart
    iou_threshold: Annotated[float, Field(ge=0, le=1)] = 0.45
    keypoints: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=2, le=3)]] | None = None
    anchors: Annotated[tuple[tuple[float, ...], ...] | None, BeforeValidator(_as_anchors)] = None
    output: Literal["rows", "image", "colours"] = "rows"
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

    @field_validator("decoder")
    @classmethod
    def _exists(cls, value: str) -> str:
        if value == "auto" or value in DECODERS:
            return value
        near = get_close_matches(value, DECODERS, n=1)
        raise ValueError(f"must be auto, {', '.join(DECODERS)}" + (f" (did you mean {near[0]}?)" if near else ""))

    @field_validator("output", mode="before")
    @classmethod
    def _no_name(cls, value: Any) -> Any:
        if value in ("rows", "image", "colours"):
            return value
        raise ValueError(f"must be rows, image or colours; to choose an output of the model, say outputs={value}")

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Self:
        """Validate. Raises SpecError with every problem."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            raise SpecError(_readable(error, cls)) from None


def _readable(error: ValidationError, schema: type[BaseModel], prefix: str = "") -> list[str]:
    """pydantic's findings as ``preprocess.size: what is wrong, not 'value'``."""
    problems = []
    for found in error.errors(include_url=False):
        names = [*filter(None, [prefix]), *(str(part) for part in found["loc"])]
        where = ".".join(names)
        if found["type"] == "extra_forbidden":
            known = list((Preprocess if names[0] == "preprocess" else schema).model_fields)
            inner = f"; did you mean 'preprocess.{where}'?" if where in Preprocess.model_fields else ""
            near = inner or did_you_mean(names[-1], known)
            problems.append(f"{where}: no such option{near}")
        elif found["type"] == "missing":
            problems.append(f"{where}: is required")
        elif isinstance(found["input"], (dict, BaseModel)):  # checks across fields name them themselves
            problems += [f"{where}.{part}" for part in found["msg"].removeprefix("Value error, ").split("; ")]
        else:
            problems.append(f"{where}: {finding(found)}")
    return problems


@dataclass(frozen=True, slots=True)
class Known:
    """What a model is recognised as, and by what, in words; and the options of preprocessing that follow."""

    said: str
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a model of pictures says about itself. Dimensions are numbers, or None where they vary.

    dims, dtype: of the input that takes pictures, four axes and NumPy's type. alone: it takes one picture, without an
    axis for several; ``dims`` and outputs have one of 1 here. metadata: as its exporter wrote it. recognised: what it
    is by its layers, given how many classes it tells apart (None: it does not, or nobody knows).
    """

    path: Path
    dims: Dims
    dtype: str
    outputs: tuple[Output, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    recognised: Callable[[int | None], Known | None] = lambda classes: None
    alone: bool = False


Run: TypeAlias = Callable[[Array], Mapping[str, Array]]
"""The model's outputs by name, for a batch of tensors. What it raises says that it cannot take them."""


def has_background(labels: Sequence[str]) -> bool:
    """Whether the first label is that of the background."""
    return bool(labels) and labels[0].strip("_ ").lower() in ("background", "bg", "none", "n/a", "unlabeled")


_NAMES = ("names", "class_names", "classes", "labels", "id2label")
_SIZES = ("imgsz", "input_size", "image_size", "img_size")
"""How the metadata of exporters call the names of classes, and the size that the model was trained with."""


def _names_of(metadata: Mapping[str, str]) -> tuple[str, ...] | None:
    """The labels that the file itself holds: a mapping from number to name, or a list, as Python or JSON; or a line for
    each, or commas between them."""
    text = next((metadata[key] for key in _NAMES if metadata.get(key, "").strip()), "")
    names = _literal(text)
    if isinstance(names, dict):
        named = {int(number): name for number, name in names.items() if str(number).isdigit()}
        names = [named[number] for number in range(len(names))] if [*sorted(named)] == [*range(len(names))] else None
    elif names is None and text.strip()[:1] not in ("{", "[", "("):
        names = [name.strip() for name in re.split(r"[\n,;]", text) if name.strip()]
    return tuple(map(str, names)) if isinstance(names, (list, tuple)) and names else None


def _literal(text: str) -> Any:
    """A value as Python or JSON writes it; None for other text."""
    for read in (ast.literal_eval, json.loads):
        try:
            return read(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
    return None


def _numbers_of(value: Any, count: int) -> tuple[int, ...] | None:
    """So many positive whole numbers; one stands for all."""
    found = [value] * count if isinstance(value, int) else value
    fits = isinstance(found, (list, tuple)) and len(found) == count and all(type(n) is int and n > 0 for n in found)
    return tuple(found) if fits else None


Chosen = TypeVar("Chosen", bound=VisionOptions)


def complete(declared: Chosen, facts: ModelFacts, run: Run) -> Chosen:
    """Fill in every option that was left out, from what the model says about itself, and from what it makes of a
    made-up picture where that does not tell.

    ``assumed`` in the result has one sentence for each thing that was neither said nor found in the file. A labels file
    is looked for beside the model. Raises SpecError with every problem.
    """
    return _Resolver(declared, facts, run).resolve()


def layout_of(dims: Dims, given: Preprocess) -> Literal["nchw", "nhwc"]:
    """Where the channels of a model's input are."""
    if given.layout is not None:
        return given.layout
    return "nhwc" if dims[3] in (1, 3) and dims[1] not in (1, 3) else "nchw"


class _Resolver(Generic[Chosen]):
    """Works out what was left out of the options. Collects problems and assumptions on the way."""

    def __init__(self, declared: Chosen, facts: ModelFacts, run: Run) -> None:
        self.declared, self.facts, self.given, self.run = declared, facts, declared.preprocess, run
        self.problems: list[str] = []
        self.assumed = list(declared.assumed)
        self.labels = self._labels()

    def resolve(self) -> Chosen:
        layout, count = self._layout()
        height, width = self.facts.dims[2:] if layout == "nchw" else self.facts.dims[1:3]
        self._check_stride()
        fit = self._fit(layout, (width, height))
        task, decoder, classes = fit.head.task, fit.head.decoder, fit.classes
        assert task is not None
        size = self._size(task, decoder, (width, height))
        threshold = self.declared.threshold
        if decoder and threshold is None:
            threshold = DECODERS[decoder].threshold
        top = self.declared.top or (1 if task != "classify" or threshold is None else None)
        if (own := fit.outputs[0].labels) is not None:
            if self.labels and set(self.labels) != set(own):
                self.problems.append(f"labels: the model's own are {', '.join(own)}")
            self.labels = own
        if decoder == "yolov5-raw":
            self._check_anchors(fit)
        if self.labels and classes and len(self.labels) != classes:
            background = decoder and DECODERS[decoder].background and has_background(self.labels)
            if not background or len(self.labels) != classes + 1:
                self.problems.append(
                    f"labels: {len(self.labels)} names, but the model has {classes} classes"
                    f"{f', read as {decoder}' if decoder else ''}"
                )
        if not self.labels and task in ("classify", "detect", "segment"):
            self._assume("labels were not given: classes are called by their number")
        if classes and task == "classify" and (self.declared.top or 1) > classes:
            self.problems.append(f"top: {self.declared.top}, but the model has only {classes} classes")
        if task == "segment" and self.declared.output == "image" and (classes or 0) > 256:
            self.problems.append(f"output: a label map holds up to 256 classes, the model has {classes}; use rows")
        known = self._known(task, classes, count)
        preprocess = self._preprocess(task, decoder, layout, count, size, known)
        single = decoder is not None and DECODERS[decoder].single
        if self.problems:
            raise SpecError(self.problems)
        return self.declared.model_copy(
            update={
                "task": task,
                "labels": own or self.declared.labels or self.labels,
                "outputs": tuple(output.name for output in fit.outputs),
                "decoder": decoder or "auto",
                "threshold": threshold,
                "top": top,
                "keypoints": fit.keypoints,
                "preprocess": preprocess,
                "classes": classes,
                "batch": self.facts.dims[0] or (1 if single else None),
                "batch_size": 1 if single else self.declared.batch_size or self.facts.dims[0] or BATCH_SIZES[task],
                "assumed": tuple(self.assumed),
            }
        )

    def _known(self, task: Task, classes: int | None, count: int) -> Known | None:
        """What the model is recognised as, where it takes photographs and the user says nothing of their values."""
        if task not in ("classify", "embed", "values") or count != 3 or self.facts.dtype == "uint8":
            return None
        if {"scale", "mean", "std"} & self.given.model_fields_set or "Image.NominalPixelRange" in self.facts.metadata:
            return None
        if self.facts.metadata.get("author") == "Ultralytics":
            return Known("a model of Ultralytics, by its metadata,", ZERO_TO_ONE)
        return self.facts.recognised(classes if task == "classify" else None)

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
        dims = self.facts.dims
        layout = layout_of(dims, self.given)
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
            keypoints=declared.keypoints or _keypoints(self.facts.metadata),
            anchors=declared.anchors,
            alone=self.facts.alone,
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
        """Width and height that the metadata tell (height, width, or one number)."""
        said = next((self.facts.metadata[key] for key in _SIZES if key in self.facts.metadata), "")
        found = _numbers_of(_literal(said), 2)
        return (found[1], found[0]) if found else None

    def _check_stride(self) -> None:
        given, stride = self.given.size, self.facts.metadata.get("stride", "")
        if given and stride.isdigit() and int(stride) and any(side % int(stride) for side in given):
            said = f"{given[0]}x{given[1]}"
            self.problems.append(f"preprocess.size: {said} is no multiple of the model's stride of {stride} pixels")

    def _check_anchors(self, fit: Fit) -> None:
        wanted = [2 * (output.dims[1] or 0) for output in fit.outputs]
        anchors = self.declared.anchors
        if anchors is None or [len(each) for each in anchors] != wanted:
            self.problems.append(
                f"anchors: the model takes {len(wanted)} lists of {wanted[0]} numbers, widths and heights in pixels "
                f"from the smallest stride on, or the name of a family: {', '.join(ANCHORS)}"
            )

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
        tensor = Preprocessor(plain)(Item("made up", made_up_pictures(size or MADE_UP_SIZE)[0])).tensor
        try:
            values = self.run(np.repeat(tensor[None], batch, axis=0))
        except Exception:
            return None
        return {
            name: each[:1] if each.ndim and batch > 1 and len(each) == batch else each for name, each in values.items()
        }

    def _size(self, task: Task, decoder: str | None, size: tuple[int | None, int | None]) -> Size | None:
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
        if decoder and DECODERS[decoder].any_size and not width and not height:
            return None
        if width or height or task == "detect":
            self.problems.append("preprocess.size: the model takes several sizes; say which, for instance 640x640")
            return None
        return MADE_UP_SIZE if task in ("classify", "embed", "values") else None

    def _preprocess(
        self, task: Task, decoder: str | None, layout: str, count: int, size: Size | None, known: Known | None
    ) -> Preprocess:
        given = self.given.model_dump(exclude_none=True)
        pixel_format = self.facts.metadata.get("Image.BitmapPixelFormat", "")
        values: dict[str, Any] = {"interpolation": "bilinear", "channels": "rgb", "resize": "squash"}
        gray = count == 1 or self.given.channels == "gray"
        values |= self._range(task, layout, gray=gray) if known is None else known.values
        if task in ("classify", "embed", "values") and size and max(size) >= 96:
            # photographs; smaller inputs (CIFAR, MNIST) are thumbnails, filled by their subject
            whole = self.facts.metadata.get("author") == "Ultralytics"  # they take the whole shorter side
            shorter = max(size) if whole else round(max(size) * 256 / 224)
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
        self._tell(values, given, colour_known=count == 1 or bool(declared_format), size=size, known=known)
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
            self.problems += _readable(error, Preprocess, "preprocess")
            return self.given

    def _range(self, task: Task, layout: str, *, gray: bool) -> dict[str, Any]:
        """Pixel values that a model of this kind usually takes."""
        nominal = self.facts.metadata.get("Image.NominalPixelRange", "")
        if self.facts.dtype == "uint8" or nominal == "NominalRange_0_255" or task in ("restyle", "detect"):
            return {}
        if nominal in ("Normalized_0_1", "Normalized_1_1"):
            return ZERO_TO_ONE if nominal == "Normalized_0_1" else MINUS_ONE_TO_ONE
        if layout == "nhwc":
            return MINUS_ONE_TO_ONE if task == "segment" else {}
        return ZERO_TO_ONE if gray else IMAGENET

    def _tell(
        self,
        values: Mapping[str, Any],
        given: Mapping[str, Any],
        *,
        colour_known: bool,
        size: Size | None,
        known: Known | None,
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
                f"preprocessing was not {'fully ' if given else ''}declared: "
                f"{'assumed' if known is None else f'{known.said} takes'} {', '.join(parts)} "
                "(set preprocess.* with --set or in tally.yaml)"
            )


def _keypoints(metadata: Mapping[str, str]) -> tuple[int, int] | None:
    """How many points, and numbers for each, as Ultralytics writes it."""
    found = _numbers_of(_literal(metadata.get("kpt_shape", "")), 2)
    return (found[0], found[1]) if found and found[1] in (2, 3) else None


def _range_name(values: Mapping[str, Any]) -> str:
    if isinstance(values.get("mean"), list):
        if "scale" not in values:
            less, by = (", ".join(f"{each:g}" for each in values.get(name, ())) for name in ("mean", "std"))
            return f"0..255 less {less}{f', divided by {by}' if by else ''}"
        return "0..1 with ImageNet mean and deviation"
    if values.get("mean"):
        return "-1..1"
    return "0..1" if "scale" in values else "0..255"
