"""Scores tables with models that take tensors, whatever framework runs them: rows of values in, tensors out.

A framework's own scorer opens the model; all that is done before and after it is here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

from tally.errors import ItemError, ModelLoadError, ModelRefutedError, SpecError
from tally.models.labels import read_labels
from tally.scorers.base import Results, Scorer
from tally.scorers.runtime import Runtime
from tally.scorers.tabular import tables
from tally.scorers.tabular.tables import Array

if TYPE_CHECKING:
    import pyarrow as pa

Task: TypeAlias = Literal["detect", "classify", "values"]

NUMBERS = frozenset(
    ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
)
"""Types of tensors, as NumPy names them; ``object`` is text."""
_OF_ONNX = {"tensor(float)": "float32", "tensor(double)": "float64", "tensor(string)": "object"}
_SCORES = frozenset({"score", "scores", "decision", "decision_function"})
_LABELS = frozenset({"label", "labels", "output_label", "anomaly"})


class Port(BaseModel):
    """An input or output. dtype: NumPy's name of its type, or another where it is no tensor (``seq(map(...))``).
    width: values for each row, None where that varies. batch: rows, where that is fixed."""

    model_config = ConfigDict(frozen=True)

    name: str
    dtype: str
    rank: int
    width: int | None
    batch: int | None

    @field_validator("dtype", mode="before")
    @classmethod
    def _of_onnx(cls, value: str) -> str:
        """ONNX names types otherwise."""
        return _OF_ONNX.get(value, value.removeprefix("tensor(").removesuffix(")") if value.startswith("t") else value)

    @property
    def plain(self) -> bool:
        """Whether it is a tensor, and not a map or a sequence."""
        return self.dtype in NUMBERS or self.dtype == "object"

    @property
    def floating(self) -> bool:
        return self.dtype.startswith("float")


class _Given(tables.TableOptions):
    """What a user may say; see :class:`TensorTableOptions`."""

    task: Task | Literal["auto"] = "auto"
    labels: str | list[str] | None = None
    softmax: Literal["auto", "always", "never"] = "auto"
    nan: bool = False


class TensorTableOptions(_Given):
    """Options of a scorer of tables, as :func:`complete_table` completes them.

    task: detect: ``anomaly, score``. classify: ``label, score``, and ``index`` where the model gives scores alone.
        values: every output is a column.
    labels: names of the classes, or a file of them. softmax: as of vision models.
    nan: the model takes NaN; null is NaN then.
    """

    file: str
    inputs: list[Port]
    outputs: list[Port]
    columns: dict[str, str] | None = None
    assumed: tuple[str, ...] = ()


Chosen = TypeVar("Chosen", bound=TensorTableOptions)


def complete_table(
    path: Path,
    options: Mapping[str, Any],
    inputs: list[Port],
    outputs: list[Port],
    *,
    options_type: type[Chosen],
    settings: Mapping[str, Any] = {},
) -> Chosen:
    """Fill in every option that was left out, from what a model says of its inputs and outputs.

    settings: the framework's own options, checked. ``assumed`` in the result has one sentence for each thing that was
    guessed. Raises SpecError with every problem, ModelLoadError.
    """
    if problems := _Given.problems_in(options):
        raise SpecError([f"{path.name}: {each}" for each in problems])
    given = _Given.model_validate(dict(options))
    if len(inputs) > 1 and any(port.width is None for port in inputs):
        raise ModelLoadError(f"{path}: it has {len(inputs)} inputs, and not all say how many columns they take")
    if len({port.batch for port in inputs}) > 1:
        raise ModelLoadError(f"{path}: its inputs are fixed to different numbers of rows")
    labels = _read_labels(path, given.labels)
    assumed: list[str] = []
    features: list[str] | None = given.features
    count = None if inputs[0].width is None else sum(port.width or 0 for port in inputs)
    if features is not None:
        tables.check_count(features, count, path.name)
    elif len(inputs) > 1 and count == len(inputs):
        features = [port.name for port in inputs]
    else:
        columns = (
            "all columns" if count is None else f"{count} numeric column{'' if count == 1 else 's in their order'}"
        )
        assumed.append(f"features were not given: assumed the table's {columns} (--set features=...)")
    task: Task = _guess(outputs, labels) if given.task == "auto" else given.task
    _check_task(path, task, outputs, labels)
    return options_type(
        **(given.model_dump() | {"features": features, "task": task, "labels": labels}),
        **settings,
        file=path.name,
        inputs=inputs,
        outputs=outputs,
        columns=_columns(task, outputs),
        assumed=tuple(assumed),
    )


def _read_labels(path: Path, labels: str | list[str] | None) -> list[str] | None:
    if not isinstance(labels, str):
        return labels
    return read_labels(path.parent / labels)


def _detector(outputs: Sequence[Port]) -> tuple[int, int] | None:
    """Positions of the outputs that say whether a row is an anomaly, and how much it is none."""
    ones = {port.name.lower(): place for place, port in enumerate(outputs) if port.plain and port.width == 1}
    label = next((place for name, place in ones.items() if name in _LABELS and not outputs[place].floating), None)
    score = next((place for name, place in ones.items() if name in _SCORES and outputs[place].floating), None)
    return None if label is None or score is None or outputs[label].dtype == "object" else (label, score)


def _classifier(outputs: Sequence[Port]) -> tuple[int | None, int] | None:
    """Positions of the outputs with the class, if there is one, and with a score for each class."""
    scores = [
        place
        for place, port in enumerate(outputs)
        if (port.floating and port.rank == 2 and port.width != 1) or port.dtype.startswith("seq(map(")
    ]
    if not scores:
        return None
    label = [place for place, port in enumerate(outputs) if port.name.lower() in _LABELS and port.plain]
    if not label and not outputs[scores[0]].plain:
        return None
    return (label[0] if label else None), scores[0]


def _guess(outputs: Sequence[Port], labels: Sequence[str] | None) -> Task:
    if _detector(outputs) is not None:
        return "detect"
    found = _classifier(outputs)
    if found is None:
        return "values"
    label, scores = found
    if label is None:
        return "classify" if labels and len(outputs) == 1 else "values"
    # converters call a classifier's probabilities that, and the distances of a cluster model scores
    return "values" if outputs[scores].name.lower() in _SCORES else "classify"


def _check_task(path: Path, task: Task, outputs: Sequence[Port], labels: Sequence[str] | None) -> None:
    """Raises SpecError if the outputs are not those of the task."""
    shown = ", ".join(f"{port.name} ({port.dtype}, {port.width or 'any'} for each row)" for port in outputs)
    if task == "detect" and _detector(outputs) is None:
        raise SpecError(f"task: {path.name} is no detector, whose outputs are label and scores: it gives {shown}")
    found = _classifier(outputs)
    if task == "classify" and found is None:
        raise SpecError(f"task: {path.name} gives no score for each class: {shown}")
    if task == "values" and not all(port.plain for port in outputs):
        raise SpecError(f"task: outputs that are not tensors cannot be columns: {shown}")
    if labels and task != "classify":
        raise SpecError(f"labels: {path.name} does not classify: it gives {shown}")
    width = outputs[found[1]].width if found is not None and outputs[found[1]].plain else None
    if labels and width not in (None, len(labels)):
        raise SpecError(f"labels: {len(labels)} names, but {path.name} has {width} classes")


def _columns(task: Task, outputs: Sequence[Port]) -> dict[str, str] | None:
    if task == "detect":
        return {"anomaly": "bool", "score": "float64"}
    if task == "classify":
        found = _classifier(outputs)
        index = {"index": "int64"} if found is not None and found[0] is None else {}
        return {"label": "string", **index, "score": "float64"}
    if any(port.width is None or port.rank == 0 for port in outputs):
        return None  # seen when there are results
    kinds = [{"object": "string", "float16": "float32"}.get(port.dtype, port.dtype) for port in outputs]
    pairs = zip(outputs, kinds, strict=True)
    return {port.name: kind if port.width == 1 else f"list<{kind}>" for port, kind in pairs}


class TensorTableScorer(Scorer):
    """Scores tables with a model that takes tensors; options as :func:`complete_table` returns them.

    A framework subclasses it with ``options_type`` and :meth:`open`.
    """

    options_type: ClassVar[type[TensorTableOptions]] = TensorTableOptions

    input = "table"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = self.options_type.complete(options)
        inputs = self.options.inputs
        self.batch_size = self.options.batch_size
        count = None if inputs[0].width is None else sum(port.width or 0 for port in inputs)
        self.features = self.options.features or count
        self.columns = self.options.columns
        self.assumed = ()
        self._nan = self.options.nan and all(port.floating for port in inputs)
        self._kinds = [port.dtype for port in inputs for _ in range(port.width or 0)]
        self._softmax: bool | None = {"always": True, "never": False}.get(self.options.softmax)
        self._runtime: Runtime | None = None

    def open(self, path: Path, device: str) -> Runtime:
        """Open the model on a device. Raises ModelNotFoundError, ModelLoadError."""
        raise NotImplementedError(f"{type(self).__name__} must define open(path, device)")

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model; on the CPU unless a device is named, which pays for larger models only.

        Raises ModelNotFoundError, ModelLoadError.
        """
        self._runtime = self.open(artifacts / self.options.file, "cpu" if device == "auto" else device)
        self._settle_softmax()

    def _settle_softmax(self) -> None:
        """Find out whether scores are probabilities already: once, and in each worker on the same made-up rows."""
        found = _classifier(self.options.outputs)
        numbers = len(self._kinds) and not {"object", "bool"} & set(self._kinds)
        if self.options.task != "classify" or self._softmax is not None or found is None or not numbers:
            return
        import pyarrow as pa

        lowest = 0 if any(kind.startswith("uint") for kind in self._kinds) else -100
        made_up = pa.table({str(place): [0, 1, 100, lowest] for place in range(len(self._kinds))})
        try:
            scores = next(self._run(feeds)[found[1]] for feeds in self._feeds(made_up, tables.matrix(made_up)))
        except Exception:
            return  # the first rows show what is wrong with it
        if isinstance(scores, np.ndarray) and np.isfinite(scores).all():
            self._decide(np.asarray(scores))

    def _decide(self, scores: Array) -> None:
        """Whether softmax is applied from now on: where scores are none in 0..1."""
        self._softmax = not _in_range(scores)
        if self._softmax:
            said = "softmax is applied: scores are not in 0..1 (--set softmax=never keeps them as they are)"
            self.assumed = (said,)

    def score(self, table: pa.Table) -> Results:
        """Score the rows of a table; a row with a value that the model does not take is an error of its own."""
        import pyarrow as pa

        table = tables.features_of(table, self.features)
        values = tables.matrix(table) if tables.is_numeric(table) else None
        errors = tables.unusable(table, values, nan=self._nan)
        if self._kinds:
            errors = tables.beyond_type(table, self._kinds) | errors
        count = table.num_rows
        if len(errors) == count:
            return tables.results(None, errors, count)
        if errors:
            good = tables.without(errors, count)
            values, table = None if values is None else values[good], table.filter(good)
        parts = [self._run(feeds) for feeds in self._feeds(table, values)]
        outputs = parts[0] if len(parts) == 1 else [_joined(each) for each in zip(*parts, strict=True)]
        answer = pa.table(self._answer([each[: table.num_rows] for each in outputs]))
        checked = [name for name in answer.column_names if pa.types.is_floating(answer.schema.field(name).type)]
        return tables.results(answer, errors, count, checked=checked)

    def _feeds(self, table: pa.Table, values: Array | None) -> Iterator[dict[str, Array]]:
        """The model's inputs; in runs of as many rows as it is fixed to, the last row repeated to fill up."""
        inputs = self.options.inputs
        feeds, start = {}, 0
        for port in inputs:
            width = table.num_columns - start if port.width is None else port.width
            feeds[port.name] = _tensor(port, table, values, start, start + width)
            start += width
        fixed = inputs[0].batch
        if fixed is None:
            yield feeds
            return
        for first in range(0, table.num_rows, fixed):
            places = np.minimum(np.arange(first, first + fixed), table.num_rows - 1)
            yield {name: tensor[places] for name, tensor in feeds.items()}

    def _run(self, feeds: dict[str, Array]) -> list[Any]:
        rows = len(next(iter(feeds.values())))
        assert self._runtime is not None
        try:
            outputs = self._runtime.run([port.name for port in self.options.outputs], feeds)
        except ItemError as error:
            raise ItemError(f"the model failed: {error.message}") from None
        for port, output in zip(self.options.outputs, outputs, strict=True):
            if np.ndim(output) == 0 or len(output) != rows:
                raise ItemError(f"the model's output {port.name} has no value for each of the {rows} rows")
        return outputs

    def _answer(self, outputs: Sequence[Any]) -> dict[str, Any]:
        ports, task = self.options.outputs, self.options.task
        if task == "detect" and (found := _detector(ports)) is not None:
            said = np.asarray(outputs[found[0]]).reshape(-1)
            # converters of scikit-learn say -1 and 1, as its predict()
            anomaly = said != 0 if ports[found[0]].name.lower() == "anomaly" else said < 0
            score = np.asarray(outputs[found[1]], np.float64).reshape(-1)
            return {"anomaly": tables.column(anomaly), "score": tables.column(score)}
        if task == "classify" and (classes := _classifier(ports)) is not None:
            label, scores = classes
            return self._classes(None if label is None else outputs[label], outputs[scores])
        return {port.name: tables.column(output) for port, output in zip(ports, outputs, strict=True)}

    def _classes(self, said: Any, scores: Any) -> dict[str, Any]:
        """said: the class of each row, if the model says it. scores: ``[n, classes]``, or a map for each row."""
        from tally.arrays import array_of, texts_of

        if isinstance(scores, list):
            said = np.asarray(said).reshape(-1).tolist()
            share = [float(each[name]) for each, name in zip(scores, said, strict=True)]
            return {"label": self._named(said), "score": tables.column(share)}
        shares = self._probabilities(np.asarray(scores))
        best = shares.argmax(axis=1)
        score = tables.column(shares[np.arange(len(best)), best])
        if said is not None:
            said = np.asarray(said).reshape(-1)
            if self._softmax and (said == shares.argmin(axis=1)).all() and (said != best).all():
                raise ModelRefutedError(
                    f"{self.options.file} was taken for a classifier, and says the class with the lowest score: "
                    "scores are distances, say",
                    hint="Use --task values, which gives the outputs as they are.",
                )
            return {"label": self._named(said.tolist()), "score": score}
        names = self.options.labels or [str(number) for number in range(shares.shape[1])]
        label = texts_of(names).take(array_of(best))
        return {"label": label, "index": tables.column(best.astype(np.int64)), "score": score}

    def _probabilities(self, scores: Array) -> Array:
        """``[n, classes]`` scores as float64 probabilities; raises ModelRefutedError where they are none any more."""
        values = scores.astype(np.float64)
        if self._softmax is None:
            self._decide(values)
        if not self._softmax:
            if self.options.softmax == "auto" and not _in_range(values):
                raise ModelRefutedError(
                    f"{self.options.file} gave scores in 0..1 so far, and now some between {values.min():.4g} and "
                    f"{values.max():.4g}",
                    hint="Say --set softmax=always if softmax is to be applied to all of them, or never.",
                )
            return values
        powers: Array = np.exp(values - values.max(axis=1, keepdims=True))
        shares: Array = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def _named(self, said: Sequence[Any]) -> Any:
        from tally.arrays import texts_of

        names = self.options.labels
        if names and all(isinstance(each, int) and 0 <= each < len(names) for each in set(said)):
            return texts_of([names[each] for each in said])
        return texts_of([str(each) for each in said])

    def describe(self) -> str:
        inputs = ", ".join(port.name for port in self.options.inputs)
        return f"{self.options.file} ({inputs}), {self.options.task}, batch {self.batch_size}"

    def close(self) -> None:
        self._runtime = None


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], list):
        return [each for part in parts for each in part]
    return np.concatenate(parts)


