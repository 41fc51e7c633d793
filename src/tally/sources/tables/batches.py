"""Batches of rows out of a chunk's row ranges, made ahead of the consumer."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tally.errors import ItemError, SourceChangedError, SourceNotFoundError, StorageAwayError, TallyError
from tally.sources.base import Batch
from tally.sources.tables.damage import DAMAGED
from tally.sources.tables.formats import plain_type
from tally.sources.tables.parquet import DECODED, Stream
from tally.sources.tables.row_ranges import RowRange, file_of, length
from tally.storage import key_of, name_from_json

if TYPE_CHECKING:
    import pyarrow as pa

    from tally.sources.tables.source import TableSource

READY = 1
"""Batches that wait while one is scored. One more is being made."""


class Reader:
    """Makes the batches of one chunk."""

    def __init__(self, source: TableSource, row_ranges: Sequence[RowRange], size: int) -> None:
        self._source, self._row_ranges, self._size = source, row_ranges, size
        query = source.query
        self._values = list(dict.fromkeys([*source.by, *source.features]))
        self._info = {name: source.query.selection.origin.get(name, name) for name in source.columns}
        self._types = dict(query.selection.inputs)
        self._stream: tuple[Any, Stream] | None = None
        self._window = _Window(0, size)

    def batches(self) -> Iterator[Batch]:
        count = sum(map(length, self._row_ranges))
        self._window = _Window(0, min(self._size, count))
        try:
            for row_range in self._row_ranges:
                for start, rows, found in self._found(row_range):
                    done = 0
                    while done < rows:
                        taken = min(rows - done, self._window.room)
                        self._add(row_range, start + done, taken, found, done)
                        done += taken
                        if not self._window.room:
                            batch = self._window.batch(self._values, self._info)
                            self._window = _Window(batch.stop, min(self._size, count - batch.stop))
                            yield batch
        finally:
            self._close()

    def _found(self, row_range: RowRange) -> Iterator[tuple[int, int, Any]]:
        """Runs of the range's items: the first item, their number, and a record batch or their errors."""
        if row_range[0] == "key":
            yield 0, 1, [ItemError(row_range[2])]
        elif row_range[0] == "bad":
            for start in range(row_range[1], row_range[2], DECODED):
                stop = min(start + DECODED, row_range[2])
                lines = self._source.bad_lines(start, stop)
                yield start, stop - start, [ItemError(row["error"], stage="read") for row in lines]
        else:
            at = row_range[3]
            try:
                for batch in self._open(row_range).read(at, row_range[4]):
                    yield at, batch.num_rows, batch
                    at += batch.num_rows
                # Not before each batch is scored: if this fails, nothing of the chunk counts.
                self._source.check_rows(row_range)
            except (StorageAwayError, SourceChangedError, SourceNotFoundError):
                raise
            except (TallyError, OSError, ValueError, StopIteration, RuntimeError) as error:
                self._source.check_rows(row_range)
                self._close()
                failed = _unreadable(row_range, error)
                yield at, row_range[4] - at, [failed] * (row_range[4] - at)

    def _open(self, row_range: RowRange) -> Stream:
        if self._stream is None or self._stream[0] != file_of(row_range):
            self._close()
            file = self._source.open_rows(row_range)
            columns = list(dict.fromkeys([*self._values, *self._info.values(), *self._source.key_columns(row_range)]))
            called = self._source.called(row_range)
            columns = [called.get(name, name) for name in columns]
            self._stream = (file_of(row_range), Stream(file, columns, max(DECODED, self._size)))
        return self._stream[1]

    def _close(self) -> None:
        if self._stream is not None:
            self._stream[1].close()
            self._stream = None

    def _add(self, row_range: RowRange, start: int, count: int, found: Any, offset: int) -> None:
        window = self._window
        if isinstance(found, list):
            window.dead += list(zip(range(window.at, window.at + count), found[offset : offset + count], strict=True))
        else:
            import pyarrow as pa

            rows = pa.Table.from_batches([found.slice(offset, count)])
            if names := {called: name for name, called in self._source.called(row_range).items()}:
                rows = rows.rename_columns([names.get(name, name) for name in rows.column_names])
            try:
                table = plain(rows, self._types)
            except _MisfitError as error:
                self._add_parts(row_range, start, count, found, offset, error)
                return
            window.tables.append(table)
            window.keys.append(self._source.keys_of(row_range, start, rows, count))
            window.runs.append((window.at, window.at + count))
        window.at += count

    def _add_parts(
        self, row_range: RowRange, start: int, count: int, found: Any, offset: int, error: _MisfitError
    ) -> None:
        """As :meth:`_add`, for rows of which one does not fit."""
        if count == 1:
            where = key_of(name_from_json(row_range[2]))
            dead = ItemError(f"{where}, {error}", stage="read", hint="Score such files in two jobs.")
            self._add(row_range, start, 1, [dead], 0)
            return
        half = count // 2
        self._add(row_range, start, half, found, offset)
        self._add(row_range, start + half, count - half, found, offset + half)


