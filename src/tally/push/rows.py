"""Rows of items, as tables of databases hold them: the key, and a number where an item has several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from tally.arrays import array_of, numbers_of

NUMBER = "item_row"
"""The column that numbers the rows of one item, from 0."""


def numbers(keys: pa.ChunkedArray) -> pa.Array:
    """For each row how many of its key there are before it: ``int32[n]``."""
    codes = keys.combine_chunks().dictionary_encode()
    if len(codes.dictionary) == len(codes):
        return array_of(np.zeros(len(codes), np.int32))
    found = numbers_of(codes.indices)
    order = np.argsort(found, kind="stable")
    ordered = found[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    lengths = np.diff(np.r_[starts, len(ordered)])
    number = np.empty(len(found), np.int32)
    number[order] = np.arange(len(found)) - np.repeat(starts, lengths)
    return array_of(number)


def with_a_type(rows: pa.Table) -> pa.Table:
    """The rows without columns that hold nothing yet, so that it is not known what they will hold."""
    return rows.select([field.name for field in rows.schema if not pa.types.is_null(field.type)])


def twice(names: Sequence[str]) -> str | None:
    """A name that differs from another one in capitals only, or is one of Tally's own."""
    seen = {NUMBER}
    for name in names:
        if name.casefold() in seen:
            return name
        seen.add(name.casefold())
    return None
