"""What the scorers of tables share: columns to numbers and DataFrames, rows that cannot be scored, results to columns.

Tables are ``pyarrow.Table``. A *matrix* is ``float64[rows, features]``, C-contiguous, NaN where a value is null.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tally.errors import ItemError, ModelLoadError, SpecError
from tally.models.reference import BATCH_LIMIT
from tally.optional import needed
from tally.scorers.base import Results, TableResult

if TYPE_CHECKING:
    import pyarrow as pa

Array: TypeAlias = "np.ndarray[Any, Any]"


class TableOptions(BaseModel):
    """What every scorer of tables lets its user say.

    features: the columns to score, in the model's order. batch_size: rows scored at once.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: list[str] | None = Field(default=None, min_length=1)
    batch_size: int = Field(default=BATCH_LIMIT, ge=1, le=BATCH_LIMIT)

    @field_validator("features", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @classmethod
    def complete(cls, options: Mapping[str, Any]) -> Self:
        """Options as ``inspect`` of the scorer's module returns them. Raises SpecError for others."""
        try:
            return cls.model_validate(dict(options))
        except ValidationError as error:
            missing = ", ".join(".".join(map(str, each["loc"])) for each in error.errors())
            raise SpecError(
                f"the options are not complete or not right: {missing}",
                hint="Pass them through inspect() of the scorer's module.",
            ) from None

    @classmethod
    def problems_in(cls, options: Mapping[str, Any]) -> list[str]:
        """One line for each thing that is wrong with options."""
        from tally.models.package import problems_in

        return problems_in(cls, options)


def check_count(features: Sequence[str], count: int | None, model: str) -> None:
    """Raises SpecError if as many columns were named as the model does not take."""
    if count is not None and len(features) != count:
        raise SpecError(
            f"features: {len(features)} named ({', '.join(features)}), but {model} takes {count}",
            hint="Name the columns in the order in which the model was fitted to them.",
        )


def assumed_features(count: int, fitted: str) -> str:
    """What to tell the user where only the number of features is known. fitted: such as "the model was"."""
    columns = "column" if count == 1 else "columns in their order"
    return (
        f"features were not given, and {fitted} fitted without names: assumed the table's {count} numeric {columns} "
        "(--set features=...)"
    )


# ----------------------------------------------------------------------------------------------- what goes in


def features_of(table: pa.Table, features: Sequence[str] | int | None) -> pa.Table:
    """The table without the columns of its key, which stand before the features."""
    if features is None:
        return table
    count = features if isinstance(features, int) else len(features)
    return table.select(range(table.num_columns - count, table.num_columns)) if count < table.num_columns else table


def is_numeric(table: pa.Table) -> bool:
    """Whether every column holds numbers (truth values count as 0 and 1)."""
    return all(_is_number(field.type) for field in table.schema)


def _is_number(kind: pa.DataType) -> bool:
    import pyarrow as pa

    types = pa.types
    return bool(
        types.is_floating(kind)
        or types.is_integer(kind)
        or types.is_boolean(kind)
        or types.is_decimal(kind)
        or types.is_null(kind)
    )


def matrix(table: pa.Table) -> Array:
    """A numeric table as ``float64[rows, columns]``; null becomes NaN."""
    import pyarrow as pa

    from tally.arrays import numbers_of

    values = np.empty((table.num_rows, table.num_columns))
    for index, column in enumerate(table.columns):
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.uint8())
        # float32 has no safe way from all of int64, float64 has for what is told apart in practice
        values[:, index] = numbers_of(column.cast(pa.float64(), safe=False))
    return values


def frame(table: pa.Table) -> Any:
    """A table as a ``pandas.DataFrame``. Text is of dtype object, where null is None; numbers with nulls are float64,
    where null is NaN."""
    with needed("the model takes a DataFrame, and needs", "sklearn", ModelLoadError):
        import pandas
    columns = {place: _series(values) for place, values in enumerate(table.columns)}
    found = pandas.DataFrame(columns, index=pandas.RangeIndex(table.num_rows))
    found.columns = pandas.Index(table.column_names)
    return found


