"""The contract of a database that rows are read from.

A query is read once, from its first row to its last, in one transaction that changes nothing: the rows are those of one
moment, where the database has such a thing. Rows come in batches, never all at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tally.errors import SpecError, StorageError
from tally.sources.tables.formats import plain_type

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 65_536
"""Rows that are fetched at once."""
_SHOWN = 120


class Column(NamedTuple):
    """A column of a query. rounded: its values are decimals of any number of digits, taken for float64. remark: what to
    tell of its values."""

    name: str
    kind: pa.DataType
    rounded: bool = False
    remark: str = ""


class OpenQuery(ABC):
    """A query, and the connection that it is read over, for one thread.

    columns: of its rows, in order. snapshot: in words, which moment the rows are of.
    """

    columns: Sequence[Column]
    snapshot: str

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """The rows, in the order in which the database gives them. Call it once. Raises StorageError, which names the
        column and the value where one is not what its column's type says; StorageAwayError."""

    @abstractmethod
    def close(self) -> None:
        """Give the connection back. Idempotent."""

    @property
    def schema(self) -> pa.Schema:
        """The columns' names and types."""
        import pyarrow as pa

        return pa.schema([(each.name, plain_type(each.kind)) for each in self.columns])


def distinct(columns: Sequence[Column]) -> Sequence[Column]:
    """The columns. Raises SpecError where two cannot be told apart, or one has no name."""
    seen: set[str] = set()
    for each in columns:
        if not each.name:
            raise SpecError("query: a column has no name; give it one with AS")
        if each.name.lower() in seen:
            raise SpecError(f"query: has two columns of the name {each.name!r}; name one of them otherwise with AS")
        seen.add(each.name.lower())
    return columns


def as_batch(rows: Sequence[Sequence[Any]], columns: Sequence[Column]) -> pa.RecordBatch:
    """Rows of a driver, as columns of Arrow. Raises StorageError for a value that is not of its column's type."""
    import pyarrow as pa

    values = list(zip(*rows, strict=True)) if rows else [()] * len(columns)
    arrays = [_array(given, column) for given, column in zip(values, columns, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=[each.name for each in columns])


def _array(values: Sequence[Any], column: Column) -> pa.Array:
    import pyarrow as pa

    def made(values: Sequence[Any]) -> pa.Array:
        if column.rounded:
            values = [each if each is None else as_float(each) for each in values]
        return pa.array(values, column.kind)

    try:
        return made(values)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        for value in values:
            try:
                made([value])
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                raise misfit(column, value) from None
        raise


def as_float(number: Any) -> float:
    """A decimal as a float64. Raises ValueError for a whole number that none holds."""
    found = float(number)
    if found.is_integer() and abs(found) >= 2**53 and int(number) != int(found):
        raise ValueError(number)
    return found


def misfit(column: Column, value: Any) -> StorageError:
    """The error for a value that is not of its column's type."""
    shown = repr(value) if isinstance(value, (str, bytes)) else str(value)
    return StorageError(
        f"query: column {column.name!r} is {column.kind}, and holds {shown[:_SHOWN]}",
        hint="Say in the query what is meant, with CAST, say; or leave such rows out.",
    )
