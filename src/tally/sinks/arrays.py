"""Lists of plain values to Arrow arrays, without importing pandas.

``pyarrow.array`` imports pandas first, where it is installed, to ask whether the list is a Series. In a worker that
would be half of the time until its first rows are written.
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


def _array(kind: pa.DataType, count: int, *buffers: Any) -> pa.Array:
    return pa.Array.from_buffers(kind, count, [None, *map(pa.py_buffer, buffers)])