def _series(values: pa.ChunkedArray) -> Any:
    import pandas
    import pyarrow as pa

    types = pa.types
    if types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    kind = values.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return pandas.Series(values.to_numpy(), dtype=object)
    if _is_number(kind) and (values.null_count or types.is_decimal(kind)):
        return pandas.Series(matrix(pa.table([values], names=["values"]))[:, 0])
    return values.to_pandas()


def unusable(table: pa.Table, values: Array | None, *, nan: bool) -> dict[int, ItemError]:
    """Rows that hold what the model does not take: infinity, and where ``nan`` is false, null and NaN.

    values: the table as a matrix, if it is numeric. Returns position to error.
    """
    if values is not None:
        if np.isfinite(values).all():
            return {}
        bad = np.isinf(values) if nan else ~np.isfinite(values)
    else:
        bad = np.stack([_bad(column, nan) for column in table.columns], axis=1)
    errors = {}
    for row in np.flatnonzero(bad.any(axis=1)).tolist():
        column = int(bad[row].argmax())
        value = table.column(column)[row].as_py()
        shown = "null" if value is None else "NaN" if value != value else str(value)
        errors[row] = ItemError(f"{table.column_names[column]} is {shown}, which the model does not take")
    return errors


def beyond_type(table: pa.Table, kinds: Sequence[str]) -> dict[int, ItemError]:
    """Rows with numbers that the model's type does not hold: fractions for whole ones, and what is beyond its range.

    kinds: NumPy's name of the type that the model takes, for each column. Returns position to error; nulls are passed
    over.
    """
    import pyarrow as pa

    from tally.arrays import numbers_of

    errors: dict[int, ItemError] = {}
    for name, column, kind in zip(table.column_names, table.columns, kinds, strict=False):
        wanted = np.dtype(kind)
        if wanted.kind == "f" and wanted.itemsize < 8 and _is_number(column.type):
            _check_range(name, column, wanted, errors)
            continue
        if wanted.kind not in "iub" or not _is_number(column.type) or pa.types.is_boolean(column.type):
            continue
        low, high = (0, 1) if wanted.kind == "b" else (np.iinfo(wanted).min, np.iinfo(wanted).max)
        if pa.types.is_integer(column.type) and not column.null_count:
            numbers = numbers_of(column)
            bad = (numbers < low) | (numbers > high)
        else:
            numbers = matrix(pa.table([column], names=[name]))[:, 0]
            # the largest of 64 bits is no float: the next one is, and is beyond it
            bad = (numbers != np.rint(numbers)) | (numbers < low) | (numbers >= float(high) + 1)
            bad &= ~np.isnan(numbers)
        for row in np.flatnonzero(bad).tolist():
            shown = "true or false" if wanted.kind == "b" else f"whole numbers ({kind})"
            errors.setdefault(row, ItemError(f"{name} is {column[row].as_py()}, but the model takes {shown}"))
    return errors


def _check_range(name: str, column: pa.ChunkedArray, wanted: np.dtype[Any], errors: dict[int, ItemError]) -> None:
    """Finite numbers that would be infinite as the model takes them."""
    import pyarrow as pa

    most = np.finfo(wanted).max
    numbers = matrix(pa.table([column], names=[name]))[:, 0]
    for row in np.flatnonzero((np.abs(numbers) > most) & np.isfinite(numbers)).tolist():
        shown = f"numbers up to {most:.6g} ({wanted.name})"
        errors.setdefault(row, ItemError(f"{name} is {column[row].as_py()}, but the model takes {shown}"))


def _bad(column: pa.ChunkedArray, nan: bool) -> Array:
    import pyarrow as pa
    from pyarrow import compute

    bad = np.zeros(len(column), bool) if nan else np.asarray(column.is_null(nan_is_null=True))
    if pa.types.is_floating(column.type):
        bad = bad | np.asarray(compute.fill_null(compute.is_inf(column), False))
    return bad


# ---------------------------------------------------------------------------------------------- what comes out


