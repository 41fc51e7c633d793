"""Which of many models scores a row: keys, and a scorer that has a model for each of them.

Keys are compared by how their values are written, so that the integer 3 of a Parquet file, the 3.0 that a gap makes of
it in a CSV, and the "3" of a file name are one and the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from tally.errors import ItemError, ModelLoadError, TallyError
from tally.scorers.base import Results, Scorer, TableResult
from tally.scorers.per_key.batched_svms import BatchedSvms, Integers
from tally.scorers.run import copies_of
from tally.scorers.run import score as scored
from tally.scorers.tabular import tables

if TYPE_CHECKING:
    import pyarrow as pa

DETECTOR: Mapping[str, str] = {"anomaly": "bool", "score": "float64"}
"""The columns that detectors of anomalies give."""

OPEN_MODELS = 4096
"""Models that cannot be batched, and are kept open at the same time."""

T = TypeVar("T")
Key: TypeAlias = tuple[str, ...]
Piece: TypeAlias = "tuple[Integers, pa.Table]"
"""Rows of a result, and the positions where they belong."""


def written(values: pa.Array) -> pa.Array:
    """How each value is written in a key: strings; null stays null.

    Whole numbers have no decimal point whatever their type, truth values are ``true`` and ``false``, times are as in
    ISO 8601 with a space between date and time, to the microsecond.
    """
    import pyarrow as pa
    from pyarrow import compute

    from tally.arrays import scalar_of

    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if pa.types.is_string(values.type):
        return values
    if pa.types.is_timestamp(values.type):
        values = values.cast(pa.timestamp("us", values.type.tz), safe=False)
    text = values.cast(pa.string())
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        whole = compute.and_(
            compute.equal(values, compute.floor(values)), compute.less(compute.abs(values), scalar_of(2.0**53))
        )
        digits = compute.if_else(whole, values, scalar_of(0.0)).cast(pa.int64()).cast(pa.string())
        text = compute.if_else(whole, digits, text)
    return text


def key_of(by: Sequence[str], values: Mapping[str, Any]) -> Key | None:
    """A key from its columns' values; None if one of them is null."""
    import pyarrow as pa

    found = []
    for name in by:
        value = values[name]
        if value is None:
            return None
        if type(value) is int:
            value = str(value)
        elif type(value) is not str:
            value = written(pa.array([value]))[0].as_py()
        found.append(value)
    return tuple(found)


def shown(by: Sequence[str], key: Sequence[Any]) -> str:
    """A key for people: ``Device=3,Tag=5``."""
    return ",".join(f"{name}={'null' if value is None else value}" for name, value in zip(by, key, strict=True))