@dataclass(slots=True)
class _Window:
    """A batch that is being filled, up to position ``stop`` of its chunk."""

    start: int
    size: int
    at: int = field(init=False)
    tables: list[Any] = field(default_factory=list)
    keys: list[Any] = field(default_factory=list)
    runs: list[tuple[int, int]] = field(default_factory=list)
    dead: list[tuple[int, ItemError]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = self.start

    @property
    def room(self) -> int:
        return self.start + self.size - self.at

    def batch(self, values: Sequence[str], info: Mapping[str, str]) -> Batch:
        """The batch. info: the columns that results carry: their names there, and in the table."""
        batch = Batch(self.start, self.start + self.size, dead=self.dead)
        if not self.tables:
            return batch
        import numpy as np
        import pyarrow as pa

        table = pa.concat_tables(self.tables)
        batch.keys = self.keys[0] if len(self.keys) == 1 else pa.concat_arrays(self.keys)
        batch.positions = np.concatenate([np.arange(*run, dtype=np.int64) for run in self.runs])
        batch.values = table.select(values)
        batch.info = table.select(list(info.values())).rename_columns(list(info)) if info else None
        return batch


def plain(table: pa.Table, types: Mapping[str, pa.DataType]) -> pa.Table:
    """The table with plain column types. types: those that all files of the source have in common.

    Raises _MisfitError if one of them does not hold a time or an interval.
    """
    import pyarrow as pa

    for index, name in enumerate(table.schema.names):
        kind = table.schema.field(index).type
        expected = types.get(name) or plain_type(kind)
        if kind != expected:
            try:
                cast = table.column(index).cast(expected, safe=pa.types.is_temporal(expected))
            except pa.ArrowInvalid as error:
                what = f"column {name!r}: a value of {kind} does not fit {expected}, which other files hold"
                raise _MisfitError(what) from error
            table = table.set_column(index, name, cast)
    return table


class _MisfitError(ValueError):
    """A value that a column's type does not hold."""


def _unreadable(row_range: RowRange, error: BaseException) -> ItemError:
    if isinstance(error, TallyError):
        return ItemError(error.message, stage="read", hint=error.hint)
    reason = " ".join(str(error).split()) or "it ends too early"
    return ItemError(f"{key_of(name_from_json(row_range[2]))} cannot be read: {reason}", stage="read", hint=DAMAGED)


class Ahead(threading.Thread):
    """Makes batches while the consumer is busy with the one before."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        super().__init__(name="tally-table", daemon=True)
        self.seconds = 0.0  # that making them took
        self._batches = batches
        self._ready: queue.Queue[Any] = queue.Queue(READY)
        self._stopping = threading.Event()
        self.start()

    def next(self) -> Batch | None:
        """The next batch; None after the last."""
        found = self._ready.get()
        if isinstance(found, BaseException):
            raise found
        return found  # type: ignore[no-any-return]

    def stop(self) -> None:
        """Stop working; returns when nothing runs any more."""
        self._stopping.set()
        while self.is_alive():
            with suppress(queue.Empty):
                self._ready.get_nowait()
            self.join(0.005)

    def run(self) -> None:
        began = time.perf_counter()
        try:
            for batch in self._batches:
                self.seconds += time.perf_counter() - began
                self._ready.put(batch)
                if self._stopping.is_set():
                    return
                began = time.perf_counter()
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)
        finally:
            self._batches.close()  # type: ignore[attr-defined]
