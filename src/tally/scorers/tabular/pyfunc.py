"""Scores tables with MLflow models: folders with an ``MLmodel`` file, opened by ``mlflow.pyfunc``."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tally.errors import ItemError, ModelLoadError, ModelNotFoundError, SpecError, TallyError, UntrustedModelError
from tally.models import kinds
from tally.models.base import Kind
from tally.models.reference import ModelRef
from tally.optional import needed
from tally.scorers.base import Results, Scorer
from tally.scorers.tabular import tables

if TYPE_CHECKING:
    import pyarrow as pa

_ARROW = {
    "boolean": "bool",
    "integer": "int32",
    "long": "int64",
    "float": "float32",
    "double": "float64",
    "string": "string",
    "datetime": "timestamp[ns]",
}
"""MLflow's types of columns as Arrow's. MLflow refuses columns of any other type than those of the signature."""


class PyfuncOptions(tables.TableOptions):
    """Options of a scorer of MLflow models, as :func:`inspect` completes them.

    names, types: the columns of the model's signature, and MLflow's names of their types. tensor: the type of the one
    array that it takes in place of columns, as numpy names it. trusted: opening it may run the code that it carries.
    """

    names: list[str] | None = None
    types: list[str] | None = None
    tensor: str | None = None
    count: int | None = None
    trusted: bool = False
    assumed: tuple[str, ...] = ()


def inspect(folder: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
    """Open a model once, and fill in every option that was left out.

    Returns options (JSON-able) for :class:`PyfuncScorer`. Raises SpecError with every problem, ModelNotFoundError,
    ModelLoadError, UntrustedModelError.
    """
    if problems := tables.TableOptions.problems_in(options):
        raise SpecError([f"{folder.name}: {each}" for each in problems])
    given = tables.TableOptions.model_validate(dict(options))
    model = _opened(folder, trusted)
    names, types, tensor, count = _signature(model)
    assumed = []
    if given.features is not None:
        tables.check_count(given.features, len(names) if names is not None else count, folder.name)
    elif names is None:
        columns = "all columns of the table" if count is None else f"the table's {count} numeric columns in their order"
        assumed.append(f"the model's signature names no columns: assumed {columns} (--set features=...)")
    found = PyfuncOptions(
        **given.model_dump(),
        names=names,
        types=types,
        tensor=tensor,
        count=count,
        trusted=trusted,
        assumed=tuple(assumed),
    )
    return found.model_dump(mode="json")


def _opened(folder: Path, trusted: bool) -> Any:
    if not (folder / "MLmodel").is_file():
        raise ModelNotFoundError(f"{folder}: there is no MLmodel in this folder")
    if not trusted:
        raise UntrustedModelError(
            f"{folder} is an MLflow model: opening it runs whatever code it carries",
            hint="If you know who made it, give --trust.",
        )
    _check_described(folder)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # scoring calls nobody up
    with needed(f"{folder} needs", kinds.extra_of("pyfunc"), ModelLoadError), _quiet():
        import mlflow.pyfunc
    try:
        with _quiet():
            return mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)
    except ModuleNotFoundError as error:
        raise ModelLoadError(
            f"{folder} needs the module {error.name}, which is not installed",
            hint="The model's own requirements.txt names what it needs.",
        ) from None
    except Exception as error:
        raise ModelLoadError(f"{folder} cannot be opened by MLflow: {type(error).__name__}: {_line(error)}") from error


def _check_described(folder: Path) -> None:
    """Raises ModelLoadError unless MLmodel describes a model that can be called from Python."""
    import yaml

    path = folder / "MLmodel"
    try:
        described = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ModelLoadError(f"{path} is damaged: {_line(error)}") from None
    flavors = described.get("flavors") if isinstance(described, dict) else None
    if not isinstance(flavors, dict) or "python_function" not in flavors:
        found = ", ".join(map(str, flavors)) if isinstance(flavors, dict) else "none"
        raise ModelLoadError(f"{path} has no flavor python_function, which is what can be scored (it has: {found})")


def _signature(model: Any) -> tuple[list[str] | None, list[str] | None, str | None, int | None]:
    """Names and types of the columns, type of the array, and number of columns, as far as the model says them."""
    signature = model.metadata.signature
    inputs = None if signature is None else signature.inputs
    if inputs is None or not getattr(inputs, "inputs", None):
        return None, None, None, None
    if inputs.is_tensor_spec():
        first = inputs.inputs[0]
        if len(inputs.inputs) > 1 or len(first.shape) != 2:
            raise ModelLoadError(f"the model takes tensors ({inputs}), not rows of a table")
        return None, None, str(first.type), first.shape[1] if first.shape[1] > 0 else None
    if not inputs.has_input_names():
        return None, None, None, len(inputs.inputs)
    return inputs.input_names(), [getattr(each, "name", str(each)) for each in inputs.input_types()], None, None


@contextmanager
def _quiet() -> Iterator[None]:
    """MLflow warns and logs about much that is not the user's business here."""
    logger = logging.getLogger("mlflow")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        # MLflow puts filters of its own before this one; what they show is recorded instead, and dropped
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