class KeyIndex:
    """Finds rows' keys among those of models. keys: one array for each column of the key, all of one length."""

    def __init__(self, keys: Sequence[pa.Array]) -> None:
        from pyarrow import compute

        self._columns = [written(column) for column in keys]
        self._values = [compute.unique(column) for column in self._columns]
        codes = self._codes(self._columns)
        self._order = np.argsort(codes, kind="stable")
        self._sorted = codes[self._order]

    @classmethod
    def of_rows(cls, columns: Sequence[pa.Array]) -> KeyIndex:
        """An index of the different keys of rows. Keys with null are left out."""
        import pyarrow as pa

        names = [str(number) for number in range(len(columns))]
        encoded = [column.dictionary_encode() for column in columns]
        text = [written(each.dictionary).take(each.indices) for each in encoded]
        rows = pa.table(text, names=names).drop_null()
        different = rows.group_by(names, use_threads=False).aggregate([])
        return cls([whole(different.column(name)) for name in names])

    def __len__(self) -> int:
        return len(self._order)

    def twice(self) -> Key | None:
        """A key that is there more than once."""
        same = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        return self.key(int(self._order[same[0]])) if len(same) else None

    def __iter__(self) -> Iterator[Key]:
        return zip(*(column.to_pylist() for column in self._columns), strict=True)

    def key(self, number: int) -> Key:
        """The key at a position."""
        return tuple(column[number].as_py() for column in self._columns)

    def find(self, columns: Sequence[pa.Array]) -> Integers:
        """The position of each row's key, int64[n]; -1 where it is not there. columns: arrays of any scalar type."""
        codes = self._codes(columns)
        if not len(codes) or not len(self):
            return np.full(len(codes), -1)
        # Neighbours mostly have the same key: look for each run once.
        starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]]))
        wanted = codes[starts]
        places = np.minimum(np.searchsorted(self._sorted, wanted), len(self) - 1)
        found = np.where(self._sorted[places] == wanted, self._order[places], -1)
        return np.repeat(found, np.diff(starts, append=len(codes)))

    def _codes(self, columns: Sequence[pa.Array]) -> Integers:
        """One number for each combination of known values; -1 where one of them is not known."""
        from pyarrow import compute

        total = np.zeros(len(columns[0]), np.int64)
        unknown = np.zeros(len(total), bool)
        for column, values in zip(columns, self._values, strict=True):
            encoded = column.dictionary_encode()
            codes = compute.index_in(written(encoded.dictionary), values, skip_nulls=True)
            of_value = np.append(_filled(codes, -1).astype(np.int64), -1)
            code = of_value[_filled(encoded.indices, len(of_value) - 1)]
            total = total * len(values) + code
            unknown |= code < 0
        total[unknown] = -1
        return total


class ModelPerKey(Scorer):
    """Scores tables with a model for each key. Subclasses say where the models come from.

    A row whose key has no model, or whose model cannot be opened, is an error of its own.
    """

    input = "table"

    def __init__(
        self,
        *,
        by: Sequence[str],
        features: Sequence[str] | int | None,
        columns: Mapping[str, str] | None,
        batch_size: int,
    ) -> None:
        self.by = tuple(by)
        self.features = features
        self.columns = columns
        self.batch_size = batch_size
        self._opened = lru_cache(OPEN_MODELS)(self._kept)

    def _find(self, keys: Sequence[pa.Array]) -> Integers:
        """The model of each row, int64[n]; -1 where there is none. keys: the columns of the key."""
        raise NotImplementedError

    def _batched(self, present: Integers) -> tuple[BatchedSvms | None, Integers]:
        """The batched SVMs, and the position there of each model, int64[models]; -1 of a model that is not batched.

        present: the models that are wanted now.
        """
        raise NotImplementedError

    def _open(self, number: int) -> Scorer:
        """The scorer of one model that is not batched. Raises TallyError."""
        raise NotImplementedError

    def _kept(self, number: int) -> Scorer | TallyError:
        return or_error(lambda: self._open(number))

    def score(self, table: pa.Table) -> Results:
        """One row for each row of the table, in the same order."""
        keys = [whole(table.column(index)) for index in range(len(self.by))]
        number = self._find(keys)
        errors: dict[int, Exception] = {
            row: ItemError(self._missing({name: key[row].as_py() for name, key in zip(self.by, keys, strict=True)}))
            for row in np.flatnonzero(number < 0).tolist()
        }
        present = np.unique(number[number >= 0])
        if not len(present):
            return [errors[row] for row in range(len(number))]
        svms, places = self._batched(present)
        place = np.append(places, -1)[number]
        features = table.select(range(len(self.by), table.num_columns))
        pieces: list[Piece] = []
        if svms is not None and (rows := np.flatnonzero(place >= 0)).size:
            pieces.append((rows, _decide(svms, place[rows], _taken(features, rows), rows, errors)))
        for each in present[places[present] < 0].tolist():
            rows = np.flatnonzero(number == each)
            pieces += self._alone(each, _taken(features, rows), rows, errors)
        if not pieces:
            return [errors[row] for row in range(len(number))]
        found = _placed(pieces, len(number))
        return TableResult(found, errors) if errors else found

    def _missing(self, key: Mapping[str, Any]) -> str:
        return self.missing_reason(key) or f"there is no model for {shown(self.by, list(key.values()))}"

    def _alone(self, number: int, table: pa.Table, rows: Integers, errors: dict[int, Exception]) -> Iterator[Piece]:
        """What one model says about its rows. What goes wrong is added to ``errors``."""
        scorer = self._opened(number)
        if isinstance(scorer, TallyError):
            errors |= dict.fromkeys(rows.tolist(), ItemError(scorer.message, hint=scorer.hint))
            return
        start = 0
        for part in scored(scorer, table, table.num_rows, copies_of(table)):
            errors |= {int(rows[start + row]): error for row, error in part.errors.items()}
            if hasattr(part.results, "num_rows"):  # or else there is nothing but errors
                yield rows[start : start + part.count], part.results
            start += part.count


