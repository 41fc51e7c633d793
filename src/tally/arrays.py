"""Between Python's values, NumPy's and Arrow's, without importing pandas.

``pyarrow.array`` and ``pyarrow.scalar`` import pandas first, where it is installed, to ask whether what they are given
is a Series. In a worker that would be half of the time until its first rows are written. So do functions of
``pyarrow.compute`` that are given a plain value, which they make a scalar of, and ``to_numpy()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

_LONGEST = 2**31 - 1
"""Bytes that the texts of one ``pyarrow.string`` array hold at most."""


def plain_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array | None:
    """The array, if all values are of the Python type that the Arrow type is made for: texts, integers or floats.

    None for all others, nulls among them; they are for ``pyarrow.array``. Raises UnicodeEncodeError as that does.
    """
    types = set(map(type, values))
    if pa.types.is_string(kind) and types == {str}:
        joined = "".join(values)
        texts = values if joined.isascii() else [value.encode() for value in values]
        ends = np.cumsum([0, *map(len, texts)])
        if ends[-1] > _LONGEST:
            return None
        return _array(kind, len(values), ends.astype(np.int32), joined.encode())
    if (types == {int} and pa.types.is_integer(kind)) or (types == {float} and kind in (pa.float32(), pa.float64())):
        try:
            with np.errstate(over="ignore"):
                return _array(kind, len(values), np.array(values, kind.to_pandas_dtype()))
        except OverflowError:  # an integer that is out of the type's range
            return None
    return None


def texts_of(values: Sequence[str]) -> pa.StringArray:
    """The texts. Raises UnicodeEncodeError for what is no Unicode."""
    found = plain_array(values, pa.string())
    return pa.array(values, pa.string()) if found is None else found


def array_of(values: np.ndarray[Any, Any]) -> pa.Array:
    """A vector of numbers or truth values, of which none is null. Memory is shared where it can be."""
    if values.dtype == np.bool_:
        return _array(pa.bool_(), len(values), np.packbits(values, bitorder="little"))
    native = np.ascontiguousarray(values, values.dtype.newbyteorder("="))
    return _array(pa.from_numpy_dtype(native.dtype), len(native), native)


def scalar_of(value: str | float, kind: pa.DataType | None = None) -> pa.Scalar:
    """The value as a scalar. kind: string, int64, float64 or bool by default."""
    if isinstance(value, bool):
        return array_of(np.array([value]))[0]
    made = plain_array([value], kind or {str: pa.string(), int: pa.int64(), float: pa.float64()}[type(value)])
    return pa.scalar(value, kind) if made is None else made[0]


def numbers_of(values: pa.Array | pa.ChunkedArray) -> np.ndarray[Any, Any]:
    """Integers or floats as a vector of their type. Of floats, null becomes NaN; integers have none. Memory is shared
    where it can be, and is not to be written to."""
    assert not values.null_count or pa.types.is_floating(values.type)
    kind = values.type.to_pandas_dtype()  # which is NumPy's
    if isinstance(values, pa.ChunkedArray):
        parts = [numbers_of(chunk) for chunk in values.chunks]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, kind), *parts], dtype=kind)
    if not len(values):
        return np.empty(0, kind)
    found = np.frombuffer(values.buffers()[1], kind, values.offset + len(values))[values.offset :]
    return np.where(truths_of(values.is_valid()), found, np.nan).astype(kind) if values.null_count else found


def truths_of(values: pa.BooleanArray) -> np.ndarray[Any, Any]:
    """Truth values, of which none is null, as ``bool[n]``."""
    if not len(values):
        return np.empty(0, np.bool_)
    stop = values.offset + len(values)
    bits = np.unpackbits(np.frombuffer(values.buffers()[1], np.uint8), count=stop, bitorder="little")
    return bits[values.offset :].astype(np.bool_)


def no_rows(schema: pa.Schema) -> pa.RecordBatch:
    """A batch of these columns, without rows."""
    return pa.RecordBatch.from_arrays([pa.nulls(0, kind) for kind in schema.types], schema=schema)


def _array(kind: pa.DataType, count: int, *buffers: Any) -> pa.Array:
    return pa.Array.from_buffers(kind, count, [None, *map(pa.py_buffer, buffers)])