def column(values: Any) -> pa.Array:
    """One value for each row, ``[n]``, ``[n, 1]`` or ``[n, k]`` (lists), as an Arrow array; text stays text."""
    import pyarrow as pa

    from tally.arrays import array_of, texts_of

    values = np.asarray(values)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim > 1:
        width = int(np.prod(values.shape[1:]))
        inner = column(values.reshape(-1))
        return pa.ListArray.from_arrays(np.arange(len(values) + 1, dtype=np.int32) * np.int32(width), inner)
    if values.dtype.kind in "biuf":
        return array_of(values)
    if values.dtype.kind in "US":
        return texts_of([_text(each) for each in values.tolist()])
    if values.dtype.kind == "O":
        return pa.array(values.tolist())
    return pa.array(np.ascontiguousarray(values))


def _text(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def answered(answer: Any, count: int) -> pa.Table | None:
    """What a model or script answered for ``count`` rows as a table, where it is columns already.

    answer: a DataFrame, Series, table, mapping of columns, or array of numbers or text. None of anything else, and
    where the number of rows is another.
    """
    import pyarrow as pa

    if hasattr(answer, "toarray"):  # sparse
        answer = answer.toarray()
    if isinstance(answer, pa.Table):
        found = answer
    elif isinstance(answer, (pa.Array, pa.ChunkedArray)):
        found = pa.table({"prediction": answer})
    elif hasattr(answer, "iloc"):
        if not hasattr(answer, "columns"):
            answer = answer.to_frame("prediction" if answer.name is None else str(answer.name))
        try:
            found = pa.Table.from_pandas(answer.rename(columns=str), preserve_index=False).replace_schema_metadata()
        except (pa.ArrowException, TypeError, ValueError):
            return None  # values of several types in one column
    elif isinstance(answer, np.ndarray) and answer.ndim > 0 and answer.dtype.kind in "biufUSM":
        found = pa.table({"prediction": column(answer)})
    elif isinstance(answer, Mapping) and answer and all(np.ndim(values) > 0 for values in answer.values()):
        try:
            found = pa.table({str(name): column(values) for name, values in answer.items()})
        except (pa.ArrowException, TypeError, ValueError):
            return None
    else:
        return None
    return found if found.num_rows == count else None


def type_names(table: pa.Table) -> dict[str, str]:
    """Column name to the name of its Arrow type, as in ``Scorer.columns``."""
    import pyarrow as pa

    def name(kind: pa.DataType) -> str:
        if pa.types.is_list(kind):
            return f"list<{name(kind.value_type)}>"
        return {"double": "float64", "float": "float32"}.get(str(kind), str(kind))

    return {field.name: name(field.type) for field in table.schema}


def without(errors: Collection[int], count: int) -> Array:
    """Which of so many rows, ``bool[count]``, are not among those that have errors."""
    good = np.ones(count, bool)
    good[list(errors)] = False
    return good


def results(
    rows: pa.Table | None,
    errors: Mapping[int, Exception],
    count: int,
    *,
    checked: Sequence[str] = ("score", "prediction"),
) -> Results:
    """The results of the rows that were scored, put between those of the rows that could not be.

    rows: one row for each of the ``count`` positions that ``errors`` does not name; None if there is none.
    checked: columns in which NaN is an error of its row too.
    """
    import pyarrow as pa

    from tally.arrays import numbers_of

    if rows is None:
        return [errors[position] for position in range(count)]
    good = without(errors, count)
    errors = dict(errors)
    positions: Array | None = None
    for name in checked:
        if name in rows.column_names and pa.types.is_floating(rows.schema.field(name).type):
            wrong = np.isnan(numbers_of(rows.column(name)))
            if wrong.any():
                positions = np.flatnonzero(good) if positions is None else positions
                for position in positions[wrong].tolist():
                    errors[position] = ItemError(f"the model's {name} is NaN")
    if not errors:
        return rows
    if rows.num_rows < count:
        places = np.cumsum(good) - 1
        rows = rows.take(pa.array(places, mask=~good))
    return TableResult(rows, errors)