def _filled(numbers: pa.Int32Array, number: int) -> Any:
    """``int32[n]`` with a number in the place of null."""
    from tally.arrays import numbers_of, scalar_of

    return numbers_of(numbers.fill_null(scalar_of(number, numbers.type)))


def _decide(
    svms: BatchedSvms, model: Integers, table: pa.Table, rows: Integers, errors: dict[int, Exception]
) -> pa.Table:
    """What batched SVMs say about rows. What goes wrong is added to ``errors``, under the numbers in ``rows``."""
    import pyarrow as pa

    from tally.arrays import array_of

    if not tables.is_numeric(table):
        kinds = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
        errors |= dict.fromkeys(rows.tolist(), ItemError(f"the model takes numbers, and is given {kinds}"))
        score = np.zeros(len(rows))
    else:
        values = tables.matrix(table)
        score = svms.decision(values, model)
        if (wrong := np.flatnonzero(np.isnan(score))).size:
            reasons = tables.unusable(table, values, nan=False)
            overflow = ItemError("values are too large for the model's arithmetic")
            errors |= {int(rows[row]): reasons.get(row, overflow) for row in wrong.tolist()}
    # libsvm calls what lies on the boundary an anomaly.
    return pa.table({"anomaly": array_of(~(score > 0)), "score": array_of(score)})


def _taken(table: pa.Table, rows: Integers) -> pa.Table:
    """Some rows, in order."""
    first, last = int(rows[0]), int(rows[-1])
    return table[first : last + 1] if last - first + 1 == len(rows) else table.take(rows)


def _placed(pieces: Sequence[Piece], count: int) -> pa.Table:
    """The pieces' rows at their places in a table of ``count`` rows; other rows are null."""
    import pyarrow as pa

    found = pa.concat_tables([table for _, table in pieces], promote_options="permissive")
    if len(pieces) == 1 and len(pieces[0][0]) == count:
        return found
    place_of = np.full(count, -1)
    place_of[np.concatenate([rows for rows, _ in pieces])] = np.arange(found.num_rows)
    return found.take(pa.array(place_of, mask=place_of < 0))


def or_error(open_one: Callable[[], T]) -> T | TallyError:
    """What it returns, or why it failed: a model that cannot be opened costs its own rows, and is not tried again."""
    try:
        return open_one()
    except TallyError as error:
        return error.with_traceback(None)
    except Exception as error:
        return ModelLoadError(f"the model cannot be used: {type(error).__name__}: {error}")


def columns_differ(found: Mapping[str, str] | None, wanted: Mapping[str, str] | None, name: str) -> str | None:
    """What is wrong with a model that does not give the columns that the others give."""
    if found is None or wanted is None or dict(found) == dict(wanted):
        return None
    return f"{name} gives {_named(found)}, and others give {_named(wanted)}: that does not make one table"


def _named(columns: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in columns.items())


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array."""
    import pyarrow as pa

    return pa.concat_arrays(column.chunks) if column.chunks else pa.array([], column.type)
