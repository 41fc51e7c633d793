"""Chunks of tables as lists of row ranges. Each is one of

- ``["rows", location, name, start, stop, rows, mark]``: rows of a Parquet file that has ``rows`` in all;
  ``location`` is an index into the listing's locations, or -1 for a work file. ``mark`` is that of the file when it was
  planned (see :meth:`tally.storage.Store.marked`); work files have none, nor have files in jobs of earlier versions;
- ``["key", ordinal, message]``: a key without a model, one item for all its rows;
- ``["bad", start, stop]``: lines that could not be read.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tally.sources.base import Chunk, ChunkLimit

RowRange = list[Any]

MOST = 2048
"""The most row ranges in one chunk."""
_SNAP = 0.6
"""The least share of a chunk that is kept when it is shortened to end with a row group."""


def length(row_range: RowRange) -> int:
    """The number of items."""
    if row_range[0] == "key":
        return 1
    return int(row_range[4] - row_range[3] if row_range[0] == "rows" else row_range[2] - row_range[1])


def part(row_range: RowRange, start: int, stop: int) -> RowRange:
    """The range's items ``start <= item < stop``."""
    if row_range[0] == "rows":
        return [*row_range[:3], row_range[3] + start, row_range[3] + stop, *row_range[5:]]
    return ["bad", row_range[1] + start, row_range[1] + stop] if row_range[0] == "bad" else row_range


def file_of(row_range: RowRange) -> RowRange:
    """What is the same in all ranges of a file, while that is the same: location, name, rows and mark."""
    return [*row_range[1:3], *row_range[5:]]


def append(row_ranges: list[RowRange], row_range: RowRange) -> None:
    """Add a range; extend the last one if it continues that."""
    last = row_ranges[-1] if row_ranges else None
    if last is not None and last[0] == row_range[0]:
        if row_range[0] == "rows" and file_of(last) == file_of(row_range) and last[4] == row_range[3]:
            last[4] = row_range[4]
            return
        if row_range[0] == "bad" and last[2] == row_range[1]:
            last[2] = row_range[2]
            return
    row_ranges.append(list(row_range))


class Packer:
    """Fills chunks with row ranges up to each chunk's limit. first: the ordinal of the next item."""

    def __init__(self, first: int, limit: Callable[[], ChunkLimit]) -> None:
        self.any = False  # whether there was an item
        self._first, self._limit = first, limit
        self._bound: ChunkLimit | None = None
        self._row_ranges: list[RowRange] = []
        self._count = self._bytes = 0
        self._cursor: Any = None

    def room(self, weight: int) -> int:
        """How many more items of ``weight`` bytes each fit; at least one into an empty chunk."""
        if self._bound is None:
            self._bound = self._limit()
        if len(self._row_ranges) >= MOST:
            return 0
        fitting = self._bound.items - self._count
        if weight:
            fitting = min(fitting, (self._bound.bytes - self._bytes) // weight)
        return max(fitting, 0 if self._count else 1)

    def add(self, row_range: RowRange, count: int, weight: int, cursor: Any) -> None:
        append(self._row_ranges, row_range)
        self._count += count
        self._bytes += count * weight
        self._cursor = cursor
        self.any = True

    def flush(self) -> Iterator[Chunk]:
        """The chunk as it is, if it holds anything."""
        if self._count:
            yield Chunk(self._first, self._count, {"pieces": self._row_ranges}, json.dumps(self._cursor))
            self._first += self._count
        self._bound, self._row_ranges, self._count, self._bytes = None, [], 0, 0

    def make_room(self, count: int, weight: int) -> Iterator[Chunk]:
        """Begin a new chunk if ``count`` items do not fit into the current one."""
        if self._count and self.room(weight) < count:
            yield from self.flush()

    def cut(
        self,
        head: RowRange,
        start: int,
        ends: Sequence[int],
        weight: int,
        cursor: Callable[[int], Any],
        mark: str = "",
    ) -> Iterator[Chunk]:
        """The chunks of a file's rows from ``start`` on, cut at the end of a row group if one is near.

        ends: of its row groups. cursor: after so many rows of the file. mark: the file's; empty for a work file.
        """
        tail = [ends[-1] if ends else 0, *([mark] if mark else [])]
        rows = ends[-1] if ends else 0
        while start < rows:
            room = self.room(weight)
            if not room:
                yield from self.flush()
                continue
            stop = min(rows, start + room)
            snapped = stop
            if stop < rows and (at := bisect.bisect_right(ends, stop)):
                end = ends[at - 1]
                if end > start and self._count + end - start >= _SNAP * (self._count + room):
                    snapped = end
            self.add([*head, start, snapped, *tail], snapped - start, weight, cursor(snapped))
            start = snapped
            if start < rows:
                yield from self.flush()
