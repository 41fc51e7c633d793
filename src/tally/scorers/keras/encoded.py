"""Models that take files as they are, a string for each, and decode them themselves: JPEGs, usually."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tally.errors import ItemError, ModelRefutedError, SpecError
from tally.models.labels import read_labels
from tally.models.package import problems_of
from tally.scorers.base import Item, Result, Scorer
from tally.scorers.keras.base import DescribedRuntime, Opener
from tally.scorers.vision.outputs import classify_rows


class _Given(BaseModel):
    """What a user may say. labels: names of the classes, or a file of them, where the model does not give them itself.
    top: how many classes to report."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    labels: str | tuple[str, ...] | None = None
    top: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16


class EncodedOptions(_Given):
    """encoded: the input's name. alone: it takes one file at a time. scores: the output with a number for each class;
    None where no output is that, and all are columns. classes: the output with their names. outputs: all of them."""

    file: str
    encoded: str
    alone: bool
    scores: str | None = None
    classes: str | None = None
    outputs: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()


def takes_encoded(model: DescribedRuntime) -> bool:
    return len(model.taken) == 1 and model.taken[0].dtype == "object" and len(model.taken[0].dims) <= 1


def inspect_encoded(path: Path, options: Mapping[str, Any], model: DescribedRuntime) -> dict[str, Any]:
    """Fill in every option that was left out. Raises SpecError with every problem."""
    try:
        given = _Given.model_validate(dict(options))
    except ValidationError as error:
        raise SpecError(problems_of(error, list(_Given.model_fields))) from None
    labels = tuple(read_labels(path.parent / given.labels)) if isinstance(given.labels, str) else given.labels
    numbers = [each.name for each in model.given if each.dtype.startswith("float")]
    texts = [each.name for each in model.given if each.dtype == "object"]
    classifies = len(numbers) == 1 and (len(texts) == 1 or (labels is not None and not texts))
    if labels and not classifies:
        shown = ", ".join(f"{each.name} ({each.dtype})" for each in model.given)
        raise SpecError(f"labels: {path.parent.name} does not give one number for each class: it gives {shown}")
    return EncodedOptions(
        **given.model_dump(exclude={"labels"}),
        labels=labels,
        file=path.name,
        encoded=model.taken[0].name,
        alone=not model.taken[0].dims or model.taken[0].dims == (1,),
        scores=numbers[0] if classifies else None,
        classes=texts[0] if classifies and texts and labels is None else None,
        outputs=tuple(each.name for each in model.given),
        assumed=("the model is given files as they are, and decodes them itself",),
    ).model_dump(mode="json")


class EncodedScorer(Scorer):
    """Scores files: ``label, index, score`` (and ``rank``) of classifiers, else every output as a column."""

    input = "bytes"

    def __init__(self, options: Mapping[str, Any], opener: Opener) -> None:
        self.options = EncodedOptions.model_validate(dict(options))
        self._opener = opener
        self.batch_size = 1 if self.options.alone else self.options.batch_size
        rank = {"rank": "int64"} if self.options.top > 1 else {}
        if self.options.scores is not None:
            self.columns = {"label": "string", "index": "int64", "score": "float32", **rank}

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model. Raises ModelLoadError."""
        self._runtime = self._opener(artifacts / self.options.file)
        self._runtime.settle(device, self.options.threads)

    def prepare(self, item: Item) -> bytes:
        return bytes(item.value)

    def score(self, batch: Sequence[bytes]) -> Sequence[Result]:
        options = self.options
        given: Any = np.array(batch, object)
        if options.alone and not self._runtime.taken[0].dims:
            given = given[0]
        found = dict(zip(options.outputs, self._runtime.run(options.outputs, {options.encoded: given}), strict=True))
        return [self._result(found, at, len(batch)) for at in range(len(batch))]

    def _result(self, found: Mapping[str, Any], at: int, count: int) -> Result:
        options = self.options
        if options.scores is None:
            return {name: _value(each if options.alone else each[at]) for name, each in found.items()}
        scores = found[options.scores]
        scores = np.asarray(scores if options.alone else scores[at], np.float32).reshape(-1)
        if not np.isfinite(scores).all():
            return ItemError("the model's output holds NaN or infinity")
        names = options.labels
        if options.classes is not None:
            said = found[options.classes]
            said = np.asarray(said if said.size == scores.size else said[at]).reshape(-1)
            names = tuple(_text(each) for each in said.tolist())
        if names is None or len(names) != scores.size:
            raise ModelRefutedError(
                f"{options.scores} has {scores.size} numbers for a file, and there are {len(names or ())} names",
                hint="Give as many --labels as the model has classes.",
            )
        return classify_rows(scores, lambda index: names[index], top=options.top, softmax=False)

    def describe(self) -> str:
        return f"{self.options.file} on {self._runtime.where}, files as they are, batch {self.batch_size}"

    def close(self) -> None:
        self.__dict__.pop("_runtime", None)


def _value(values: Any) -> Any:
    array = np.asarray(values)
    plain = [_text(each) if isinstance(each, bytes) else each for each in array.reshape(-1).tolist()]
    return plain[0] if len(plain) == 1 else plain


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
