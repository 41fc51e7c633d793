"""Small pictures of a job's items, kept beside its results: many in one Parquet file, a row for each item.

Like rows they are staged under the name of their attempt, count once that is committed, and are put together in the
end. What an attempt has staged of them is among the facts of its output.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tally.errors import ItemError, StorageError
from tally.scorers.base import Result, Thumbnail, Thumbnailed
from tally.sinks import merge
from tally.sinks.base import THUMBNAILS, Output, Writer
from tally.sinks.columns import KEY, printable
from tally.sinks.layout import File, OutputLayout, staged_name
from tally.sources.tables.formats import open_parquet
from tally.storage import failure

SCHEMA = pa.schema([(KEY, pa.string()), ("thumbnail", pa.binary()), ("width", pa.int32()), ("height", pa.int32())])
"""width, height: of the original, upright picture, in pixels."""

_GROUP_ROWS = 256
"""Rows of a row group: to show one thumbnail, no more of them are read."""
_SPILL_BYTES = 32 * 1024**2


class ThumbnailWriter(Writer):
    """Takes the thumbnails from results, which another writer gets without them. What that refuses has none."""

    def __init__(self, layout: OutputLayout, attempt: str, writer: Writer) -> None:
        self._layout, self._attempt, self._writer = layout, attempt, writer
        self._rows: list[tuple[str, bytes, int, int]] = []
        self._held = 0
        self._files: list[tuple[str, int, int]] = []

    def add(self, keys: Sequence[str], results: Sequence[Result], info: Any = None) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add`."""
        return self._keep(keys, results, self._writer.add(keys, _plain(results), info))

    def add_table(self, keys: Any, rows: Any, info: Any = None) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add_table`. Columns come without thumbnails."""
        return self._writer.add_table(keys, rows, info)

    def add_rows(self, keys: Any, results: Sequence[Result], info: Any = None) -> list[tuple[int, ItemError]]:
        """See :meth:`Writer.add_rows`."""
        return self._keep(keys.to_pylist(), results, self._writer.add_rows(keys, _plain(results), info))

    def close(self) -> Output:
        """See :meth:`Writer.close`."""
        if self._rows:
            self._flush()
        output = self._writer.close()
        return replace(output, facts={**output.facts, THUMBNAILS: self._files}) if self._files else output

    def abort(self) -> None:
        """See :meth:`Writer.abort`."""
        self._writer.abort()
        self._rows.clear()
        self._layout.store.delete([self._layout.staging + name for name, _, _ in self._files])

    def _keep(
        self, keys: Sequence[str], results: Sequence[Result], failed: list[tuple[int, ItemError]]
    ) -> list[tuple[int, ItemError]]:
        refused = {index for index, _ in failed}
        for index, (key, result) in enumerate(zip(keys, results, strict=True)):
            if index not in refused and isinstance(result, Thumbnailed):
                self._rows.append((printable(key), *result.thumbnail))
                self._held += len(result.thumbnail.jpeg)
        if self._held >= _SPILL_BYTES:
            self._flush()
        return failed

    def _flush(self) -> None:
        columns = [
            pa.array(values, kind) for values, kind in zip(zip(*self._rows, strict=True), SCHEMA.types, strict=True)
        ]
        buffer = pa.BufferOutputStream()
        with merge.parquet_writer(buffer, SCHEMA) as writer:
            writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), row_group_size=_GROUP_ROWS)
        data = memoryview(buffer.getvalue())
        name = staged_name(self._attempt, f"thumbnails-{len(self._files)}")
        self._files.append((name, len(self._rows), len(data)))
        self._layout.store.write(self._layout.staging + name, data)
        self._rows, self._held = [], 0


def _plain(results: Sequence[Result]) -> list[Result]:
    return [result.result if isinstance(result, Thumbnailed) else result for result in results]


def assemble(
    layout: OutputLayout, outputs: Iterable[Output], kept: Sequence[File]
) -> tuple[list[File], dict[str, str]]:
    """Make the final files of what is committed; kept: those of earlier generations, which come first.

    Returns all, and the names of staged files by the final ones that they will be moved to.
    """
    new = ((name, rows, size) for output in outputs for name, rows, size in output.facts.get(THUMBNAILS, ()))
    files, moves = merge.parts(layout, new, len(kept), SCHEMA, layout.thumbnails, group_rows=_GROUP_ROWS)
    return [*kept, *files], moves


def read(layout: OutputLayout, names: Iterable[str], keys: Collection[str]) -> dict[str, Thumbnail]:
    """The thumbnails of these items, as far as the files have them. Raises StorageError, SourceNotFoundError."""
    wanted = set(keys)
    found: dict[str, Thumbnail] = {}
    for name in names:
        if len(found) == len(wanted):
            break
        with open_parquet(layout.store, name) as file:
            try:
                found |= _among(file, wanted)
            except StorageError:
                raise
            except (OSError, pa.ArrowException, KeyError) as error:
                raise failure("read", layout.address(name), error) from None
    return found


def _among(file: pq.ParquetFile, keys: Collection[str]) -> dict[str, Thumbnail]:
    found: dict[str, Thumbnail] = {}
    for group in range(file.num_row_groups):
        bounds = file.metadata.row_group(group).column(0).statistics
        if bounds is not None and bounds.has_min_max and not any(bounds.min <= key <= bounds.max for key in keys):
            continue
        there = file.read_row_group(group, columns=[KEY])[KEY].to_pylist()
        if at := [row for row, key in enumerate(there) if key in keys]:
            for row in file.read_row_group(group).take(at).to_pylist():
                found[row.pop(KEY)] = Thumbnail(row["thumbnail"], row["width"], row["height"])
    return found
