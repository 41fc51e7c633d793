"""What a folder that transformers saved does, told by its files, and what a user may say of it.

transformers is not imported. Nothing of a folder runs: code that it carries is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tally.errors import ModelLoadError, SpecError
from tally.models.labels import read_labels

Task: TypeAlias = Literal["classify", "detect", "segment", "embed", "values"]
Media: TypeAlias = Literal["image", "text", "audio"]

_HEADS: tuple[tuple[str, Media, Task], ...] = (
    ("ForImageClassification", "image", "classify"),
    ("ForImageClassificationWithTeacher", "image", "classify"),
    ("ForObjectDetection", "image", "detect"),
    ("ForSemanticSegmentation", "image", "segment"),
    ("ForSequenceClassification", "text", "classify"),
    ("ForAudioClassification", "audio", "classify"),
)
"""What the name of an architecture ends in, and what it is given and does."""
_ZERO_SHOT = ("CLIPModel", "SiglipModel", "Siglip2Model", "AltCLIPModel", "ChineseCLIPModel")
"""Architectures that say how well texts fit a picture."""
_SIGMOID = ("SiglipModel", "Siglip2Model")
"""Those of which each text has a score of its own."""
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_PICTURES = ("preprocessor_config.json", "processor_config.json", "image_processor_config.json")
_TEXTS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_BY_YOURSELF = "A scorer of your own can run it (docs: write-a-scorer)."


class TransformersGiven(BaseModel):
    """What a user may say.

    task: embed, of a model that could classify by labels; otherwise its architecture tells.
    labels: names of the classes; of models that compare pictures with texts, the candidates.
    template: what a candidate becomes, in place of ``{}``.
    top: how many classes to report. score_threshold: of boxes. output: of segment, ``rows`` or ``image``.
    pooling: how the vectors of tokens or patches become one; auto: as the folder says, else ``mean`` of texts, and
        what the model itself pools (``pooler``), else the first vector (``cls``), of pictures.
    truncate: texts that are too long are cut; otherwise they are errors.
    features: the column with the text, or the two of pairs. batch_size: items scored at once. threads: of PyTorch.
    autocast: to which type PyTorch may narrow what it reckons with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: Task | None = None
    labels: str | tuple[str, ...] | None = None
    template: str = "This is a photo of {}."
    top: Annotated[int, Field(ge=1)] = 1
    score_threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    output: Literal["rows", "image"] = "rows"
    pooling: Literal["auto", "mean", "cls", "pooler"] = "auto"
    truncate: bool = False
    features: list[str] | None = Field(default=None, min_length=1, max_length=2)
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    autocast: Literal["bfloat16", "float16"] | None = None

    @field_validator("features", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("template")
    @classmethod
    def _with_a_place(cls, value: str) -> str:
        if "{}" not in value:
            raise ValueError("needs a place for the candidate: {}")
        return value


class TransformersOptions(TransformersGiven):
    """Options of a scorer of transformers, as :func:`inspect` completes them.

    architecture: its class. media: what it is given. names: of the classes. activation: what makes scores of its
        values. zero_shot: the classes are texts that the user gives. count: numbers for each item, of values.
    normalize: vectors are made of length 1.
    """

    architecture: str
    media: Media
    names: tuple[str, ...] | None = None
    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    zero_shot: bool = False
    count: int = 1
    normalize: bool = False
    assumed: tuple[str, ...] = ()

    @classmethod
    def complete(cls, options: Mapping[str, Any]) -> Self:
        """Options as :func:`inspect` returns them. Raises SpecError for others."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            raise SpecError(f"the options are not complete or not right: {error.errors()[0]['loc']}") from None


def is_saved(config: Path) -> bool:
    """Whether a ``config.json`` is one of transformers."""
    return "model_type" in _json(config)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def inspect(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Find out what a folder does, and fill in every option that was left out.

    Raises SpecError with every problem, ModelLoadError.
    """
    from tally.models.package import problems_of

    try:
        given = TransformersGiven.model_validate(dict(options))
    except ValidationError as error:
        raise SpecError(problems_of(error, list(TransformersGiven.model_fields))) from None
    config = _json(folder / "config.json")
    named = config.get("architectures") or [""]
    architecture = str(named[0])
    if "auto_map" in config:
        raise ModelLoadError(
            f"{folder}: the model's code is in its own folder ({config['auto_map']}), and Tally runs none",
            hint="Export it to ONNX, or run it in a scorer of your own.",
        )
    _check_there(folder, _WEIGHTS, "weights")
    media, tasks = _does(folder, architecture)
    zero_shot = architecture in _ZERO_SHOT
    task = given.task or ("embed" if zero_shot and given.labels is None else tasks[0])
    if task not in tasks:
        raise SpecError(f"task: {architecture} in {folder.name} does {' or '.join(tasks)}, not {task}")
    problems, assumed = [], []
    if zero_shot and given.task is None and given.labels is None:
        assumed.append("embed: to compare pictures with texts, give these as --labels")
    names, activation = _classes(config, given, folder, task, zero_shot=zero_shot)
    if activation == "none" and task == "classify":
        task = "values"
    if architecture in _SIGMOID:
        activation = "sigmoid"
    if zero_shot and task == "classify":
        if not names:
            problems.append("labels: are needed: the texts that pictures are compared with")
        elif "template" not in options:
            assumed.append(f"candidates are written into {given.template!r} (--set template='...{{}}...')")
    if names and given.top > len(names) and task == "classify":
        problems.append(f"top: {given.top}, but the model has only {len(names)} classes")
    if media == "text" and given.features is None:
        problems.append("features: say which column holds the text: --set features=COLUMN")
    if given.features is not None and media != "text":
        problems.append(f"features: {architecture} takes no tables")
    pooling, normalize = given.pooling, False
    if task == "embed":
        pooling, normalize, said = _pooled(folder, media, given, zero_shot=zero_shot)
        assumed += said
    if problems:
        raise SpecError(problems)
    return TransformersOptions(
        **given.model_dump(exclude={"task", "pooling"}),
        task=task,
        pooling=pooling,
        architecture=architecture,
        media=media,
        names=names,
        activation=activation,
        zero_shot=zero_shot,
        count=len(config.get("id2label") or (1,)),
        normalize=normalize,
        assumed=tuple(assumed),
    ).model_dump(mode="json")


def _check_there(folder: Path, names: Sequence[str], what: str) -> None:
    if not any((folder / name).is_file() for name in names):
        raise ModelLoadError(
            f"{folder}: there are no {what}: none of {', '.join(names)}",
            hint="Save the model and its processor or tokenizer into one folder: save_pretrained(FOLDER).",
        )


def _does(folder: Path, architecture: str) -> tuple[Media, tuple[Task, ...]]:
    """What it is given, and the tasks that it can do. Raises ModelLoadError."""
    for suffix, media, task in _HEADS:
        if architecture.endswith(suffix):
            if architecture.endswith("ForSequenceClassification"):  # of a sound's waves, too
                media = "audio" if "sampling_rate" in _json(folder / _PICTURES[0]) else "text"
            _check_there(folder, _TEXTS if media == "text" else _PICTURES, f"settings for {media}s")
            return media, (task,)
    if architecture in _ZERO_SHOT:
        _check_there(folder, _PICTURES, "settings for images")
        return "image", ("classify", "embed")
    if architecture.endswith("Model"):
        pictures = any((folder / name).is_file() for name in _PICTURES)
        if pictures == any((folder / name).is_file() for name in _TEXTS):
            raise ModelLoadError(
                f"{folder}: whether {architecture} takes pictures or texts is not told: it has "
                f"{'both' if pictures else 'neither'} a preprocessor_config.json and a tokenizer",
                hint="Save the one that belongs to it into its folder.",
            )
        return ("image" if pictures else "text"), ("embed",)
    raise ModelLoadError(
        f"{folder}: models of {architecture or 'no architecture'} cannot be scored; those of "
        f"{', '.join(suffix for suffix, *_ in _HEADS)}, {', '.join(_ZERO_SHOT)} and bare models can",
        hint=_BY_YOURSELF,
    )


def _classes(
    config: Mapping[str, Any], given: TransformersGiven, folder: Path, task: Task, *, zero_shot: bool
) -> tuple[tuple[str, ...] | None, Literal["softmax", "sigmoid", "none"]]:
    """Names of the classes, and what makes scores of values. Raises SpecError."""
    labels = given.labels
    said = tuple(read_labels(folder / labels)) if isinstance(labels, str) else labels
    if task == "embed":
        if said:
            raise SpecError("labels: a model that gives vectors has no classes")
        return None, "none"
    if zero_shot:
        return said, "softmax"
    of_index = config.get("id2label") or {str(at): f"LABEL_{at}" for at in range(int(config.get("num_labels", 2)))}
    names = tuple(str(of_index[key]) for key in sorted(of_index, key=int))
    if said and len(said) != len(names):
        raise SpecError(f"labels: {len(said)} names, but the model has {len(names)} classes")
    kind = config.get("problem_type")
    if task == "classify" and (kind == "regression" or len(names) == 1):
        return None, "none"
    return said or names, "sigmoid" if kind == "multi_label_classification" else "softmax"


def _pooled(
    folder: Path, media: Media, given: TransformersGiven, *, zero_shot: bool
) -> tuple[Literal["auto", "mean", "cls", "pooler"], bool, list[str]]:
    """How vectors become one, whether it is made of length 1, and what the user should know."""
    if zero_shot:
        return "pooler", False, []
    of_sentences = _json(folder / "1_Pooling" / "config.json")
    modules = json.dumps(_listed(folder / "modules.json"))
    normalize = "Normalize" in modules
    if given.pooling != "auto":
        return given.pooling, normalize, []
    if of_sentences:
        for name, mode in (("pooling_mode_mean_tokens", "mean"), ("pooling_mode_cls_token", "cls")):
            if of_sentences.get(name) or of_sentences.get("pooling_mode") == mode:
                return ("mean" if mode == "mean" else "cls"), normalize, []
        raise SpecError(
            f"pooling: {folder / '1_Pooling'} says neither mean nor cls", hint="Say --set pooling=mean, cls or pooler."
        )
    if media == "text":
        return "mean", normalize, ["texts become the mean of the vectors of their tokens (--set pooling=cls or pooler)"]
    return "auto", normalize, []


def _listed(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
