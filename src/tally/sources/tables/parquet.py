"""Runs of rows out of Parquet files, decoded when they are read."""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


DECODED = 65_536
"""The least number of rows that are decoded at once."""


class Footer(NamedTuple):
    """The part of a file's footer that planning needs.

    ends: of its row groups, in rows. weight: bytes of a row, unpacked, in the columns that are read.
    """

    ends: tuple[int, ...]
    weight: int

    @property
    def rows(self) -> int:
        """The number of rows of the file."""
        return self.ends[-1] if self.ends else 0


def footer_of(meta: pq.FileMetaData, columns: Collection[str]) -> Footer:
    """The part of a file's metadata that planning needs. columns: those that will be read."""
    groups = [meta.row_group(index) for index in range(meta.num_row_groups)]
    size = sum(
        column.total_uncompressed_size
        for group in groups[:16]
        for column in (group.column(index) for index in range(group.num_columns))
        if column.path_in_schema.split(".", 1)[0] in columns
    )
    rows = sum(group.num_rows for group in groups[:16])
    return Footer(tuple(accumulate(group.num_rows for group in groups)), max(1, size // max(rows, 1)))


class Stream:
    """Reads runs of rows of one file, which it owns; for one thread. Ascending runs share what is decoded.

    columns: those that are read. rows: how many are decoded at once.
    """

    def __init__(self, file: pq.ParquetFile, columns: Sequence[str], rows: int) -> None:
        self._file, self._columns, self._rows = file, list(columns), rows
        meta = file.metadata
        self._ends = list(accumulate(meta.row_group(index).num_rows for index in range(meta.num_row_groups)))
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch | None = None
        self._at = 0  # the first row of the current batch

    def read(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows ``start <= row < stop``, in order, in several batches."""
        while start < stop:
            batch = self._holding(start)
            taken = batch.slice(start - self._at, stop - start)
            start += taken.num_rows
            yield taken

    def _holding(self, row: int) -> pa.RecordBatch:
        """The decoded batch that holds a row."""
        group = bisect.bisect_right(self._ends, row)
        if group != self._group or row < self._at:
            self._group, self._at, self._batch = group, self._ends[group - 1] if group else 0, None
            self._batches = self._file.iter_batches(
                self._rows, row_groups=[group], columns=self._columns, use_threads=False
            )
        while self._batch is None or row >= self._at + self._batch.num_rows:
            if self._batch is not None:
                self._at += self._batch.num_rows
            self._batch = next(self._batches)
        return self._batch

    def close(self) -> None:
        self._batches, self._batch = iter(()), None
        self._file.close()