def _tensor(port: Port, table: pa.Table, values: Array | None, start: int, end: int) -> Array:
    """Columns ``start`` to ``end`` as one input wants them."""
    columns = table.select(range(start, end))
    tensor: Array
    if port.dtype == "object":
        import pyarrow as pa

        texts = [column.cast(pa.string()).to_numpy() for column in columns.columns]
        tensor = np.stack(texts, axis=1).astype(object)
    else:
        if not tables.is_numeric(columns):
            text = next(name for name in columns.column_names if not tables.is_numeric(columns.select([name])))
            raise ItemError(f"{text} is {table.schema.field(text).type}, but the model takes numbers")
        # whole numbers go straight to those that are wanted: beyond 2**53, floats do not hold them all
        if port.dtype == "int64":
            numbers = [column.to_numpy().astype(np.int64) for column in columns.columns]
            tensor = np.stack(numbers, axis=1)
        else:
            source = tables.matrix(columns) if values is None else values[:, start:end]
            tensor = source.astype(port.dtype)
    return np.ascontiguousarray(tensor[:, 0] if port.rank == 1 else tensor)


def _in_range(scores: Array) -> bool:
    finite = scores[np.isfinite(scores)]
    return not finite.size or bool(finite.min() >= -1e-6 and finite.max() <= 1 + 1e-6)