class PyfuncKind(Kind):
    """MLflow models: folders with an ``MLmodel``."""

    reads_files = False

    def inspect(self, path: Path, options: Mapping[str, Any], *, trusted: bool) -> dict[str, Any]:
        return inspect(path.parent, options, trusted=trusted)

    def create(self, ref: ModelRef) -> Scorer:
        return PyfuncScorer(ref.options)


class PyfuncScorer(Scorer):
    """Scores tables with an MLflow model; options as :func:`inspect` returns them."""

    input = "table"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = PyfuncOptions.complete(options)
        self.batch_size = self.options.batch_size
        self.features = self.options.features or self.options.names or self.options.count
        self._model: Any = None
        self._name = ""

    def load(self, artifacts: Path, device: str) -> None:
        """Open the model. Raises ModelNotFoundError, ModelLoadError, UntrustedModelError."""
        self._model = _opened(artifacts, self.options.trusted)
        self._name = artifacts.name

    def score(self, table: pa.Table) -> Results:
        """Score the rows of a table; a row whose value does not fit the signature is an error of its own."""
        table = tables.features_of(table, self.features)
        if self.options.names:
            table = table.rename_columns(self.options.names)
        table, errors, count = *self._fitted(table), table.num_rows
        if len(errors) == count:
            return tables.results(None, errors, count)
        given = tables.matrix(table).astype(self.options.tensor) if self.options.tensor else tables.frame(table)
        with _quiet():
            answer = self._model.predict(given)
        rows = tables.answered(answer, table.num_rows)
        if rows is None and isinstance(answer, (list, np.ndarray)) and len(answer) == table.num_rows:
            rows = _listed(list(answer))
        if rows is None:
            size = f" of length {len(answer)}" if hasattr(answer, "__len__") else ""
            raise TallyError(
                f"the model answered with {type(answer).__name__}{size} for {table.num_rows} rows",
                hint="It has to answer with one value or row for each.",
            )
        return tables.results(rows, errors, count)

    def _fitted(self, table: pa.Table) -> tuple[pa.Table, dict[int, ItemError]]:
        """The rows whose values fit the signature's types, as these types; the others as errors."""
        import pyarrow as pa

        errors: dict[int, ItemError] = {}
        if self.options.tensor and tables.is_numeric(table):
            errors = tables.beyond_type(table, [self.options.tensor] * table.num_columns)
            if np.dtype(self.options.tensor).kind in "iub":
                errors = tables.unusable(table, tables.matrix(table), nan=False) | errors
        columns = []
        for name, values, kind in zip(table.column_names, table.columns, self.options.types or (), strict=False):
            arrow = pa.type_for_alias(_ARROW[kind]) if kind in _ARROW else values.type
            cast, wrong = _cast(values, arrow)
            columns.append(cast)
            whole = kind in ("boolean", "integer", "long")  # numpy's have no null
            for row in np.flatnonzero(wrong | np.asarray(cast.is_null()) if whole else wrong).tolist():
                value = values[row].as_py()
                shown = "null" if value is None else repr(value)
                errors.setdefault(row, ItemError(f"{name} is {shown}, but the model's signature says {kind}"))
        if columns:
            table = pa.table(columns, names=table.column_names)
        if errors:
            good = np.ones(table.num_rows, bool)
            good[list(errors)] = False
            table = table.filter(good)
        return table, errors

    def describe(self) -> str:
        return f"{self._name} (MLflow), batch {self.batch_size}"

    def close(self) -> None:
        self._model = None


def _cast(values: pa.ChunkedArray, kind: pa.DataType) -> tuple[pa.ChunkedArray, tables.Array]:
    """A column as another type, null where a value does not fit; and where that is."""
    import pyarrow as pa

    if pa.types.is_floating(kind) and pa.types.is_integer(values.type):
        return values.cast(kind, safe=False), np.zeros(len(values), bool)
    try:
        return values.cast(kind), np.zeros(len(values), bool)
    except pa.ArrowException:
        pass
    found, wrong = [], np.zeros(len(values), bool)
    for row, value in enumerate(values):
        try:
            found.append(value.cast(kind).as_py())
        except pa.ArrowException:
            found.append(None)
            wrong[row] = True
    return pa.chunked_array([pa.array(found, kind)]), wrong


def _listed(answers: list[Any]) -> pa.Table | None:
    """A list with one answer for each row: dicts are rows, other values are predictions."""
    import pyarrow as pa

    rows = answers if all(isinstance(each, dict) for each in answers) else [{"prediction": each} for each in answers]
    try:
        return pa.Table.from_pylist(rows)
    except (pa.ArrowException, TypeError, ValueError):
        return None
